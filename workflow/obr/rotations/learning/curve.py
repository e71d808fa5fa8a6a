"""A learning curve as a CSV file: a line each time that the loss was looked at."""

import csv
import io
from pathlib import Path

from obr.runtime.files import write_text

COLUMNS = ("block", "step", "loss", "held_out")


def write(curve: list[dict], path: Path) -> None:
    """Write the lines of a curve; `block` is a column only where they have one, what is missing is left empty."""
    columns = [name for name in COLUMNS if any(name in row for row in curve)] or ["step", "loss"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _spelled(value) for name, value in row.items()} for row in curve)
    write_text(text.getvalue(), path)


def _spelled(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
