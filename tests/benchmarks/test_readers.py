"""The check of other readers: what counts as agreement, as refusal and as neither."""

import importlib.util

import pytest

from helpers.paths import ROOT


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("readers_check", ROOT / "benchmarks/readers/check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("reader", "case", "answer", "largest", "fine"),
    [
        ("transformers5", "dense, 4 bits", {"version": "5"}, 1e-5, True),
        ("transformers5", "dense, 4 bits", {"version": "5"}, 1e-3, False),
        ("vllm", "dense, 4 bits", {"version": "1"}, 0.05, True),
        ("vllm", "dense, 4 bits", "ValueError: no kernel", None, False),
        ("vllm", "dense, 3 bits", "uint3b4 not supported by CPUWNA16", None, True),
        ("vllm", "dense, 3 bits", "MemoryError", None, False),
        ("vllm", "dense, 3 bits", {"version": "1"}, 0.0, False),
        ("transformers4", "dense, 3 bits", {"version": "4"}, 20.0, True),
        ("transformers4", "dense, 3 bits", {"version": "4"}, 0.0, False),
        ("llamacpp", "dense, 3 bits", {"version": "1"}, 1.5, True),
        ("llamacpp", "dense, 4 bits", {"version": "1"}, 1.5, False),
    ],
)
def test_judge_expects_agreement_or_the_refusal_that_the_docs_name(check, reader, case, answer, largest, fine):
    cells, found = check.judge(reader, case, answer, lambda _: (95, 96, largest, 0.0))
    assert found == fine and len(cells) == 5
    assert cells[2] == (f"refused: {answer}" if isinstance(answer, str) else "95 of 96")


def test_cases_name_readers_and_each_other(check):
    named = {*check.WIDER, *check.REFUSES, *check.MISREADS}
    assert {case for _, case in named | check.NO_FILE} <= check.CASES.keys()
    assert {reader for reader, _ in named} <= check.LARGEST.keys()
