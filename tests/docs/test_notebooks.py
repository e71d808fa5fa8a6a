"""Every notebook of the documentation runs from top to bottom, on the tiny model."""

import ast
import json

import matplotlib
import pytest

from helpers.paths import ROOT

NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))


def cells(path) -> list[str]:
    """The code of a notebook, cell by cell."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(path, tiny_folder, monkeypatch, capsys, tmp_path):
    matplotlib.use("agg")
    monkeypatch.setenv("OBR_NOTEBOOK_MODEL", str(tiny_folder / "model"))
    monkeypatch.setenv("OBR_NOTEBOOK_TEXT", str(tiny_folder / "train.txt"))
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    names, values = {}, []
    for cell in cells(path):
        *before, last = ast.parse(cell).body
        shown = isinstance(last, ast.Expr)
        exec(compile(ast.Module(before if shown else [*before, last], []), path.name, "exec"), names)
        if shown:
            values.append(eval(compile(ast.Expression(last.value), path.name, "eval"), names))
    values = [value for value in values if value is not None]
    assert values[0][0] == (8, 256) and len(values[1]) == 2  # windows; errors of two blocks
    assert names["dense"] < names["compressed"] < 2 * names["dense"]
    assert isinstance(values[-1], str) and "bits per weight" in capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_no_outputs(path):
    """They would be of another machine, and of another version."""
    found = json.loads(path.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in found["cells"])
