"""Rows of a user's own file: scored as they are meant, or refused in one sentence before anything is computed."""

import json
import random

import numpy as np
import pytest
from transformers import AutoConfig

from helpers.zero_shot_tasks import ARC, PIQA, SIQA, local_task
from obr.errors import ObrError
from obr.evaluation.language_model import KnownAnswers
from obr.evaluation.lm_eval_tasks import packaged_task
from obr.evaluation.tasks import download_task, load_task
from obr.evaluation.zero_shot import TaskRun
from obr.models.loading import load_tokenizer

GPQA = [
    {"Question": f"What is {i}?", "Correct Answer": f"right {i}"}
    | {f"Incorrect Answer {j}": f"wrong {i} {j}" for j in (1, 2, 3)}
    for i in range(8)
]


@pytest.fixture(scope="module")
def reader(tiny_folder):
    """Configuration and tokenizer of a model."""
    return AutoConfig.from_pretrained(tiny_folder / "model"), load_tokenizer(tiny_folder / "model")


def test_a_task_that_shuffles_its_choices_has_one_order_and_that_of_lm_eval(tmp_path, monkeypatch):
    """lm-eval reads the same folder by itself, seeded as its own evaluation is; its rows are then kept on disk."""
    from lm_eval.tasks import TaskManager

    folder = local_task(tmp_path, "gpqa_main_zeroshot", GPQA)
    before = random.getstate(), np.random.get_state()[1].tolist()
    task = load_task(folder)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    rows = [list(task.eval_docs) for _ in range(2)]
    assert rows[0] == rows[1] == list(load_task(folder).eval_docs)
    assert len({row["answer"] for row in rows[0]}) > 1
    for row in rows[0]:
        assert row[f"choice{ord(row['answer'][1]) - 64}"] == row["Correct Answer"]
    monkeypatch.chdir(folder)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    random.seed(0)
    theirs = manager.load(["gpqa_main_zeroshot"])["tasks"]["gpqa_main_zeroshot"]
    assert list(theirs.eval_docs) == rows[0]


def test_questions_that_change_from_one_reading_to_the_next_are_refused(reader, tmp_path):
    run = TaskRun(local_task(tmp_path, "piqa", PIQA), *reader)
    asked = [pair for pair, _, _ in run.requests]
    answers = [(-1.0, False)] * len(asked)
    run._evaluate(KnownAnswers(answers, asked))
    with pytest.raises(ObrError, match="asks other questions each time"):
        run._evaluate(KnownAnswers(answers, [("another", " question"), *asked[1:]]))


CHOICES = {"text": ["ice", "a stone"], "label": ["A", "B"]}


@pytest.mark.parametrize(
    ("task", "rows", "sentence"),
    [
        ("piqa", [{**PIQA[0], "label": 0.6}], "row 1 of task piqa names answer 0.6 of 2 choices"),
        ("piqa", [{**PIQA[0], "label": 2}], "does not make a question"),
        (
            "piqa",
            [PIQA[0], {**PIQA[1], "goal": None}],
            "row 2 of task piqa has no goal, which would be asked as None",
        ),
        ("piqa", [PIQA[0], {**PIQA[1], "sol2": " "}], "row 2 of task piqa has a choice without text"),
        ("arc_easy", [{**ARC[0], "question": None}], "has no question, which would be asked as None"),
        (
            "arc_easy",
            [{**ARC[0], "choices": {"text": ["ice"], "label": ["A"]}}],
            "1 choice, so that any model is right",
        ),
        ("arc_easy", [{**ARC[0], "choices": {**CHOICES, "label": ["B", "C", "A"]}}], "does not make a question"),
        ("social_iqa", [{**SIQA[0], "label": "4"}], "does not make a question"),
    ],
)
def test_rows_without_a_question_or_an_answer_are_refused(task, rows, sentence, tmp_path):
    with pytest.raises(ObrError, match=sentence):
        local_task(tmp_path, task, rows)
    assert not (tmp_path / task).exists()


LINE = json.dumps({**PIQA[0], "goal": "café"}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (LINE.encode("latin-1"), "line 1 of .* is not UTF-8"),
        (LINE.encode("utf-16"), "line 1 of .* is not UTF-8"),
        (f'{LINE}\n{LINE[:-1]}, "label": 1}}'.encode(), "line 2 of .*'label' is there twice"),
        (LINE.replace("café", "caf\\ud800").encode(), "line 1 of .* is not UTF-8"),
    ],
)
def test_files_that_are_no_rows_of_json_are_refused(data, sentence, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(ObrError, match=sentence):
        download_task({"source": "path", "task": "piqa", "file": str(tmp_path / "rows.jsonl")}, tmp_path / "out")


def test_a_byte_order_mark_and_line_ends_of_windows_change_nothing(tmp_path):
    lines = [json.dumps(row) for row in PIQA]
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    download_task({"source": "path", "task": "piqa", "file": str(tmp_path / "rows.jsonl")}, tmp_path / "out")
    assert list(load_task(tmp_path / "out").eval_docs) == PIQA


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"examples": "rows"}, "example 1 of task piqa is its row 1, which is scored"),
        ({"examples": "overlap"}, "example 1 of task piqa is its row 4, which is scored"),
        ({"num_fewshot": True}, "num_fewshot True of task piqa is no number of examples"),
        ({"num_fewshot": 2.0}, "num_fewshot 2.0 of task piqa is no number of examples"),
        ({"num_fewshot": -1}, "num_fewshot -1 of task piqa is no number of examples"),
        ({"num_fewshot": 0}, "has a file of examples but no num_fewshot"),
    ],
)
def test_examples_of_the_scored_rows_or_of_no_number_are_refused(changes, sentence, tmp_path):
    for name, rows in (("rows", PIQA[:4]), ("overlap", PIQA[3:]), ("others", PIQA[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"source": "path", "task": "piqa", "file": str(tmp_path / "rows.jsonl"), "num_fewshot": 2}
    examples = tmp_path / f"{changes.pop('examples', 'others')}.jsonl"
    with pytest.raises(ObrError, match=sentence):
        download_task({**source, "examples": str(examples), **changes}, tmp_path / "out")


def test_a_task_whose_name_stands_in_quotes_is_found():
    assert packaged_task("mmlu_abstract_algebra")["dataset_name"] == "abstract_algebra"


@pytest.mark.parametrize("wrong", [{"limit": True}, {"limit": 2.5}, {"max_length": 0}, {"max_length": -5}])
def test_numbers_of_rows_and_tokens_are_whole_and_positive(wrong, reader, tmp_path):
    folder = local_task(tmp_path, "piqa", PIQA[:2])
    ((name, value),) = wrong.items()
    with pytest.raises(ObrError, match=f"{name} {value} for task piqa is no whole number from 1 on"):
        TaskRun(folder, *reader, **wrong)


def test_an_edited_prompt_is_refused(tmp_path):
    folder = local_task(tmp_path, "piqa", PIQA)
    file = folder / "task.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("Answer:", "Reply:"), encoding="utf-8")
    with pytest.raises(ObrError, match=r"task\.yaml has changed"):
        load_task(folder)
