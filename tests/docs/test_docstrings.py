"""Every public name has an example, and the examples give what they print."""

import doctest
from importlib import import_module

import pytest
import torch
from transformers import AutoTokenizer

import obr
from helpers.paths import ROOT

PACKAGE = ROOT / "workflow"
PLAIN = ("ObrError",)  # an exception: nothing to show


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in obr.__all__ if name not in PLAIN])
def test_the_example_of_a_public_name_runs(name, tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/model").symlink_to(tiny_folder / "model")
    (tmp_path / "text.txt").symlink_to(tiny_folder / "train.txt")
    monkeypatch.chdir(tmp_path)
    names = {
        "obr": obr, "torch": torch, name: getattr(obr, name),
        "tokenizer": AutoTokenizer.from_pretrained(tiny_folder / "model"),
        "text": (tiny_folder / "train.txt").read_text(encoding="utf-8"),
    }  # fmt: skip
    found = doctest.DocTestFinder(recurse=False).find(getattr(obr, name), name, globs=names)
    assert sum(len(test.examples) for test in found) > 0
    for test in found:
        assert doctest.DocTestRunner().run(test).failed == 0


def test_examples_of_functions_that_are_not_exported_run():
    exported = {f"{value.__module__}.{value.__qualname__}" for value in (getattr(obr, key) for key in obr.__all__)}
    paths = [
        path for path in PACKAGE.glob("obr/**/*.py") if path.parent != PACKAGE / "obr" or path.name == "errors.py"
    ]
    names = [
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in sorted(paths)
        if ">>> " in path.read_text(encoding="utf-8")
    ]
    found = [test for name in names for test in doctest.DocTestFinder().find(import_module(name))]
    found = [test for test in found if test.examples and test.name not in exported]
    assert len(found) > 20
    for test in found:
        assert doctest.DocTestRunner().run(test).failed == 0, test.name
