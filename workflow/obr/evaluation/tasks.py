"""Task folders: everything a zero-shot evaluation reads, in one place that can be moved.

A folder holds `data.jsonl` (one row a line, columns as on the hub), `task.yaml` (the task as
lm-eval packages it, its includes merged) and `task.json` (where the rows came from and their
sha256), and `examples.jsonl` if prompts have examples. `lm_eval --include_path . --tasks NAME`,
run inside the folder, reads it too.
"""

from __future__ import annotations

import json
import logging
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from obr.errors import ObrError, first_line
from obr.evaluation.lm_eval_tasks import Function, check_output_type, yaml_dumper
from obr.evaluation.task_rows import Found, parse_lines, rows_of
from obr.runtime.files import (
    atomic_folder,
    check_folder_replaceable,
    replace_folder,
    sha256_of,
    write_json,
    write_text,
)

# Packaged keys that name splits and files which are not in a task folder.
DROPPED = ("tag", "group", "include", "fewshot_split", "fewshot_config", "training_split")


DATA, EXAMPLES, CONFIG = "data.jsonl", "examples.jsonl", "task.yaml"
FILES = (DATA, EXAMPLES, CONFIG, "task.json")  # of a task folder
FEWSHOT_SEED = 1234  # lm-eval's default


def download_task(source: dict, out: Path, text: Path | None = None, rerun: bool = False) -> None:
    """Write the task folder `out` from one of three sources.

    {source: hub, task, revision?}: the split that lm-eval's task of that name is scored on (test
        where it has one, else validation), downloaded from the hub, rows unprocessed;
    {source: path, task, file, sha256?}: the same rows from a local JSON-lines file;
    {source: cloze, task?, n, seed}: `n` multiple-choice questions made from the file `text`, see
        `cloze`; for machines with neither the hub nor task files.

    rerun: an earlier result in `out` may lack task.json, see `runtime.files.check_folder_replaceable`.

    `num_fewshot` of the first two: so many examples stand in each prompt, drawn as lm-eval draws them from the hub's
    split for examples, or from the local file `examples`.

    Raises ObrError when the source cannot be read, its rows do not fit the task's prompts, or `out` holds anything
    but an earlier result.
    """
    check_folder_replaceable(out, "a task folder", "task.json", FILES.__contains__, rerun)
    found = rows_of(source, text)
    # Snakemake and readers see the folder whole or not at all.
    with atomic_folder(out) as folder:
        _write_folder(folder, found, source)
        _check_rows(folder, found.config)
        replace_folder(folder, out)


def read_task(task_dir: Path) -> dict:
    """task.json of a task folder, once rows, examples and task.yaml are known to be those it was written with.

    Raises ObrError when a file is missing or does not have the recorded sha256.
    """
    try:
        record = json.loads((task_dir / "task.json").read_text(encoding="utf-8"))
        noted = {DATA: "sha256", EXAMPLES: "examples_sha256", CONFIG: "config_sha256"}
        hashes = {name: record[key] for name, key in noted.items() if key in record}
        for name, wanted in hashes.items():
            if (found := sha256_of(task_dir / name)) != wanted:
                raise ObrError(
                    f"{task_dir / name} has changed (its sha256 is {found}, task.json says {wanted}): "
                    "run the stage download_task again."
                )
    except FileNotFoundError as error:
        raise ObrError(
            f"the task folder {task_dir} has no {Path(error.filename).name}: run the stage download_task."
        ) from error
    return record


def load_task(task_dir: Path) -> Any:
    """The folder's task as a `lm_eval` Task, its rows in memory.

    Raises as `read_task` does, and ObrError for an output type that is not in OUTPUT_TYPES.
    """
    import yaml
    from lm_eval.tasks import TaskManager

    record = read_task(task_dir)
    names = {record["split"]: DATA, **({"examples": EXAMPLES} if "num_fewshot" in record else {})}
    files = {split: str((task_dir / name).resolve()) for split, name in names.items()}
    # The rows go in through `custom_dataset`: lm-eval's own loader would leave a cache behind, ping the
    # hub and read strings that look like dates as dates.
    override = {
        "include": str((task_dir / CONFIG).resolve()),
        "custom_dataset": Function("obr.evaluation.tasks.rows_in_memory"),
        "dataset_kwargs": {"files": files},
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "task.yaml").write_text(yaml.dump(override, Dumper=yaml_dumper()), encoding="utf-8")
        # Indexing lm-eval's own 14,000 tasks would take longer than many an evaluation.
        with quiet(), drawn_as_by_lm_eval():
            manager = TaskManager(include_path=folder, include_defaults=False)
            task = manager.load([record["task"]])["tasks"][record["task"]]
    check_output_type(record["task"], task.OUTPUT_TYPE)
    with quiet(), drawn_as_by_lm_eval():
        _process_once(task, list(files))
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


def _process_once(task: Any, splits: list[str]) -> None:
    """Replace a task's rows by those that its function makes of them.

    lm-eval calls the function whenever it reads the rows. A function that draws at random, such as GPQA's, which
    shuffles the choices, would then give questions and right answers of different orders.
    """
    process, own = task.config.process_docs, task.fewshot_cfg.process_docs
    for split in splits:
        if function := own if split == "examples" else process:
            task.dataset[split] = function(task.dataset[split])
    task.config.process_docs = task.fewshot_cfg.process_docs = None


@contextmanager
def drawn_as_by_lm_eval() -> Iterator[None]:
    """Random generators of Python and numpy with lm-eval's default seeds, restored afterwards."""
    import numpy as np

    before = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def rows_in_memory(files: dict[str, str], **_: Any) -> dict:
    """What lm-eval takes as a dataset: {split: Dataset}. It also passes the task's metadata, unused."""
    from datasets import Dataset

    return {split: Dataset.from_list(list(parse_lines(Path(file)))) for split, file in files.items()}


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


def _write_folder(folder: Path, found: Found, source: dict) -> None:
    import lm_eval
    import yaml

    config, task = found.config, found.config["task"]
    if not found.rows:
        raise ObrError(f"task {task} has no rows: check its source {source}.")
    split = "test" if config.get("test_split") else "validation"
    files = {split: DATA}
    _write_rows(found.rows, folder / DATA, task)
    here: dict[str, Any] = {"validation_split": None, "test_split": None, f"{split}_split": split, "num_fewshot": 0}
    record: dict[str, Any] = {}
    if found.examples is not None:
        shots = source["num_fewshot"]
        if len(found.examples) < shots:
            raise ObrError(f"task {task} has {len(found.examples)} examples, not {shots}: lower num_fewshot.")
        _write_rows(found.examples, folder / EXAMPLES, task)
        files["examples"] = EXAMPLES
        fewshot = {k: v for k, v in (config.get("fewshot_config") or {}).items() if k != "split"}
        here |= {"num_fewshot": shots, "fewshot_config": {**fewshot, "split": "examples"}}
        record = {"num_fewshot": shots, "examples_sha256": sha256_of(folder / EXAMPLES)}
    here |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    config = {key: value for key, value in config.items() if key not in DROPPED} | here
    record = {
        "task": task,
        "source": source,
        "revision": found.revision,
        "split": split,
        "n": len(found.rows),
        "sha256": sha256_of(folder / DATA),
        "lm_eval": lm_eval.__version__,
        **record,
    }
    packaged = yaml.dump(config, Dumper=yaml_dumper(), sort_keys=False, allow_unicode=True)
    write_text(packaged, folder / CONFIG)
    write_json(record | {"config_sha256": sha256_of(folder / CONFIG)}, folder / "task.json")


def _write_rows(rows: list[dict], path: Path, task: str) -> None:
    try:
        write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), path)
    except TypeError as error:
        raise ObrError(
            f"task {task} has rows that are not text and numbers alone ({error}): use another task."
        ) from error


def _check_rows(folder: Path, config: dict) -> None:
    """Ask every row for its prompt and answer now: lm-eval would count a bad answer as a wrong one."""
    name, where = config["task"], "the first row"
    shots, columns = (folder / EXAMPLES).exists(), _columns_read(config)
    for file in (DATA, *([EXAMPLES] if shots else [])):
        _check_columns(config, list(parse_lines(folder / file)))
    try:
        task = load_task(folder)
        examples = [(f"example {i + 1}", doc) for i, doc in enumerate(task.fewshot_docs() if shots else [])]
        for where, doc in [*((f"row {i + 1}", doc) for i, doc in enumerate(task.eval_docs)), *examples]:
            _check_question(f"{where} of task {name}", task, doc, columns)
    except ObrError:
        raise
    except Exception as error:  # of lm-eval, of a task's own functions, or of their templates
        what = f"no column {error}" if isinstance(error, KeyError) else first_line(error)
        raise ObrError(
            f"{where} of task {name} does not make a question ({what}): use rows with the hub's columns."
        ) from error


def _check_question(where: str, task: Any, doc: dict, columns: set[str]) -> None:
    """Raise ObrError unless the question of a row has text, choices to tell apart and a right one among them.

    columns: that the task's templates read.
    """
    context, choices, answer = question(task, doc)
    if task.OUTPUT_TYPE == "loglikelihood" and not str(choices[0]).strip():
        raise ObrError(f"{where} has no answer: use rows with the hub's columns.")
    if task.OUTPUT_TYPE == "multiple_choice" and len(choices) < 2:
        raise ObrError(f"{where} has {len(choices)} choice, so that any model is right: give two or more.")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ObrError(f"{where} has a choice without text among {choices}: use rows with the hub's columns.")
    answers = answer if isinstance(answer, list) else [answer]
    if not all(isinstance(index, int) and 0 <= index < len(choices) for index in answers):
        raise ObrError(
            f"{where} names answer {answer} of {len(choices)} choices: use a split or file that has the answers."
        )
    absent = [column for column, value in doc.items() if value is None and column in columns]
    if absent and "None" in f"{context} {choices}":
        raise ObrError(f"{where} has no {absent[0]}, which would be asked as None: leave such rows out.")


def _columns_read(config: dict) -> set[str]:
    """The columns that a task's templates name. config: lm-eval's, of the task."""
    from jinja2 import Environment, meta

    read: set[str] = set()
    for key in ("doc_to_text", "doc_to_choice", "doc_to_target"):
        template = config.get(key)
        if isinstance(template, str) and not isinstance(template, Function):
            bare = {template} if template.isidentifier() else set()
            read |= bare | meta.find_undeclared_variables(Environment().parse(template))
    return read


def _check_columns(config: dict, rows: list[dict]) -> None:
    # lm-eval takes the bare name of an absent column for the prompt itself. Columns that only a function
    # reads show when it is called.
    if "process_docs" in config:
        return
    if missing := sorted(_columns_read(config) - set.intersection(*(set(row) for row in rows))):
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
