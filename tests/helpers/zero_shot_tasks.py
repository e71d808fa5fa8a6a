"""Rows of zero-shot tasks, task folders of them, and a text of numbered sentences."""

import json
from pathlib import Path

from obr.evaluation.tasks import download_task

PIQA = [
    {
        "goal": f"To {verb} the {thing}",
        "sol1": f"{verb} it with a {one}.",
        "sol2": f"put it on a {two}",
        "label": i % 2,
    }
    for i, (verb, thing, one, two) in enumerate(
        (verb, thing, one, two)
        for verb, thing in [("cut", "bread"), ("mend", "wooden chair"), ("wash", "old coat"), ("open", "tin")]
        for one, two in [("sharp knife", "shelf"), ("little glue", "long table by the window")]
    )
]
ARC = [
    {
        "question": "What melts?",
        "choices": {"text": ["ice", "a stone"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    {
        "question": "What burns?",
        "choices": {"text": ["a rock", "wood"], "label": ["1", "2"]},
        "answerKey": "2",
    },
]
BOOLQ = [{"passage": "Ice is cold.", "question": "is ice cold", "idx": 0, "label": 1}]
HELLASWAG = [
    {
        "activity_label": "Baking",
        "ctx_a": "A man [substeps] mixes dough.",
        "ctx_b": "then he",
        "endings": ["bakes it.", "sings [title] loudly.", "swims.", "sleeps."],
        "label": "0",
    }
]
WINOGRANDE = [
    {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"}
]
LAMBADA = [{"text": text} for text in ("The old coat was put on a long shelf", "To mend it use a little glue")]
OPENBOOKQA = [
    {
        "question_stem": "Ice is",
        "choices": {"text": ["warm", "cold", "loud", "old"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    }
]
SIQA = [
    {
        "context": "Ann cut the bread.",
        "question": "Why did Ann do this?",
        "answerA": "to eat it",
        "answerB": "to paint it",
        "answerC": "to lose it",
        "label": "1",
    }
]
ROWS = {
    "piqa": PIQA,
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "boolq": BOOLQ,
    "hellaswag": HELLASWAG,
    "winogrande": WINOGRANDE,
    "lambada_openai": LAMBADA,
    "openbookqa": OPENBOOKQA,
    "social_iqa": SIQA,
}
TEXT = "\n\n".join(
    " ".join(f"Paragraph {i} says in its sentence {j} that word{i}x{j} is one of many." for j in range(6))
    for i in range(20)
)


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def local_task(folder: Path, task: str, rows: list[dict]) -> Path:
    file = write_lines(folder / f"{task}.jsonl", rows)
    download_task({"source": "path", "task": task, "file": str(file)}, folder / task)
    return folder / task
