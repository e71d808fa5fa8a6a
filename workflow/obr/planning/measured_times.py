"""Timings of finished jobs, as Snakemake's benchmark files keep them, beside the work that each job was."""

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from safetensors import safe_open

from obr.config import paths
from obr.config.recipe import Option, Recipe
from obr.errors import BROKEN_FILE, ObrError
from obr.planning import cost_model, tensor_sizes
from obr.report.table_rows import read_artefact

PLACE = ("model", "rotation", "calibration")


@dataclass(frozen=True)
class Timing:
    """One finished job: its stage (with the method, for compressions), seconds and peak memory in GB."""

    stage: str
    device: str
    work: cost_model.Work
    seconds: float
    memory: float


def stage_of(rule: str, recipe: Recipe | None) -> str:
    """What timings are compared by: the rule, and for compressions the method too, or that layers have their own."""
    if rule != "compress" or recipe is None:
        return rule
    return f"{rule} {'allocated' if recipe.allocation else recipe.method}"


def found_under(results: Path) -> list[Timing]:
    """All timings of a results folder whose artefacts still tell what was done; others are passed over."""
    folder = Path(results) / "benchmarks"
    timings = []
    for path in sorted(folder.glob("*/**/*.tsv")):
        try:
            timing = _timing(Path(results), *path.relative_to(folder).with_suffix("").parts)
        except (ObrError, *BROKEN_FILE):
            continue
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                if timing and row.get("s"):
                    timings.append(Timing(*timing, float(row["s"]), float(row["max_rss"] or 0) / 1000))
    return timings


def _timing(results: Path, rule: str, *names: str) -> tuple[str, str, cost_model.Work] | None:
    """(stage, device, work) of the job whose benchmark is called so; None for stages that are priced flat."""
    if rule not in ("compress", "evaluate", "gradients", "hessian", "sensitivity"):
        return None
    sizes = tensor_sizes.sizes_in(paths.folder(results, "model", model=names[0]))
    if sizes is None:
        return None

    def place(artefact: str, *wildcards: str) -> Path:
        return paths.path(results, artefact, **dict(zip(wildcards, names, strict=True)))

    if rule == "compress":
        manifest = read_artefact(place("manifest", "model", "recipe"))
        recipe, calibration = Recipe.parse(manifest["recipe"]), manifest["calibration"] or {"tokens": 0, "seqlen": 1}
        work = cost_model.compress(sizes, recipe, calibration["tokens"], calibration["seqlen"])
        return stage_of(rule, recipe), manifest["device"], work
    if rule == "gradients":
        with safe_open(place("gradients", *PLACE), framework="numpy") as file:
            notes = json.loads(file.metadata()["gradients"])
        return rule, notes["device"], cost_model.gradients(sizes, notes["tokens"], notes["seqlen"])
    if rule == "sensitivity":
        losses = read_artefact(place("sensitivity", *PLACE, "options"))
        options = [Option.parse(option, "option") for option in losses["options"]]
        blocks = len({layer["block"] for layer in losses["layers"]})
        return rule, losses["device"], cost_model.sensitivity(replace(sizes, blocks=blocks), options)
    if rule == "evaluate":
        made = read_artefact(place("evaluation", "model", "recipe", "activations"))
        scores = [(*label.split(".", 1),) for label in made["computed"]]  # the last job may have kept others
        texts = [made[kind][name] for kind, name in scores if kind == "perplexity"]
        tasks = [(name, made[kind][name]) for kind, name in scores if kind == "zero_shot"]
        work = cost_model.evaluation(
            sizes, [(text["tokens"], text["seqlen"]) for text in texts],
            [(name, task["n"], task["batch_tokens"]) for name, task in tasks],
        )  # fmt: skip
        return rule, made["device"], work
    made = read_artefact(place("hessians", *PLACE))
    calibration = made["calibration"]
    return rule, made.get("device", "cpu"), cost_model.hessian(sizes, calibration["tokens"], calibration["seqlen"])


def factors(timings: list[Timing], device: str, threads: dict[str, int]) -> dict[str, float]:
    """Measured over expected seconds by stage: the median over the jobs of this device.

    threads: of each rule. Stages never timed on the device are not there.
    """
    ratios = defaultdict(list)
    for timing in _of(timings, device):
        expected = timing.work.seconds(cost_model.SPEEDS[device], threads.get(timing.stage.split()[0], 1))
        ratios[timing.stage].append(timing.seconds / expected)
    return {stage: median(values) for stage, values in ratios.items()}


def _of(timings: list[Timing], device: str) -> Iterator[Timing]:
    return (timing for timing in timings if timing.device.split(":")[0] == device)
