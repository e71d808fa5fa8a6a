"""The command line: one sub-command a stage. What Snakemake runs can be copied and run by hand."""

import argparse
import gc
import io
import os
import sys
from pathlib import Path

from obr.cli.options import (
    ERRATA,
    EXPORT,
    OPTIONS,
    PLAN,
    PUSH,
    VERIFY,
    errata_options,
    export_options,
    plan_options,
    push_options,
    verify_options,
)
from obr.errors import ObrError, printable
from obr.models import remote_code
from obr.runtime import cache_folder
from obr.runtime.files import write_json
from obr.runtime.gpu import taken_away


def main(argv: list[str] | None = None) -> int:
    """Run one stage; returns the exit status. Foreseen problems end in one sentence on stderr and status 1."""
    gc.set_threshold(100_000, 50, 50)  # imports make many objects and no garbage: a fifth of their time
    arguments = vars(_parser().parse_args(argv))
    stage = arguments.pop("stage")
    threads, trust = arguments.pop("threads", None), arguments.pop("trust_remote_code", False)
    if threads:  # before any library reads them
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[variable] = str(threads)
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale without "±" changes what is printed, not whether it is
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if sentence := cache_folder.redirect():
            print(f"obr: {sentence}", file=sys.stderr)
        with remote_code.allowed(trust):
            stage(**arguments)
    except ObrError as error:
        print(f"obr: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"obr: {error.strerror}{where}; free the space or correct the path, then rerun.", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not (sentence := taken_away(error)):
            raise
        print(f"obr: {printable(sentence)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("obr: interrupted; rerun to continue.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="obr", description=__doc__)
    stages = parser.add_subparsers(required=True, metavar="STAGE")

    def stage(name: str, function, text: str, *options: str) -> None:
        command = stages.add_parser(name, help=text, description=text)
        command.set_defaults(stage=function)
        for option in options:
            OPTIONS[option.rstrip("?")](command, not option.endswith("?"))

    stage("download-model", download_model, "Fetch a model into a folder.", "entry", "out")
    stage("check-model", check_model, "Check recipes against a model's sizes.", "entry", "model", "out")
    stage("download-text", download_text, "Fetch a text into a file.", "entry", "out")
    stage("download-documents", download_documents, "Fetch a text's documents into a file.", "entry", "out")
    stage("download-task", download_task, "Fetch a zero-shot task.", "entry", "text?", "out")
    stage("download-rotation", download_rotation, "Make a model's rotation.", "entry", "model", "out", "trust")
    stage(
        "learn-rotation", learn_rotation, "Learn a model's rotation.",
        "entry", "model", "tokens", "out", "compute", "trust",
    )  # fmt: skip
    stage("calibrate", calibrate, "Choose calibration windows.", "entry", "model", "text", "out", "trust")
    stage("generate", generate, "Let a model write calibration windows.", "entry", "model", "out", "compute", "trust")
    stage("mix", mix, "Mix calibration windows of several files.", "entry", "windows", "out")
    stage(
        "hessian", hessian, "Collect the Hessians of a model's layer inputs.",
        "model", "rotation?", "tokens", "out", "activations", "compute", "trust",
    )  # fmt: skip
    stage(
        "gradients", gradients, "Measure how much the loss feels each output channel of each layer.",
        "entry", "model", "rotation?", "tokens", "out", "activations", "compute", "trust",
    )  # fmt: skip
    stage(
        "sensitivity", sensitivity, "Predict the loss that each layer costs at several options.",
        "entry", "model", "rotation?", "tokens", "hessians", "gradients", "out", "activations", "compute", "trust",
    )  # fmt: skip
    stage("allocate", allocate, "Choose an option for each layer under a budget.", "entry", "sensitivity", "out")
    stage(
        "compress", compress, "Compress a model by a recipe.",
        "entry", "model", "rotation?", "tokens?", "hessians?", "gradients?", "allocation?", "out", "activations",
        "compute", "trust",
    )  # fmt: skip
    stage("download-released", download_released, "Fetch a checkpoint of the authors.", "entry", "out")
    stage(
        "released", released, "Verify a checkpoint of the authors and take it over.",
        "entry", "model", "released", "out", "trust",
    )  # fmt: skip
    stage(
        "perplexity", perplexity, "Perplexity of a checkpoint.",
        "entry", "checkpoint", "recipe?", "text", "out", "activations", "compute", "trust",
    )  # fmt: skip
    stage(
        "zero-shot", zero_shot, "Zero-shot accuracy of a checkpoint.",
        "entry", "checkpoint", "recipe?", "task", "out", "compute", "trust",
    )  # fmt: skip
    stage("kernels", kernels, "Time matrix products on this device.", "entry", "out", "compute", "sizes")
    stage("table", table, "Make a table.", "entry", "recipes", "models", "results", "published", "out")
    stage(
        "figure", figure, "Draw a figure.",
        "entry", "recipes", "models", "results", "published", "shapes?", "out",
    )  # fmt: skip
    for name, (function, text, options) in {
        "plan": (plan, PLAN, plan_options),
        "push": (push, PUSH, push_options),
        "verify": (verify, VERIFY, verify_options),
        "export": (export, EXPORT, export_options),
        "errata": (errata, ERRATA, errata_options),
    }.items():
        command = stages.add_parser(name, help=text, description=text)
        command.set_defaults(stage=function)
        options(command)
    return parser


def download_model(entry: dict, out: Path) -> None:
    from obr.models.download import download_model

    download_model(entry["source"], out, entry.get("dtype", "auto"), entry.get("trust_remote_code", False))


def check_model(entry: dict, model: Path, out: Path) -> None:
    from obr.config.model_sizes import read_config
    from obr.config.workflow import check_widths

    check_widths(read_config(model, model.name), entry, model.name)
    write_json(entry, out)


def download_text(entry: dict, out: Path) -> None:
    from obr.data.texts import download_text

    download_text(entry, out)


def download_documents(entry: dict, out: Path) -> None:
    from obr.data.texts import download_documents

    download_documents(entry, out)


def download_task(entry: dict, text: Path | None, out: Path) -> None:
    from obr.evaluation.tasks import download_task

    download_task(entry["source"], out, text)


def download_rotation(entry: dict, model: Path, out: Path) -> None:
    from obr.rotations.obtain import make

    make(entry, model, out)


def learn_rotation(entry: dict, model: Path, tokens: Path, out: Path, device: str, dtype: str | None) -> None:
    device, dtype = _computing(device, dtype)
    from obr.rotations.learning.registry import learn_rotation

    learn_rotation(entry, model, tokens, out, device, dtype)


def calibrate(entry: dict, model: Path, text: Path, out: Path) -> None:
    from obr.data.token_windows import calibrate

    calibrate(model, text, entry, out)


def generate(entry: dict, model: Path, out: Path, device: str, dtype: str | None) -> None:
    device, dtype = _computing(device, dtype)
    from obr.data.self_generated import generate

    generate(model, entry, out, device, dtype)


def mix(entry: dict, windows: list[Path], out: Path) -> None:
    from obr.data.self_generated import mix

    mix(windows, entry, out)


def _computing(device: str, dtype: str | None):
    """(device, torch dtype), once the device is ours."""
    from obr.runtime.gpu import claim

    device = claim(device)
    import torch

    return device, getattr(torch, dtype) if dtype else None


def hessian(
    model: Path,
    rotation: Path | None,
    tokens: Path,
    out: Path,
    activations_memory: float,
    device: str,
    dtype: str | None,
) -> None:
    device, dtype = _computing(device, dtype)
    from obr.calibration.collect_hessians import hessian

    hessian(model, rotation, tokens, out, dtype, device, activations_memory)


def gradients(
    entry: dict,
    model: Path,
    rotation: Path | None,
    tokens: Path,
    out: Path,
    activations_memory: float,
    device: str,
    dtype: str | None,
) -> None:
    device, dtype = _computing(device, dtype)
    from obr.calibration.output_gradients import gradients

    notes = gradients(
        model, rotation, tokens, out,
        nsamples=entry["nsamples"], seqlen=entry["seqlen"], dtype=dtype, device=device, megabytes=activations_memory,
    )  # fmt: skip
    print(
        f"gradients of {notes['tokens']} tokens in {notes['windows']} windows, loss {notes['loss']:.4f} nats a token"
    )


def sensitivity(
    entry: dict,
    model: Path,
    rotation: Path | None,
    tokens: Path,
    hessians: Path,
    gradients: Path,
    out: Path,
    activations_memory: float,
    device: str,
    dtype: str | None,
) -> None:
    device, dtype = _computing(device, dtype)
    from obr.config.recipe import Option
    from obr.mixed_precision.sensitivity import sensitivity

    options = tuple(Option.parse(option, f"options[{i}]") for i, option in enumerate(entry["options"]))
    sensitivity(
        model, rotation, tokens, hessians, gradients, options, out, entry.get("blocks"), dtype, device,
        activations_memory,
    )  # fmt: skip


def allocate(entry: dict, sensitivity: Path, out: Path) -> None:
    from obr.config.recipe import Recipe
    from obr.mixed_precision.allocate import allocate_stage

    print(allocate_stage(Recipe.parse(entry), sensitivity, out).spell())


def compress(
    entry: dict,
    model: Path,
    rotation: Path | None,
    tokens: Path | None,
    hessians: Path | None,
    gradients: Path | None,
    allocation: Path | None,
    out: Path,
    activations_memory: float,
    device: str,
    dtype: str | None,
) -> None:
    device, dtype = _computing(device, dtype)
    from obr.compression.stage import compress_stage
    from obr.config.recipe import Recipe

    compress_stage(
        model, Recipe.parse(entry), out,
        rotation=rotation, tokens=tokens, hessians=hessians, gradient_file=gradients, allocation_file=allocation,
        dtype=dtype, device=device, megabytes=activations_memory,
    )  # fmt: skip


def download_released(entry: dict, out: Path) -> None:
    from obr.checkpoints.released.download import download_released

    download_released(entry, out)


def released(entry: dict, model: Path, released: Path, out: Path) -> None:
    from obr.checkpoints.released.stage import adopt, spell
    from obr.config.recipe import Recipe

    print(spell(adopt(model, released, Recipe.parse(entry), out)))


def perplexity(
    entry: dict,
    checkpoint: Path,
    recipe: dict | None,
    text: Path,
    out: Path,
    activations_memory: float,
    device: str,
    dtype: str | None,
) -> None:
    device, dtype = _computing(device, dtype)
    from obr.config.recipe import Recipe
    from obr.evaluation.perplexity import perplexity_stage
    from obr.models.hidden_states import Room

    out.parent.mkdir(parents=True, exist_ok=True)
    room = Room(activations_memory, out.parent)
    result = perplexity_stage(checkpoint, text, entry, Recipe.parse(recipe) if recipe else None, dtype, device, room)
    write_json(result, out)
    value = result["status"] if result["value"] is None else f"{result['value']:.4f}"
    print(f"perplexity {value}: {result['definition']}; {result['windows']} windows")
    if "note" in result:
        print(f"{result['note']}.")


def zero_shot(
    entry: dict, checkpoint: Path, recipe: dict | None, task: Path, out: Path, device: str, dtype: str | None
) -> None:
    device, dtype = _computing(device, dtype)
    from obr.checkpoints.format import load
    from obr.evaluation.zero_shot import zero_shot
    from obr.models.loading import load_tokenizer

    model = load(checkpoint, recipe, dtype, device)
    result = zero_shot(
        model, load_tokenizer(checkpoint), task,
        limit=entry.get("limit"), batch_size=entry.get("batch_size", 1), bos=entry.get("bos"),
    )  # fmt: skip
    write_json(result, out)
    spread = "" if result["stderr"] is None else f" ± {result['stderr']:.4f}"
    print(f"{result['task']}: {result['metric']} {result['value']:.4f}{spread}; {result['prompts']}")
    if "note" in result:
        print(f"{result['note']}.")


def kernels(entry: dict, out: Path, device: str, dtype: str | None, sizes_only: bool) -> None:
    device, _ = _computing(device, dtype)
    from obr.kernels.benchmark import benchmark, sizes

    if sizes_only:
        sizes(entry, out)
    else:
        benchmark(entry, device, out)


def table(entry: dict, recipes: dict, models: dict, results: Path, published: Path, out: Path) -> None:
    from obr.report.table import build, write

    write(build(entry, recipes, models, results, published), out)


def figure(
    entry: dict, recipes: dict, models: dict, results: Path, published: Path, shapes: dict | None, out: Path
) -> None:
    from obr.report.figures.draw import draw

    draw(entry, recipes, models, results, published, out, (shapes or {}).get("shapes"))


def push(checkpoint: Path, repo: str, dry_run: Path | None, licence: str | None, private: bool) -> None:
    from obr.export.hub import push

    print(push(checkpoint, repo, dry_run, licence, private))


def export(checkpoint: Path, form: str, out: Path, weights_only: bool) -> None:
    from obr.export.dispatch import export

    print(export(checkpoint, form, out, weights_only))


def verify(
    checkpoint: Path,
    recompute: int,
    model: Path | None,
    rotation: Path | None,
    tokens: Path | None,
    hessians: Path | None,
    gradients: Path | None,
    device: str,
) -> None:
    device, _ = _computing(device, None)
    from obr.checkpoints.verify import verify
    from obr.compression.recompute import TOLERATED, Places, repeat, spell

    problems = verify(checkpoint)
    if recompute and not problems:
        for layer in repeat(checkpoint, recompute, Places(model, rotation, tokens, hessians, gradients), device):
            print(spell(layer))
            if layer.differing > TOLERATED:
                problems.append(f"{spell(layer)}, more than rounding explains on one kind of processor.")
    for problem in problems:
        print(printable(problem))
    if problems:
        raise ObrError(f"{checkpoint} is not what its manifest says in {len(problems)} points, told above.")
    print(f"{checkpoint} is what its manifest says.")


def plan(
    targets: list[str],
    snakefile: Path,
    configfile: list[Path],
    config: list[str],
    cores: int | None,
    gpus: int,
    bandwidth: float,
    json: Path | None,
) -> None:
    from obr.planning.plan import as_json, make, overrides_of, spell
    from obr.runtime.files import write_text

    found = make(
        snakefile, configfile, overrides_of(config), targets, cores or os.cpu_count() or 1, gpus, bandwidth
    )  # fmt: skip
    if json:
        write_text(as_json(found), json)
    print(spell(found), end="")


def errata(published: Path, out: Path | None) -> None:
    from obr.report.errata import markdown
    from obr.runtime.files import write_text

    text = markdown(published)
    if out:
        write_text(text, out)
    else:
        print(text, end="")
