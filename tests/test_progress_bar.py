"""The logger plugin: a bar with the time that is left on a terminal, Snakemake's own lines elsewhere."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from snakemake_interface_logger_plugins.common import LogEvent

from snakemake_logger_plugin_progress.estimate import Estimate

SNAKEFILE = """
rule all:
    input: expand("out/{i}.txt", i=range(4))

rule one:
    output: "out/{i}.txt"
    message: "Writing number {wildcards.i}"
    shell: "test {wildcards.i} != $WRONG && touch {output}"
"""
WORKFLOW = Path(__file__).parents[1] / "workflow"


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def start(estimate: Estimate, number: int, rule: str) -> None:
    estimate.take(LogEvent.JOB_INFO, {"jobid": number, "rule_name": rule, "wildcards": {"model": f"m{number}"}})


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def estimate(clock):
    found = Estimate(clock)
    found.take(LogEvent.RUN_INFO, {"stats": {"compress": 4, "table": 1, "total": 5}})
    return found


def test_no_time_is_named_before_a_job_has_finished(estimate):
    assert estimate.left() is None and estimate.sentence() == "0 s elapsed"


def test_the_time_left_follows_from_finished_jobs_and_those_that_run_at_a_time(estimate, clock):
    start(estimate, 1, "compress")
    start(estimate, 2, "compress")
    assert estimate.running == ["compress m1", "compress m2"]
    clock.now = 60.0
    for number in (1, 2):
        estimate.take(LogEvent.JOB_FINISHED, {"job_id": number})
    # Two jobs of 60 s at a time: two more and a table, a twentieth of one, take 63 s / 2 x 2.
    assert estimate.left() == pytest.approx((2 * 60 + 3) / 2)
    start(estimate, 3, "compress")
    start(estimate, 4, "compress")
    clock.now = 90.0
    assert estimate.left() == pytest.approx((60 + 3) / 2)
    assert estimate.sentence() == "2 min elapsed, about 32 s left"


def test_a_failed_job_is_no_longer_running(estimate):
    start(estimate, 1, "compress")
    estimate.take(LogEvent.JOB_ERROR, {"jobid": 1})
    assert estimate.running == [] and estimate.left() is None


def run(folder: Path, terminal: bool, wrong: str = "9", *options: str) -> tuple[int, str]:
    """(status, output) of Snakemake, on a terminal of its own or not."""
    (folder / "Snakefile").write_text(SNAKEFILE)
    environment = {**os.environ, "PYTHONPATH": str(WORKFLOW), "COLUMNS": "100", "TERM": "xterm", "WRONG": wrong}
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--logger", "progress", *options]
    if not terminal:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout.decode()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # the terminal closes with its last process
        pass
    os.close(ours)
    return process.wait(), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())


def test_a_terminal_shows_a_bar_with_jobs_and_time(tmp_path):
    status, said = run(tmp_path, True)
    assert status == 0 and re.search(r"[1-4] of 5 jobs .*\d+ s elapsed, about \d+ s left", said)
    assert "Writing number" in said and "Finished jobid" not in said and "Select jobs" not in said


def test_an_error_is_printed_above_the_bar(tmp_path):
    status, said = run(tmp_path, True, "2")
    assert status == 1 and "Error in rule one" in said


def test_elsewhere_the_lines_are_those_of_snakemake(tmp_path):
    status, said = run(tmp_path, False)
    assert status == 0 and "Writing number 3" in said and "5 of 5 steps (100%) done" in said
    assert "elapsed, about" not in said


def test_a_dry_run_has_no_bar(tmp_path):
    status, said = run(tmp_path, True, "9", "--dry-run")
    assert (status == 0 and "rule one" in said) or "Writing number" in said
    assert "elapsed" not in said.lower().replace("elapsed time", "")
