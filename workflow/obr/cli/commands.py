"""The sub-commands: each gets its parsed arguments and calls one stage of the package.

Libraries are imported when a command needs them, so that `obr --help` is quick.
"""

import os
from argparse import Namespace

from obr.errors import ObrError, printable
from obr.runtime.files import write_json


def download_model(args: Namespace) -> None:
    from obr.models.download import download_model

    trust = args.settings.get("trust_remote_code", False)
    download_model(args.settings["source"], args.out, args.settings.get("dtype", "auto"), trust, args.rerun)


def check_model(args: Namespace) -> None:
    from obr.config.model_sizes import read_config
    from obr.config.workflow import check_widths
    from obr.models.architectures import with_defaults

    check_widths(with_defaults(read_config(args.model, args.model.name)), args.patterns, args.model.name)
    write_json(args.patterns, args.out)


def download_text(args: Namespace) -> None:
    from obr.data.texts import download_text

    download_text(args.settings, args.out)


def download_documents(args: Namespace) -> None:
    from obr.data.texts import download_documents

    download_documents(args.settings, args.out)


def download_task(args: Namespace) -> None:
    from obr.evaluation.tasks import download_task

    download_task(args.settings["source"], args.out, args.text, args.rerun)


def download_rotation(args: Namespace) -> None:
    from obr.rotations.obtain import make

    make(args.settings, args.model, args.out)


def learn_rotation(args: Namespace) -> None:
    device, dtype = _computing(args.device, args.dtype)
    from obr.rotations.learning.registry import learn_rotation

    learn_rotation(args.settings, args.model, args.tokens, args.out, device, dtype, args.activations_memory)


def calibrate(args: Namespace) -> None:
    from obr.data.token_windows import calibrate

    calibrate(args.model, args.text, args.settings, args.out)


def generate(args: Namespace) -> None:
    device, dtype = _computing(args.device, args.dtype)
    from obr.data.self_generated import generate

    generate(args.model, args.settings, args.out, device, dtype)


def mix(args: Namespace) -> None:
    from obr.data.self_generated import mix

    mix(args.windows, args.settings, args.out)


def _computing(device: str, dtype: str | None):
    """(device, torch dtype), once the device is ours."""
    from obr.runtime.gpu import claim

    device = claim(device)
    import torch

    return device, getattr(torch, dtype) if dtype else None


def hessian(args: Namespace) -> None:
    device, dtype = _computing(args.device, args.dtype)
    from obr.calibration.collect_hessians import hessian_stage

    hessian_stage(args.model, args.rotation, args.tokens, args.out, dtype, device, args.activations_memory)


def gradients(args: Namespace) -> None:
    device, dtype = _computing(args.device, args.dtype)
    from obr.calibration.output_gradients import gradients

    notes = gradients(
        args.model, args.rotation, args.tokens, args.out,
        nsamples=args.settings["nsamples"], seqlen=args.settings["seqlen"], dtype=dtype, device=device,
        megabytes=args.activations_memory,
    )  # fmt: skip
    print(
        f"gradients of {notes['tokens']} tokens in {notes['windows']} windows, loss {notes['loss']:.4f} nats a token"
    )


def sensitivity(args: Namespace) -> None:
    device, dtype = _computing(args.device, args.dtype)
    from obr.config.recipe import Option
    from obr.mixed_precision.sensitivity import measure_sensitivity

    options = tuple(Option.parse(option, f"options[{i}]") for i, option in enumerate(args.settings["options"]))
    measure_sensitivity(
        args.model, args.rotation, args.tokens, args.hessians, args.gradients, options, args.out,
        args.settings.get("blocks"), dtype, device, args.activations_memory,
    )  # fmt: skip


def allocate(args: Namespace) -> None:
    from obr.config.recipe import Recipe
    from obr.mixed_precision.allocate import allocate_stage

    print(allocate_stage(Recipe.parse(args.recipe), args.sensitivity, args.out).summary())


def compress(args: Namespace) -> None:
    device, dtype = _computing(args.device, args.dtype)
    from obr.compression.stage import compress_stage
    from obr.config.recipe import Recipe

    compress_stage(
        args.model, Recipe.parse(args.recipe), args.out,
        rotation=args.rotation, tokens=args.tokens, hessians=args.hessians, gradient_file=args.gradients,
        allocation_file=args.allocation, dtype=dtype, device=device, megabytes=args.activations_memory,
    )  # fmt: skip


def download_released(args: Namespace) -> None:
    from obr.checkpoints.released.download import download_released

    download_released(args.settings, args.out, args.rerun)


def released(args: Namespace) -> None:
    from obr.checkpoints.released.stage import import_released, summary
    from obr.config.recipe import Recipe

    print(summary(import_released(args.model, args.released, Recipe.parse(args.recipe), args.out)))


def kernels(args: Namespace) -> None:
    device, _ = _computing(args.device, args.dtype)
    from obr.kernels.benchmark import benchmark, sizes

    if args.sizes_only:
        sizes(args.settings, args.out)
    else:
        benchmark(args.settings, device, args.out)


def table(args: Namespace) -> None:
    from obr.config.config_files import read_yaml
    from obr.report.table import build, write

    write(build(read_yaml(args.config), args.name, args.results, args.published), args.out)


def figure(args: Namespace) -> None:
    from obr.config.config_files import read_yaml
    from obr.report.figures.draw import draw

    draw(read_yaml(args.config), args.name, args.results, args.published, args.out)


def push(args: Namespace) -> None:
    from obr.export.hub import push

    print(push(args.checkpoint, args.repo, args.dry_run, args.licence, args.private))


def export(args: Namespace) -> None:
    from obr.export.dispatch import export

    print(export(args.checkpoint, args.form, args.out, args.weights_only))


def verify(args: Namespace) -> None:
    device, _ = _computing(args.device, None)
    from obr.checkpoints.verify import verify_checkpoint
    from obr.compression.recompute import TOLERATED, Places, repeat, summary

    problems = verify_checkpoint(args.checkpoint)
    if args.recompute and not problems:
        for layer in repeat(
            args.checkpoint,
            args.recompute,
            Places(args.model, args.rotation, args.tokens, args.hessians, args.gradients),
            device,
        ):
            print(summary(layer))
            if layer.differing > TOLERATED:
                problems.append(f"{summary(layer)}, more than rounding explains on one kind of processor.")
    for problem in problems:
        print(printable(problem))
    if problems:
        raise ObrError(f"{args.checkpoint} is not what its manifest says in {len(problems)} points, listed above.")
    print(f"{args.checkpoint} is what its manifest says.")


def check(args: Namespace) -> None:
    from obr.planning.plan import overrides_of, priced
    from obr.planning.preflight import Machine, preflight

    config, jobs, _, each = priced(
        args.snakefile, args.configfile, overrides_of(args.config), args.targets, args.cores or os.cpu_count() or 1
    )
    found = preflight(config, jobs, each, Machine.here(not args.offline), args.gpu_memory)
    print("\n".join(found.lines()))
    if found.problems:
        count = len(found.problems)
        raise ObrError(f"{count} thing{'s' * (count > 1)} would stop the run; see the list above.")


def plan(args: Namespace) -> None:
    from obr.planning.plan import as_json, overrides_of, plan_of, summary
    from obr.runtime.files import write_text

    found = plan_of(
        args.snakefile, args.configfile, overrides_of(args.config), args.targets,
        args.cores or os.cpu_count() or 1, args.gpus, args.bandwidth, args.gpu_memory,
    )  # fmt: skip
    if args.json:
        write_text(as_json(found), args.json)
    print(summary(found), end="")


def errata(args: Namespace) -> None:
    from obr.report.errata import markdown
    from obr.runtime.files import write_text

    text = markdown(args.published)
    if args.out:
        write_text(text, args.out)
    else:
        print(text, end="")
