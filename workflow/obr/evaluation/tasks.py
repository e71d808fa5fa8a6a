"""Task folders: everything a zero-shot evaluation reads, in one place that can be moved.

A folder holds `data.jsonl` (one row a line, columns as on the hub), `task.yaml` (the task as
lm-eval packages it, its includes merged) and `task.json` (where the rows came from and their
sha256). `lm_eval --include_path . --tasks NAME`, run inside the folder, reads it too.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from obr.errors import ObrError, first_line
from obr.evaluation.cloze import cloze
from obr.evaluation.lm_eval_tasks import METRICS, Function, check_output_type, packaged_task, yaml_dumper
from obr.runtime import hub
from obr.runtime.files import (
    atomic_folder,
    check_folder_replaceable,
    replace_folder,
    sha256_of,
    write_json,
    write_text,
)

# Packaged keys without a meaning here, where there is one split and no examples in the prompt.
DROPPED = ("tag", "group", "include", "fewshot_split", "fewshot_config", "training_split")


FILES = ("data.jsonl", "task.yaml", "task.json")  # of a task folder


def download_task(source: dict, out: Path, text: Path | None = None, rerun: bool = False) -> None:
    """Write the task folder `out` from one of three sources.

    {source: hub, task, revision?}: the split that lm-eval's task of that name is scored on (test
        where it has one, else validation), downloaded from the hub, rows unprocessed;
    {source: path, task, file, sha256?}: the same rows from a local JSON-lines file;
    {source: cloze, task?, n, seed}: `n` multiple-choice questions made from the file `text`, see
        `cloze`; for machines with neither the hub nor task files.

    rerun: an earlier result in `out` may lack task.json, see `runtime.files.check_folder_replaceable`.

    Raises ObrError when the source cannot be read, its rows do not fit the task's prompts, or `out` holds anything
    but an earlier result.
    """
    check_folder_replaceable(out, "a task folder", "task.json", FILES.__contains__, rerun)
    kind = source.get("source")
    if kind == "hub":
        rows, revision, config = _hub_rows(source)
    elif kind == "path":
        rows, revision, config = _file_rows(source)
    elif kind == "cloze":
        rows, revision, config = _cloze_rows(source, text)
    else:
        raise ObrError(f"task source {kind!r} is unknown: use hub, path or cloze.")

    # Snakemake and readers see the folder whole or not at all.
    with atomic_folder(out) as folder:
        _write_folder(folder, rows, config, source, revision)
        _check_rows(folder, config)
        replace_folder(folder, out)


def read_task(task_dir: Path) -> dict:
    """task.json of a task folder, once its data are known to be the ones it was written with.

    Raises ObrError when a file is missing or data.jsonl does not have the recorded sha256.
    """
    try:
        record = json.loads((task_dir / "task.json").read_text(encoding="utf-8"))
        found = sha256_of(task_dir / "data.jsonl")
    except FileNotFoundError as error:
        raise ObrError(
            f"the task folder {task_dir} has no {Path(error.filename).name}: run the stage download_task."
        ) from error
    if found != record["sha256"]:
        raise ObrError(
            f"{task_dir / 'data.jsonl'} has changed (its sha256 is {found}, task.json says "
            f"{record['sha256']}): run the stage download_task again."
        )
    return record


def load_task(task_dir: Path) -> Any:
    """The folder's task as a `lm_eval` Task, its rows in memory.

    Raises as `read_task` does, and ObrError for an output type that is not in OUTPUT_TYPES.
    """
    import yaml
    from lm_eval.tasks import TaskManager

    record = read_task(task_dir)
    # The rows go in through `custom_dataset`: lm-eval's own loader would leave a cache behind, ping the
    # hub and read strings that look like dates as dates.
    override = {
        "include": str((task_dir / "task.yaml").resolve()),
        "custom_dataset": Function("obr.evaluation.tasks.rows_in_memory"),
        "dataset_kwargs": {"file": str((task_dir / "data.jsonl").resolve()), "split": record["split"]},
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "task.yaml").write_text(yaml.dump(override, Dumper=yaml_dumper()), encoding="utf-8")
        # Indexing lm-eval's own 14,000 tasks would take longer than many an evaluation.
        with quiet():
            manager = TaskManager(include_path=folder, include_defaults=False)
            task = manager.load([record["task"]])["tasks"][record["task"]]
    check_output_type(record["task"], task.OUTPUT_TYPE)
    return task


def rows_in_memory(file: str, split: str, **_: Any) -> dict:
    """What lm-eval takes as a dataset: {split: Dataset}. It also passes the task's metadata, unused."""
    from datasets import Dataset

    return {split: Dataset.from_list(list(_parse_lines(Path(file))))}


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back lm-eval's log lines below errors and the bars of data-set loading, then restore both."""
    import datasets
    import lm_eval.evaluator  # noqa: F401  its loggers exist only once it is imported

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


# Sources: each returns the rows, a revision (None where there is none) and the task's lm-eval configuration.


def _hub_rows(source: dict) -> tuple[list[dict], str | None, dict]:
    config = packaged_task(source["task"])
    repo, name = config["dataset_path"], config.get("dataset_name")
    split = config.get("test_split") or config.get("validation_split")
    # The commit, so that task.json names the very rows even where the config asks for a branch.
    commit = hub.hub_info(repo, source.get("revision"), "dataset").sha

    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

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
    return rows, commit, config


def _file_rows(source: dict) -> tuple[list[dict], None, dict]:
    task, named = source["task"], source["file"]
    file = Path(os.path.expanduser(os.path.expandvars(named)))
    if unset := re.search(r"\$\{?(\w+)", str(file)):
        raise ObrError(
            f"the file {named} of task {task} cannot be found because the environment variable {unset[1]} is "
            "not set: export it, or use another source."
        )
    if not file.is_file():
        raise ObrError(f"the file {file} of task {task} does not exist: correct `file` in the config.")
    found = sha256_of(file)
    if source.get("sha256") not in (None, found):
        raise ObrError(f"{file} has sha256 {found}, not {source['sha256']}: get the right file, or correct `sha256`.")
    return list(_parse_lines(file)), None, packaged_task(task)


def _cloze_rows(source: dict, text: Path | None) -> tuple[list[dict], None, dict]:
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
    return cloze(text.read_text(encoding="utf-8"), source["n"], source["seed"]), None, config


# The folder.


def _write_folder(folder: Path, rows: list[dict], config: dict, source: dict, revision: str | None) -> None:
    import lm_eval
    import yaml

    if not rows:
        raise ObrError(f"task {config['task']} has no rows: check its source {source}.")
    try:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except TypeError as error:
        raise ObrError(
            f"task {config['task']} has rows that are not text and numbers alone ({error}): use another task."
        ) from error
    split = "test" if config.get("test_split") else "validation"
    here = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: "data.jsonl"}},
        "validation_split": None,
        "test_split": None,
        f"{split}_split": split,
        "num_fewshot": 0,
    }
    config = {key: value for key, value in config.items() if key not in DROPPED} | here
    data = folder / "data.jsonl"
    write_text(lines, data)
    record = {
        "task": config["task"],
        "source": source,
        "revision": revision,
        "split": split,
        "n": len(rows),
        "sha256": sha256_of(data),
        "lm_eval": lm_eval.__version__,
    }
    packaged = yaml.dump(config, Dumper=yaml_dumper(), sort_keys=False, allow_unicode=True)
    write_text(packaged, folder / "task.yaml")
    write_json(record, folder / "task.json")


def _check_rows(folder: Path, config: dict) -> None:
    """Ask every row for its prompt and answer now: lm-eval would count a bad answer as a wrong one."""
    import jinja2

    name, where = config["task"], "the first row"
    _check_columns(config, list(_parse_lines(folder / "data.jsonl")))
    try:
        task = load_task(folder)
        for i, doc in enumerate(task.eval_docs):
            where = f"row {i + 1}"
            _, choices, answer = question(task, doc)
            if task.OUTPUT_TYPE == "loglikelihood" and not str(choices[0]).strip():
                raise ObrError(f"row {i + 1} of task {name} has no answer: use rows with the hub's columns.")
            answers = answer if isinstance(answer, list) else [answer]
            if not all(0 <= index < len(choices) for index in answers):
                raise ObrError(
                    f"row {i + 1} of task {name} names answer {answer} of {len(choices)} choices: "
                    "use a split or file that has the answers."
                )
    except (KeyError, jinja2.UndefinedError, TypeError, ValueError) as error:
        what = f"no column {error}" if isinstance(error, KeyError) else first_line(error)
        raise ObrError(
            f"{where} of task {name} does not make a question ({what}): use rows with the hub's columns."
        ) from error


def _check_columns(config: dict, rows: list[dict]) -> None:
    # lm-eval takes the bare name of an absent column for the prompt itself. Columns that only a function
    # reads show when it is called.
    from jinja2 import Environment, meta

    if "process_docs" in config:
        return
    read: set[str] = set()
    for key in ("doc_to_text", "doc_to_choice", "doc_to_target"):
        template = config.get(key)
        if isinstance(template, str) and not isinstance(template, Function):
            bare = {template} if template.isidentifier() else set()
            read |= bare | meta.find_undeclared_variables(Environment().parse(template))
    if missing := sorted(read - set.intersection(*(set(row) for row in rows))):
        raise ObrError(
            f"the rows of task {config['task']} lack {', '.join(missing)}: use rows with the hub's columns."
        )


def question(task: Any, doc: dict) -> tuple[str, list[str], int]:
    """(context, continuations, index of the right one) that a lm-eval task makes of a row.

    WinoGrande varies the context instead of the continuation; here its contexts are then the choices. A task of
    output type loglikelihood, such as LAMBADA, has one continuation.
    """
    if task.OUTPUT_TYPE == "loglikelihood":
        return task.doc_to_text(doc), [task.doc_to_target(doc)], 0
    choices = task.doc_to_choice(doc)
    if task.multiple_input:
        return task.doc_to_target(doc), choices, task.doc_to_text(doc)
    answer = task.doc_to_target(doc)
    return task.doc_to_text(doc), choices, choices.index(answer) if isinstance(answer, str) else answer


def _parse_lines(file: Path) -> Iterator[dict]:
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ObrError(f"line {number} of {file} is not JSON ({error}): write one row a line.") from error
        if not isinstance(row, dict):
            raise ObrError(f"line {number} of {file} has no named columns: write one JSON object a line.")
        yield row
