"""The arguments that stages take on the command line: shared ones by name, and those of the stages with their own."""

import argparse
import math
from pathlib import Path

from obr.cli.stage_settings import check_settings
from obr.config.recipe_settings import parse_settings
from obr.errors import ObrError

EXPORT = "Write a compressed model in a layout that other programs read."


def export_options(parser: argparse.ArgumentParser) -> None:
    """The options of `obr export`."""
    parser.add_argument("checkpoint", type=Path, help="folder of a packed checkpoint")
    parser.add_argument(
        "--format", required=True, dest="form", choices=("compressed-tensors", "gguf"),
        help="compressed-tensors: folder for transformers and vLLM; gguf: file for llama.cpp",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder or file to write")
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="leave the quantisation of activations and KV cache out of the config",
    )


ERRATA = "List inconsistencies of the published tables."
PUBLISHED = Path(__file__).parents[2] / "published" / "results.csv"


def errata_options(parser: argparse.ArgumentParser) -> None:
    """The options of `obr errata`."""
    parser.add_argument(
        "--published",
        type=Path,
        default=PUBLISHED,
        help="CSV file of published numbers; default: that of the project",
    )
    parser.add_argument("--out", type=Path, default=None, help="Markdown file to write; default: print the list")


VERIFY = "Check a compressed model: hashes, masks, integer ranges, manifest; with --recompute, some layers again."


def verify_options(parser: argparse.ArgumentParser) -> None:
    """The options of `obr verify`."""
    parser.add_argument("checkpoint", type=Path, help="folder of a packed checkpoint")
    parser.add_argument(
        "--recompute",
        type=int,
        default=0,
        metavar="N",
        help="number of layers to compress again and compare; default: 0",
    )
    for name in ("model", "rotation", "tokens", "hessians", "gradients"):
        where = f"{name} of the checkpoint, for --recompute; default: the path in the workflow's results"
        parser.add_argument(f"--{name}", type=Path, default=None, metavar="PATH", help=where)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    _trust(parser, False)


PUSH = "Publish a compressed model on the hub, with a model card."


def push_options(parser: argparse.ArgumentParser) -> None:
    """The options of `obr push`."""
    parser.add_argument("checkpoint", type=Path, help="folder of a packed checkpoint")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the hub")
    parser.add_argument(
        "--dry-run",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="write the repository to a folder, without an upload",
    )
    parser.add_argument(
        "--licence", default=None, help="licence of the base model, if the checkpoint does not record it"
    )
    parser.add_argument("--private", action="store_true", help="create a private repository")


PLAN = "Estimate a run before it starts: jobs, hours, memory, disk, downloads, licences."


CHECK = "List what would stop a run later: files, licences, memory, disk, packages."


def check_options(parser: argparse.ArgumentParser) -> None:
    """The options of `obr check`."""
    _run_options(parser)
    parser.add_argument(
        "--gpu-memory",
        type=float,
        default=None,
        metavar="GB",
        help="memory of each GPU; default: that of this machine's GPUs",
    )
    parser.add_argument("--offline", action="store_true", help="skip the checks of the hub")


def plan_options(parser: argparse.ArgumentParser) -> None:
    """The options of `obr plan`."""
    _run_options(parser)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs; default: 1")
    parser.add_argument(
        "--gpu-memory", type=float, default=None, metavar="GB", help="list the jobs that need more memory of a GPU"
    )
    parser.add_argument("--bandwidth", type=float, default=20.0, metavar="MB", help="download MB/s; default: 20")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the plan as JSON")


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", nargs="*", help="files or rules; default: all")
    parser.add_argument(
        "--snakefile", type=Path, default=Path("Snakefile"), metavar="FILE", help="default: Snakefile"
    )
    parser.add_argument("--configfile", type=Path, nargs="+", default=[], metavar="FILE", help="as Snakemake's")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="as Snakemake's")
    parser.add_argument("--cores", type=int, default=None, metavar="N", help="CPU cores; default: all")


def threads(text: str) -> int:
    """A number of CPU threads. Raises ArgumentTypeError for anything else."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def _megabytes(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of MB from 0 on")
    return value


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
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu (default), or cuda")
    parser.add_argument(
        "--dtype", default=None, choices=("float32", "bfloat16", "float16"),
        help="dtype of the computation, in place of the recipe's; default: the recipe's, else float32 on a CPU "
        "and the model's own on a GPU",
    )  # fmt: skip
    parser.add_argument("--threads", type=threads, default=None, metavar="N", help="CPU threads; default: all")


def _windows(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--windows", type=Path, nargs="+", required=required, metavar="FILE", help="files of calibration windows"
    )


def _sizes(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--sizes-only", action="store_true", help="count the bytes of weights that a GPU reads, without runs"
    )


def _trust(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code of the model repository"
    )


def _activations(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--activations-memory", type=_megabytes, default=4096, metavar="MB",
        help="memory for hidden states, the rest is in a temporary file; default: 4096",
    )  # fmt: skip


def _rerun(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--rerun", action="store_true",
        help="replace an earlier result whose declared outputs Snakemake has removed",
    )  # fmt: skip


OPTIONS = {
    "settings": _settings("--settings", "settings of the stage, listed below"),
    "patterns": _patterns,
    "recipe": _settings("--recipe", "recipe with the activation settings; default: that of the checkpoint"),
    "weights": _settings("--recipe", "recipe of the weights, such as method=obr_gptq bits=4"),
    "name": lambda parser, required: parser.add_argument("name", metavar="NAME", help="name of the table or figure"),
    "config": _path("config", "YAML or JSON file with the table or figure, and with its recipes and models"),
    "model": _path("model", "folder of a downloaded model"),
    "text": _path("text", "text file"),
    "released": _path("released", "folder of a downloaded checkpoint that others made"),
    "task": _path("task", "folder of a downloaded task"),
    "rotation": _path("rotation", "rotation file; default: no rotation"),
    "tokens": _path("tokens", "file of calibration windows"),
    "windows": _windows,
    "hessians": _path("hessians", "folder of cached Hessians"),
    "gradients": _path("gradients", "file of output gradients"),
    "sensitivity": _path("sensitivity", "file of predicted losses of layers and options"),
    "allocation": _path("allocation", "file of a recipe's allocation"),
    "checkpoint": _path("checkpoint", "folder of a packed checkpoint"),
    "results": _path("results", "folder of the results"),
    "published": _path("published", "CSV file of published numbers"),
    "out": _path("out", "output file or folder"),
    "activations": _activations,
    "compute": _compute,
    "rerun": _rerun,
    "sizes": _sizes,
    "trust": _trust,
}
