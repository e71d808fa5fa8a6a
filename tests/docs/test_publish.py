"""docs/publish.py: tables and figures of a run in a page."""

import subprocess
import sys

import pytest

from helpers.paths import ROOT

PAGE = "# Results\n\nText.\n\n<!-- published: docs/publish.py -->\nold\n<!-- end of published -->\n\nMore.\n"


@pytest.fixture
def run(tmp_path):
    """A run with two tables that share a note, a figure, and a page."""
    for name, note in (("one", "of one"), ("two", "of two")):
        path = tmp_path / "results/tables" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"**Table {name}**\n\n| a |\n| --- |\n| {name} |\n\n- Note {note}.\n- Of both.\n"
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        path.with_suffix(".csv").write_text(f"a\n{name}\n", encoding="utf-8")
    (tmp_path / "results/figures").mkdir()
    (tmp_path / "results/figures/plot.png").write_bytes(b"png")
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    return tmp_path


def publish(folder, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "docs/publish.py", folder / "results", folder / "page.md", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_pages_keep_their_text_and_have_shared_notes_once(run):
    for _ in range(2):  # the second time over what the first has written
        assert publish(run, "--tables", "two", "one", "--figures", "plot").returncode == 0
    page = (run / "page.md").read_text(encoding="utf-8")
    assert page.startswith("# Results\n\nText.\n") and page.endswith("\n\nMore.\n") and "old" not in page
    places = [page.index(part) for part in ("## Table two", "| two |", "Note of two", "## Table one", "plot.png")]
    assert places == sorted(places)
    assert page.count("- Of both.") == 1 and page.count("- Note of one.") == 1
    assert (run / "page/one.csv").read_text(encoding="utf-8") == "a\none\n"
    assert (run / "page/plot.png").read_bytes() == b"png"


@pytest.mark.parametrize(
    ("page", "table", "message"), [("Text.", "one", "needs the line"), (PAGE, "x", "no tables/x")]
)
def test_pages_without_a_place_and_runs_without_the_table_are_refused(page, table, message, run):
    (run / "page.md").write_text(page, encoding="utf-8")
    found = publish(run, "--tables", table)
    assert found.returncode == 1 and message in found.stderr
    assert (run / "page.md").read_text(encoding="utf-8") == page
