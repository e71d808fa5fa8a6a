"""`obr evaluate`: perplexity on texts and accuracy on tasks, of a checkpoint or of a model as it came."""

import argparse
import json
from argparse import Namespace
from pathlib import Path

from obr.cli.options import OPTIONS
from obr.errors import ObrError

EVALUATE = "Evaluate a model: perplexity on texts and accuracy on tasks, in one pass over its blocks."
EXAMPLE = """\
examples:
  obr evaluate llama-2-7b-obr --texts wikitext2 --tasks piqa arc_easy
  obr evaluate llama-2-7b-obr --texts notes.txt --seqlen 1024 --activations a4kv4
  obr evaluate llama-2-7b-obr --task piqa rows.jsonl limit=100

One file keeps all scores. A later command computes only the texts and tasks that the file lacks. The same command
resumes an interrupted evaluation near its block."""


def evaluate_options(parser: argparse.ArgumentParser) -> None:
    """The options of `obr evaluate`."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLE
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="DIR", help="folder of a packed checkpoint, or of a model in safetensors")
    add("--out", type=Path, metavar="FILE", help="JSON file of the scores; default: DIR.scores.json")
    add = parser.add_argument_group("data").add_argument
    add("--texts", nargs="+", default=[], metavar="NAME", help="FILE.txt, or texts of the config such as wikitext2")
    add("--tasks", nargs="+", default=[], metavar="NAME", help="tasks of the config or of lm-eval, such as piqa")
    add(
        "--text", nargs="+", action="append", default=[], metavar=("NAME FILE", "KEY=VALUE"),
        help="one text file with its own settings, such as seqlen=2048 tokens=30720 bos=window",
    )  # fmt: skip
    add(
        "--task", nargs="+", action="append", default=[], metavar=("NAME PATH", "KEY=VALUE"),
        help="one task, from a task folder or a JSON-lines file, with its own settings, such as limit=100 bos=true",
    )  # fmt: skip
    add = parser.add_argument_group("settings").add_argument
    add(
        "--activations", metavar="SCHEME",
        help="activation scheme of the config, such as a4kv4, in place of the checkpoint's own",
    )  # fmt: skip
    add("--seqlen", type=int, metavar="T", help="tokens per window of --texts: 2048, or the config's")
    add("--tokens", type=int, metavar="N", help="tokens of each of --texts: all, or the config's")
    add("--limit", type=int, metavar="N", help="number of examples of each of --tasks: all, or the config's")
    add("--configfile", type=Path, nargs="+", default=(), metavar="FILE", help="config files; default: config.yaml")
    add("--packed", action="store_true", help="multiply packed weights instead of unpacked ones (fewer bytes)")
    add("--code", default=None, help="hash of the code, set by the workflow; scores of other code are recomputed")
    for name in ("recipe", "activations", "compute", "trust"):
        OPTIONS[name](parser, False)


def evaluate(args: Namespace) -> None:
    """Compute the scores that are asked for, print and write them."""
    from obr.runtime.gpu import claim

    device = claim(args.device)
    import torch

    from obr.evaluation.stage import evaluate_stage
    from obr.models.hidden_states import MemoryBudget

    out = args.out or args.checkpoint.absolute().with_name(f"{args.checkpoint.absolute().name}.scores.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    wanted = _wanted(args, out)
    if not wanted:
        raise ObrError("nothing to evaluate on; give --texts or --tasks.")
    found = evaluate_stage(
        args.checkpoint, wanted, out,
        recipe=_recipe(args), device=device, code=args.code, packed=args.packed,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        room=MemoryBudget(args.activations_memory, out.parent),
    )  # fmt: skip
    print("\n".join(line for one in wanted for line in _lines(one.name, found[one.kind][one.name])))
    print(f"scores: {out}")


def _recipe(args: Namespace):
    """The recipe with the activation settings that the command names; None for the checkpoint's own."""
    from obr.checkpoints.files import read_manifest
    from obr.config.config_files import load_config
    from obr.config.recipe import Recipe
    from obr.config.schemes import under_scheme

    if args.recipe and args.activations:
        raise ObrError("--recipe and --activations are both given; leave one of them out.")
    if args.activations:
        own = read_manifest(args.checkpoint)["recipe"]
        return Recipe.parse(under_scheme(own, load_config(args.configfile).raw, args.activations, "--activations"))
    return Recipe.parse(args.recipe) if args.recipe else None


def _wanted(args: Namespace, out: Path) -> list:
    """The texts and tasks that the command names."""
    from obr.config.config_files import load_config
    from obr.evaluation.sources import TASK_SETTINGS, TEXT_SETTINGS, Sources
    from obr.evaluation.stage import Wanted

    for name in ("seqlen", "tokens", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ObrError(f"--{name} is {value}; it must be a whole number from 1 on.")
    texts = {key: value for key in ("seqlen", "tokens") if (value := getattr(args, key)) is not None}
    tasks = {} if args.limit is None else {"limit": args.limit}
    found = []
    rows = any(Path(given[1]).is_file() for given in args.task if len(given) > 1)
    sources = None
    if args.texts or args.tasks or rows:
        sources = Sources(out.with_name(f"{out.name}.work"), load_config(args.configfile))
        found += [sources.text(name, texts) for name in args.texts]
        found += [sources.task(name, tasks) for name in args.tasks]
    for given in args.text:
        name, place, spec = _given(given, "--text", TEXT_SETTINGS)
        found.append(Wanted("perplexity", name, place, {"seqlen": 2048, **spec}))
    for given in args.task:
        name, place, spec = _given(given, "--task", TASK_SETTINGS)
        one = sources.task(name, spec, place) if place.is_file() else Wanted("zero_shot", name, place, spec)
        found.append(one)
    return found


def _given(values: list[str], flag: str, known: tuple[str, ...]) -> tuple[str, Path, dict]:
    """(name, place, settings) of NAME PLACE [KEY=VALUE ...]."""
    if len(values) < 2:
        raise ObrError(f"{flag} {' '.join(values)} names no file; write {flag} NAME FILE.")
    spec = {}
    for setting in values[2:]:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise ObrError(f"{flag} {values[0]}: {setting!r} is no setting; the settings are {', '.join(known)}.")
        if key in spec:
            raise ObrError(f"{flag} {values[0]}: {key} is given twice; leave one of them out.")
        try:
            spec[key] = json.loads(value)
        except ValueError:
            spec[key] = value
        if key != "bos" and not (type(spec[key]) is int and spec[key] > 0):
            raise ObrError(f"{flag} {values[0]}: {setting} is not a whole number from 1 on; correct it.")
    return values[0], Path(values[1]), spec


def _lines(name: str, score: dict) -> list[str]:
    """A score in words, and its note."""
    if "definition" in score:
        value = score["status"] if score["value"] is None else f"{score['value']:.4f}"
        line = f"{name}: perplexity {value}: {score['definition']}; {score['windows']} windows"
    else:
        spread = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
        line = f"{name}: {score['metric']} {score['value']:.4f}{spread}, {score['n']} rows, {score['prompts']}"
    return [line, *([f"  {score['note']}."] if "note" in score else [])]
