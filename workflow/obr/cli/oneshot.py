"""`obr quantize` and `obr recipes`: the commands that compress a model in one go, and that print recipes."""

import argparse
import sys
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path

from obr.cli.options import threads
from obr.config.methods import MASKS
from obr.config.oneshot_options import DEVICES, OFFERED
from obr.config.recipe_checks import CLIPS, DTYPES, ORDERS

QUANTIZE = "Compress a model in one command: a folder or hub id in, a packed checkpoint out."
RECIPES = "List the recipes of the config, or show all values of one."
EXAMPLE = """\
example:
  obr quantize meta-llama/Llama-2-7b-hf --sparsity 0.5 --bits 4 --out llama-2-7b-obr

The same command resumes an interrupted run at its block. DIR.work keeps the copy of the model, the rotation and the
calibration windows."""


def quantize_options(parser: argparse.ArgumentParser) -> None:
    """The options; each is a field of `OneShot` and a parameter of `obr.quantize`."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLE
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, hub id such as owner/name, or a name of the config's models")
    add("--revision", metavar="COMMIT", help="of a hub repository: main (default), or a commit or tag")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the checkpoint, new or empty")
    add = parser.add_argument_group("compression").add_argument
    add("--method", choices=OFFERED, metavar="NAME", help=f"obr_gptq (default), or one of {', '.join(OFFERED)}")
    add("--bits", type=int, metavar="B", help="bits per weight: 4 (default), 2 to 8, or 16 for pruning alone")
    add("--sparsity", type=float, metavar="S", help="fraction of zeros: 0.5 (default)")
    add("--pattern", metavar="N:M", help="instead of --sparsity: 2:4, 4:8, 8:16, 'paired 4:8'")
    add("--group", type=int, metavar="G", help="columns that share a scale, such as 128; not for sparsegpt_gptq")
    add("--mask", choices=tuple(MASKS), metavar="NAME", help=f"wanda (default), or one of {', '.join(MASKS)}")
    add(
        "--alpha",
        type=float,
        metavar="A",
        help="fraction of columns that OBR rounds first and compensates in the others: 0.5 (default)",
    )
    add("--column-order", choices=ORDERS, help="order of quantisation: given (default), or by the Hessian's diagonal")
    add(
        "--damp",
        type=float,
        metavar="D",
        help="damping, relative to the mean diagonal: 0.01 (default)",
    )
    add(
        "--clip",
        choices=CLIPS,
        help="range of a row: searched (mse, default; hessian), not clipped (minmax), learned with the rotation",
    )
    _activations_and_data(parser)
    _recipe_and_run(parser)


def _activations_and_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("activations (simulated)").add_argument
    add(
        "--activations",
        metavar="SCHEME",
        help="a scheme of the config, such as a4kv4; the next two options change it",
    )
    add("--activation-bits", type=int, metavar="B", help="bits of the inputs of linear layers: 16 (default)")
    add("--kv-bits", type=int, metavar="B", help="bits of keys and values: 16 (default)")
    add = parser.add_argument_group("rotation").add_argument
    add("--rotation", metavar="NAME", help="quarot (default), none, FILE.safetensors or a rotation of the config")
    add("--seed", type=int, metavar="N", help="seed of rotation, calibration windows and random masks: 0 (default)")
    add = parser.add_argument_group("calibration").add_argument
    add(
        "--calibration", metavar="TEXT",
        help="FILE.txt, or a name of the config's calibrations or texts: wikitext2 (default, from the hub)",
    )  # fmt: skip
    add("--samples", type=int, metavar="N", help="number of windows: 128 (default)")
    add("--seqlen", type=int, metavar="T", help="tokens per window: 2048 (default)")
    add(
        "--hessian",
        choices=("sequential", "cached"),
        help="inputs from the compressed blocks before (sequential, default) or from the original model (cached)",
    )


def _recipe_and_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("recipe").add_argument
    add("--recipe", metavar="NAME", help="FILE.yaml or a recipe of the config; the options above change it")
    add("--configfile", type=Path, nargs="+", default=(), metavar="FILE", help="config files; default: config.yaml")
    add("--print-recipe", action="store_true", help="print the recipe with the origin of each value, and stop")
    add("--dry-run", action="store_true", help="print the steps, and stop")
    add = parser.add_argument_group("run").add_argument
    add(
        "--evaluate",
        metavar="TEXT",
        help="perplexity before and after: FILE.txt, or a name of the config's perplexity or texts",
    )
    add("--device", default="auto", choices=DEVICES, help="auto (default): a GPU if one is visible")
    add(
        "--dtype",
        choices=DTYPES,
        help="dtype of the computation; default: float32 on a CPU, the model's on a GPU",
    )
    add(
        "--activations-memory",
        type=float,
        default=4096,
        metavar="MB",
        help="memory for hidden states between blocks, the rest is in a temporary file: 4096 (default)",
    )
    add("--threads", type=threads, default=None, metavar="N", help="CPU threads; default: all")
    add("--overwrite", action="store_true", help="replace an earlier checkpoint, or unfinished blocks of another run")


def quantize(args: Namespace) -> None:
    """Compress one model and print a summary of the result."""
    from obr.config.oneshot_job import resolve
    from obr.config.oneshot_options import OneShot
    from obr.runtime.gpu import claim, device_of

    values = {field.name: getattr(args, field.name) for field in fields(OneShot)}
    options = OneShot(**values | {"device": device_of(args.device)})
    job = resolve(options)
    if args.print_recipe:
        print("\n".join(job.origins.lines(replace(job.recipe, **job.named))))
        return
    print("\n".join(job.lines()), file=sys.stdout if args.dry_run else sys.stderr, flush=True)
    if args.dry_run:
        print("dry run: nothing was done.")
        return
    claim(options.device)
    from obr.compression.oneshot import run

    print("\n".join(run(job).lines()))


def recipes_options(parser: argparse.ArgumentParser) -> None:
    """The options of `obr recipes`."""
    commands = parser.add_subparsers(required=True, metavar="list|show", dest="what")
    shown = commands.add_parser("show", help="all values of a recipe and their origins")
    shown.add_argument("name", metavar="NAME", help="name of the recipe")
    shown.add_argument("--activations", metavar="SCHEME", help="with this activation scheme of the config")
    for command in (commands.add_parser("list", help="all recipes, one per line"), shown):
        command.add_argument(
            "--configfile", type=Path, nargs="+", default=(), metavar="FILE",
            help="config files, merged in their order; default: config.yaml",
        )  # fmt: skip


def recipes(args: Namespace) -> None:
    """List the recipes of a config, or show one."""
    from obr.config.config_files import load_config
    from obr.config.recipe_origins import Origins, config_entry, listing, referred

    config = load_config(args.configfile)
    if args.what == "list":
        print("\n".join(listing(config)))
        return
    where = " and ".join(map(str, args.configfile)) or "config.yaml"
    entry, named = config_entry(config, args.name, where, args.activations)
    recipe = config.evaluated(args.name, args.activations) if args.activations else config.parsed[args.name]
    print("\n".join([*Origins(entry, named).lines(recipe), *referred(config, recipe)]))
