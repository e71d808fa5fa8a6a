"""The arguments that stages take on the command line: shared ones by name, and those of the stages with their own."""

import argparse
from pathlib import Path

from obr.cli.stage_settings import check_settings
from obr.config.recipe_settings import parse_settings
from obr.errors import ObrError

EXPORT = "Write a compressed model in a layout that other programs read."


def export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder of a packed checkpoint")
    parser.add_argument(
        "--format", required=True, dest="form", choices=("compressed-tensors", "gguf"),
        help="a folder for transformers and vLLM, or a file for llama.cpp",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder or file to write")
    parser.add_argument(
        "--weights-only", action="store_true", help="leave out that activations and KV cache are quantised"
    )


ERRATA = "List what is odd in the published tables."
PUBLISHED = Path(__file__).parents[2] / "published" / "results.csv"


def errata_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--published", type=Path, default=PUBLISHED, help="the printed numbers; default: the project's"
    )
    parser.add_argument("--out", type=Path, default=None, help="Markdown file to write; default: print the list")


VERIFY = "Check a compressed model: hashes, masks, levels, manifest, and layers by making them again."


def verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder of a packed checkpoint")
    parser.add_argument("--recompute", type=int, default=0, metavar="N", help="so many layers; default: 0")
    for name in ("model", "rotation", "tokens", "hessians", "gradients"):
        where = f"for --recompute, the checkpoint's {name}; default: where the workflow puts it"
        parser.add_argument(f"--{name}", type=Path, default=None, help=where)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    _trust(parser, False)


PUSH = "Publish a compressed model on the hub, with a model card."


def push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder of a packed checkpoint")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the hub")
    parser.add_argument("--dry-run", type=Path, default=None, metavar="FOLDER", help="write it there, upload nothing")
    parser.add_argument("--licence", default=None, help="of the base model, where the checkpoint does not record it")
    parser.add_argument("--private", action="store_true", help="not to be seen by others")


PLAN = "Price a run before it starts: jobs, hours, memory, disk, downloads, licences."


CHECK = "List what would stop a run later: files, licences, memory, disk, packages."


def check_options(parser: argparse.ArgumentParser) -> None:
    _run_options(parser)
    parser.add_argument(
        "--gpu-memory", type=float, default=None, metavar="GB", help="of the GPUs to be used; default: this machine's"
    )
    parser.add_argument("--offline", action="store_true", help="ask the hub for nothing")


def plan_options(parser: argparse.ArgumentParser) -> None:
    _run_options(parser)
    parser.add_argument("--gpus", type=int, default=1, help="jobs on GPUs at a time; default: 1")
    parser.add_argument("--bandwidth", type=float, default=20.0, help="of downloads, MB/s; default: 20")
    parser.add_argument("--json", type=Path, default=None, help="write the plan there, too")


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", nargs="*", help="files or rules; default: everything")
    parser.add_argument("--snakefile", type=Path, default=Path("Snakefile"))
    parser.add_argument("--configfile", type=Path, nargs="+", default=[], help="as Snakemake's")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="as Snakemake's")
    parser.add_argument("--cores", type=int, default=None, help="default: all of this machine")


def _path(name: str, text: str):
    return lambda p, required: p.add_argument(f"--{name}", type=Path, required=required, help=text)


def _settings(flag: str, text: str):
    """An option whose value is an entry of the config, given as settings or as one JSON object."""
    return lambda p, required: p.add_argument(
        flag, nargs="+", action=_Settings, required=required, metavar="KEY=VALUE", help=text
    )


class _Settings(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            entry = parse_settings(values)
            if option_string == "--settings":  # a recipe is checked where it is parsed
                check_settings(parser.prog.split()[-1], entry)
            setattr(namespace, self.dest, entry)
        except ObrError as error:
            parser.error(f"argument {option_string}: {error}")


def _patterns(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--patterns", nargs="+", default={}, action=_Patterns, metavar="RECIPE=N:M", help="pattern of each recipe"
    )


class _Patterns(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        split = [value.rpartition("=") for value in values]
        if not all(recipe for recipe, _, _ in split):
            parser.error(f"argument {option_string}: write RECIPE=N:M for each recipe.")
        setattr(namespace, self.dest, {recipe: pattern for recipe, _, pattern in split})


def _compute(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtype", default=None, choices=("float32", "bfloat16", "float16"),
        help="of the computation; wins over the recipe's; default: the recipe's, else float32 on a CPU and the "
        "model's own on a GPU",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: all")


def _windows(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--windows", type=Path, nargs="+", required=required, help="files of calibration windows")


def _sizes(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--sizes-only", action="store_true", help="count the bytes of weights as a GPU reads them, and run nothing"
    )


def _trust(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that was downloaded with the model, unaltered"
    )


def _activations(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--activations-memory", type=float, default=4096, metavar="MB",
        help="memory for hidden states; more of them lie in a file beside the output (default: 4096)",
    )  # fmt: skip


def _rerun(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--rerun", action="store_true",
        help="also replace what is left of an earlier result, from which Snakemake has removed the declared outputs",
    )  # fmt: skip


OPTIONS = {
    "settings": _settings("--settings", "settings of the stage, listed below"),
    "patterns": _patterns,
    "recipe": _settings("--recipe", "recipe whose activation settings apply; default: the checkpoint's"),
    "weights": _settings("--recipe", "recipe of the weights, such as method=obr_gptq bits=4"),
    "name": lambda parser, required: parser.add_argument("name", metavar="NAME", help="of the table or figure"),
    "config": _path("config", "YAML or JSON file with the table or figure and the recipes and models that it names"),
    "model": _path("model", "folder of a downloaded model"),
    "text": _path("text", "text file"),
    "released": _path("released", "folder of a downloaded checkpoint of the authors"),
    "task": _path("task", "folder of a downloaded task"),
    "rotation": _path("rotation", "rotation file; without it the model is not rotated"),
    "tokens": _path("tokens", "file of calibration windows"),
    "windows": _windows,
    "hessians": _path("hessians", "folder of cached Hessians"),
    "gradients": _path("gradients", "file of output gradients"),
    "sensitivity": _path("sensitivity", "file of the losses that layers are predicted to cost"),
    "allocation": _path("allocation", "file of a recipe's allocation"),
    "checkpoint": _path("checkpoint", "folder of a packed checkpoint"),
    "results": _path("results", "folder of the results"),
    "published": _path("published", "CSV file of published numbers"),
    "out": _path("out", "what to write"),
    "activations": _activations,
    "compute": _compute,
    "rerun": _rerun,
    "sizes": _sizes,
    "trust": _trust,
}
