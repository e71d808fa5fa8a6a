"""Rows of zero-shot tasks from their three sources: the hub, a local file, or questions made from a text."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from obr.errors import ObrError, first_line
from obr.evaluation.cloze import cloze
from obr.evaluation.lm_eval_tasks import METRICS, packaged_task
from obr.runtime import hub
from obr.runtime.files import parse_object, sha256_of


class Found(NamedTuple):
    """rows, and examples in the prompt (None without any); revision: of the hub; config: lm-eval's, of the task."""

    rows: list[dict]
    examples: list[dict] | None
    revision: str | None
    config: dict


def rows_of(source: dict, text: Path | None) -> Found:
    """The rows of a task. text: of a source `cloze`. Raises ObrError if they cannot be had."""
    kind = source.get("source")
    if kind == "hub":
        return _hub_rows(source)
    if kind == "path":
        return _file_rows(source)
    if kind == "cloze":
        return _cloze_rows(source, text)
    raise ObrError(f"task source {kind!r} is unknown: use hub, path or cloze.")


def _hub_rows(source: dict) -> Found:
    config = packaged_task(source["task"])
    repo, split = config["dataset_path"], config.get("test_split") or config.get("validation_split")
    # The commit, so that task.json names the very rows even where the config asks for a branch.
    commit = hub.hub_info(repo, source.get("revision"), "dataset").sha
    rows = _hub_split(config, split, commit, source)
    examples = _hub_split(config, _examples_split(config, split), commit, source) if _shots(source, config) else None
    return Found(rows, examples, commit, config)


def _hub_split(config: dict, split: str, commit: str, source: dict) -> list[dict]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    repo, name = config["dataset_path"], config.get("dataset_name")
    try:
        rows = load_dataset(
            repo, name, revision=commit, split=split, **(config.get("dataset_kwargs") or {})
        ).to_list()
    except (ValueError, RuntimeError, DatasetsError) as error:
        raise ObrError(
            f"the {split} split of datasets/{repo} at {commit} cannot be loaded ({first_line(error)}): "
            "name another revision, or use `source: path` with a local copy."
        ) from error
    except hub.hub_exceptions() as error:
        raise hub.hub_error(error, f"datasets/{repo}", source.get("revision")) from error
    return rows


def _examples_split(config: dict, scored: str) -> str:
    """The split that lm-eval takes examples from. Raises ObrError if that is the one that is scored."""
    own = (config.get("fewshot_config") or {}).get("split") or config.get("fewshot_split")
    for split in (own, config.get("training_split"), config.get("validation_split")):
        if split and split != scored:
            return split
    raise ObrError(
        f"task {config['task']!r} has no split for examples besides {scored}, which is scored: leave num_fewshot out."
    )


def _shots(source: dict, config: dict) -> int:
    """How many examples a prompt has. config: lm-eval's, of the task. Raises ObrError if that cannot be."""
    shots, task = source.get("num_fewshot", 0), source["task"]
    if type(shots) is not int or shots < 0:
        raise ObrError(f"num_fewshot {shots!r} of task {task} is no number of examples: correct it.")
    if shots and (config.get("fewshot_config") or {}).get("samples"):
        raise ObrError(f"task {task} has examples in lm-eval's own code, not in a split: leave num_fewshot out.")
    return shots


def _file_rows(source: dict) -> Found:
    task = source["task"]
    config, rows, examples = packaged_task(task), list(parse_lines(_local(source, "file"))), None
    if shots := _shots(source, config):
        if "examples" not in source:
            raise ObrError(f"task {task} has num_fewshot {shots} but no file of examples: add `examples`.")
        examples = list(parse_lines(_local(source, "examples")))
        _check_apart(task, rows, examples)
    elif "examples" in source:
        raise ObrError(
            f"task {task} has a file of examples but no num_fewshot, so nothing reads it: add num_fewshot."
        )
    return Found(rows, examples, None, config)


def _check_apart(task: str, rows: list[dict], examples: list[dict]) -> None:
    """Raise ObrError if an example is a row that is scored, whose answer it would give away."""
    places = {json.dumps(row, sort_keys=True): number for number, row in enumerate(rows, 1)}
    for number, example in enumerate(examples, 1):
        if place := places.get(json.dumps(example, sort_keys=True)):
            raise ObrError(
                f"example {number} of task {task} is its row {place}, which is scored: give those of another split."
            )


def _local(source: dict, key: str) -> Path:
    """The local file that a source names; `sha256` is that of `file`."""
    task, named = source["task"], source[key]
    file = Path(os.path.expanduser(os.path.expandvars(named)))
    if unset := re.search(r"\$\{?(\w+)", str(file)):
        raise ObrError(
            f"the file {named} of task {task} cannot be found because the environment variable {unset[1]} is "
            "not set: export it, or use another source."
        )
    if not file.is_file():
        raise ObrError(f"the file {file} of task {task} does not exist: correct `{key}` in the config.")
    found = sha256_of(file)
    if key == "file" and source.get("sha256") not in (None, found):
        raise ObrError(f"{file} has sha256 {found}, not {source['sha256']}: get the right file, or correct `sha256`.")
    return file


def _cloze_rows(source: dict, text: Path | None) -> Found:
    from obr.data.tokenize import read_text

    if "num_fewshot" in source:
        raise ObrError("a cloze task has no examples for its prompts: leave num_fewshot out.")
    if text is None or not text.is_file():
        raise ObrError(f"a cloze task is made from a text and {text} is no file: name a text it can use.")
    config = {
        "task": source.get("task", "continuation"),
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS],
        "metadata": {
            "version": 1.0,
            "description": "Which of four passages continues the paragraph? "
            "Made from a text by obr.evaluation.cloze, not a published benchmark.",
        },
    }
    return Found(cloze(read_text(text), source["n"], source["seed"]), None, None, config)


def parse_lines(file: Path) -> Iterator[dict]:
    """The rows of a file of JSON lines. Raises ObrError at a line that is not a JSON object in UTF-8."""
    for number, line in enumerate(file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_object(line.decode("utf-8"))
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
        except UnicodeError as error:
            raise ObrError(f"line {number} of {file} is not UTF-8 ({first_line(error)}): convert it.") from error
        except (ValueError, RecursionError) as error:
            raise ObrError(f"line {number} of {file} is not JSON ({error}): write one row a line.") from error
        if not isinstance(row, dict):
            raise ObrError(f"line {number} of {file} has no named columns: write one JSON object a line.")
        yield row
