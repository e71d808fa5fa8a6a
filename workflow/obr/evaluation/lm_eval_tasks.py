"""lm-eval's packaged tasks: their YAML configurations, read without lm-eval's own index of 14,000 tasks."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from obr.errors import ObrError

METRICS = ("acc", "acc_norm")
# What a task asks of a model: the likeliest of several answers, or one answer, right if greedy decoding gives it.
OUTPUT_TYPES = ("multiple_choice", "loglikelihood")


class Function(str):
    """The dotted name behind a YAML `!function`, kept as a name: paths into an installation do not travel."""


def packaged_task(task: str) -> dict:
    """lm-eval's configuration of a task, includes merged, functions as dotted names.

    Of its metrics only acc and acc_norm are kept. Raises ObrError for an unknown task, for an output type other than
    those of OUTPUT_TYPES, and for a task that is not scored by accuracy on a test or validation split.
    """
    import lm_eval

    root = Path(lm_eval.__file__).parent / "tasks"
    file = _packaged_files(root).get(task)
    if file is None:
        raise ObrError(f"lm-eval {lm_eval.__version__} has no task named {task!r}: see `lm-eval ls tasks`.")
    config = _read_yaml(file, root)
    kind = config.get("output_type", "generate_until")
    check_output_type(task, kind)
    kept = METRICS if kind == "multiple_choice" else ("acc",)
    config["metric_list"] = [
        m for m in config.get("metric_list", [{"metric": m} for m in kept]) if m["metric"] in kept
    ]
    if not config["metric_list"] or not (config.get("test_split") or config.get("validation_split")):
        raise ObrError(
            f"task {task!r} of lm-eval {lm_eval.__version__} is not scored by accuracy on a test or validation "
            "split: choose another."
        )
    return config


def check_output_type(task: str, kind: str) -> None:
    """Raise ObrError unless tasks of this output type can be scored."""
    if kind not in OUTPUT_TYPES:
        raise ObrError(
            f"task {task!r} has output type {kind}: choose a task of output type {' or '.join(OUTPUT_TYPES)}."
        )


@cache
def _packaged_files(root: Path) -> dict[str, Path]:
    # By the line that names the task: parsing all 14,000 files as YAML takes lm-eval's own index 13 s.
    named = re.compile(r"^[\"']?task[\"']? *: *[\"']?([^\s\"']+)", re.MULTILINE)
    files: dict[str, Path] = {}
    for file in sorted(root.rglob("*.yaml")):
        if match := named.search(file.read_text(encoding="utf-8")):
            files.setdefault(match[1], file)  # the first wins, as in lm-eval's index
    return files


def _read_yaml(file: Path, root: Path) -> dict:
    import yaml

    def dotted(loader: Any, node: Any) -> Function:
        module, _, name = loader.construct_scalar(node).rpartition(".")
        beside = file.parent / (module.replace(".", "/") + ".py")
        if beside.is_file():
            module = ".".join(("lm_eval", "tasks", *beside.relative_to(root).with_suffix("").parts))
        return Function(f"{module}.{name}")

    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", dotted)
    config = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)
    included = config.pop("include", [])
    merged: dict = {}
    for name in [included] if isinstance(included, str) else included:
        merged |= _read_yaml(file.parent / name, root)
    return merged | config


def yaml_dumper() -> Any:
    """The class of a YAML dumper that writes a `Function` as lm-eval reads it."""
    import yaml

    dumper = type("Dumper", (yaml.SafeDumper,), {})
    dumper.add_representer(Function, lambda self, name: self.represent_scalar("!function", str(name)))
    return dumper
