"""One score of a checkpoint, as `obr evaluate` computes it."""

import tempfile
from pathlib import Path

from obr.evaluation.stage import Wanted, evaluate_stage


def text_score(checkpoint: Path, text: Path, spec: dict, **options) -> dict:
    """Of a checkpoint on a text file. spec: of `Wanted`. options: of `evaluate_stage`."""
    return _score(checkpoint, Wanted("perplexity", "text", text, spec), options)


def task_score(checkpoint: Path, task: Path, spec: dict, **options) -> dict:
    """Of a checkpoint on a task folder, likewise."""
    return _score(checkpoint, Wanted("zero_shot", "task", task, spec), options)


def _score(checkpoint: Path, wanted: Wanted, options: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return evaluate_stage(checkpoint, [wanted], Path(folder, "scores.json"), **options)[wanted.kind][wanted.name]
