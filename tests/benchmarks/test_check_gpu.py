"""The check on a GPU, in its form for a CPU: it keeps its budget and what it has found, and names what is missing."""

import csv
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.paths import ROOT

FOLDER = ROOT / "benchmarks"
COMMAND = [sys.executable, str(FOLDER / "check_gpu.py"), "--device", "cpu", "--small"]


def check(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, "--out", str(out), *arguments], capture_output=True, text=True, check=False)


def lines(out: Path) -> dict[str, dict]:
    with (out / "parts.csv").open(newline="") as file:
        return {row["part"]: row for row in csv.DictReader(file)}


@pytest.fixture
def models(monkeypatch):
    """The module of the parts that run models."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("gpu_models")
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_dry_run_lists_all_parts_and_does_nothing(tmp_path):
    run = check(tmp_path / "out", "--dry-run", "--budget", "300")
    assert run.returncode == 0, run.stderr
    found = [line.split()[0] for line in run.stdout.splitlines()[1::2]]
    expected = ["device", "kernel_tests", "products", "large", "memory", "tiny", "trees", "gpu_tests", "demo"]
    assert found == expected
    assert "(after the budget" in run.stdout and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_parts_write_their_files_and_the_summary_names_them(tmp_path):
    run = check(tmp_path, "--only", "device", "products", "trees")
    assert run.returncode == 0, run.stdout + run.stderr
    assert {name: row["status"] for name, row in lines(tmp_path).items()} == dict.fromkeys(
        ["device", "products", "trees"], "passed"
    )
    with (tmp_path / "products.csv").open(newline="") as file:
        products = {row["kernel"]: row["status"] for row in csv.DictReader(file)}
    assert products["packed int4 50 %"] == "ok" and products["fp8 2:4"].startswith("not available")
    assert "Equal scores" in lines(tmp_path)["trees"]["found"]
    summary = (tmp_path / "summary.md").read_text()
    assert "All parts ran to their end." in summary and summary in run.stdout
    assert (tmp_path / "device.log").read_text().splitlines()[-1] == lines(tmp_path)["device"]["found"]


@pytest.mark.slow
def test_parts_beyond_the_budget_are_named(tmp_path):
    """Importing PyTorch takes more than the second by which the budget exceeds the least time of a part."""
    run = check(tmp_path, "--only", "device", "memory", "--budget", "6")
    assert run.returncode == 1
    assert lines(tmp_path)["memory"]["status"] == "not reached" and lines(tmp_path)["memory"]["seconds"] == ""
    assert "Not reached or cut short: memory." in run.stdout or "cut short: device, memory." in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_keeps_what_it_has_and_leaves_no_process(tmp_path, number):
    with subprocess.Popen([*COMMAND, "--out", str(tmp_path), "--only", "device", "memory"]) as run:
        while not (tmp_path / "memory.log").exists():
            assert run.poll() is None
            time.sleep(0.1)
        found = subprocess.run(["pgrep", "-f", f"gpu_parts.py memory --out {tmp_path}"], stdout=subprocess.PIPE)
        child = int(found.stdout.split()[0])
        run.send_signal(number)
        assert run.wait() == 130
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert lines(tmp_path)["device"]["status"] == "passed" and lines(tmp_path)["memory"]["status"] == "cut short"
    summary = (tmp_path / "summary.md").read_text()
    assert f"Stopped by {signal.Signals(number).name}." in summary and "cut short: memory." in summary


def test_a_part_that_breaks_is_reported_as_failed(tmp_path):
    run = subprocess.run(
        [*COMMAND[:2], "--device", "cuda:99", "--out", str(tmp_path), "--only", "device"],
        capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert run.returncode == 1
    assert lines(tmp_path)["device"]["found"] == "PyTorch finds no CUDA device."


def test_tables_are_compared_row_by_row(models, tmp_path):
    reference = models._markdown(ROOT / "docs/results/demo.md")
    assert len(reference) == 14 and reference[0]["method"] == "dense"
    assert [models._perplexity(row) for row in reference[:3]] == [18.80, 51.54, 20.46]
    settings = models.Settings("demo", tmp_path, "cpu", 60, True)
    assert "14 perplexities, at most 0.00 % apart" in models._beside(settings, reference, reference)
    changed = [{**row, "perplexity": "99"} if row["method"] == "GPTQ" else row for row in reference]
    with pytest.raises(models.Failed, match="14 perplexities, at most 383"):
        models._beside(settings, changed, reference)
    with pytest.raises(models.Failed, match="1 rows have none on one side"):
        models._beside(settings, reference[:-1], reference)
    with pytest.raises(models.Failed, match="0 perplexities"):
        models._beside(settings, [{"other": "1"}], [{"other": "1"}])
    own = models._rows(table_file(tmp_path))
    assert models._perplexity(own[0]) == 46.1


def table_file(folder: Path) -> Path:
    """A table's CSV file as the workflow writes it, in short."""
    path = folder / "table.csv"
    path.write_text("model,label,setting,heldout_paper,heldout_ours\ntiny,dense,W16A16KV16,,46.1\n")
    return path
