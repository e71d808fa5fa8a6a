"""A plugin of pytest: one row a test, as it ends, in the CSV file that the variable OBR_ROWS names."""

import csv
import os
from pathlib import Path

COLUMNS = ("test", "status", "seconds", "reason")


def pytest_runtest_logreport(report) -> None:
    if report.when != "call" and report.passed:
        return
    reason = ""
    if report.skipped:
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        reason = reason.removeprefix("Skipped: ")
    elif report.failed:
        lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
        reason = lines[0][1:].strip() if lines else ""
    path = Path(os.environ["OBR_ROWS"])
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow([report.nodeid, report.outcome, f"{report.duration:.3f}", reason])
