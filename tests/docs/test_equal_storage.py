"""The figure of the results at equal storage: drawn from the CSV file beside it, as it lies there."""

import importlib.util

import pandas as pd

from helpers.paths import ROOT

FOLDER = ROOT / "docs" / "results" / "equal-storage"


def drawing():
    spec = importlib.util.spec_from_file_location("draw_equal_storage", ROOT / "docs" / "draw_equal_storage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figure_is_that_of_the_runs(tmp_path, monkeypatch):
    module = drawing()
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    (tmp_path / "comparison.csv").write_bytes((FOLDER / "comparison.csv").read_bytes())
    module.main()
    drawn = (tmp_path / "comparison.svg").read_text(encoding="utf-8")
    assert drawn == (FOLDER / "comparison.svg").read_text(encoding="utf-8"), "run docs/draw_equal_storage.py"


def test_every_run_has_its_point_on_the_line_of_its_method():
    module, frame = drawing(), pd.read_csv(FOLDER / "comparison.csv", encoding="utf-8")
    figure = module.draw(frame)
    for axes, (panel, runs) in zip(figure.axes, frame.groupby("panel", sort=False), strict=True):
        points = [tuple(point) for part in axes.collections for point in part.get_offsets()]
        assert axes.get_title() == panel and len(points) == len(runs)
        heights = [label.get_text() for label in axes.get_yticklabels()] or list(module.METHODS[::-1])
        for method, perplexity in zip(runs["method"], runs["perplexity"], strict=True):
            place = heights.index(method)
            assert any(x == perplexity and abs(y - place) < 0.4 for x, y in points)
        assert axes.get_xlim()[0] < runs["perplexity"].min() and runs["perplexity"].max() < axes.get_xlim()[1]
