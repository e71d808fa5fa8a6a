"""Scores and costs of each row in one table, as CSV and as Markdown that docs/publish.py puts into a page."""

import csv
import json
import os
import platform
from pathlib import Path

HEADS = ("method", "by", "bits per weight", "zeros, %", "file, MB", "perplexity ↓", "continuation, % ↑")
HEADS += ("processor time, s", "peak memory, MB")
NOTES = (
    "Time and memory: of the process that compresses, from its start to its end, with one thread.",
    "Bits per weight: of the compressed layers as the file stores them.",
)


def collect(scores: Path, costs: Path) -> list[dict]:
    """Rows of a table's CSV file with what the compressions took.

    costs: a folder with RECIPE.json of each that was measured; a `program` there is another's. Rows without scores
    are left out.
    """
    with scores.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["sotu_ours"]]
    found = []
    for row in rows:
        note = costs / f"{row['recipe']}.json"
        cost = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        found.append(
            {
                "recipe": row["recipe"],
                "label": row["label"],
                "program": cost.get("program", "OBR-pipeline"),
                "bits_per_weight": float(row["bits_per_weight_file"]),
                "zeros_percent": 100 * float(row["sparsity_measured"] or 0),
                "file_mb": float(row["file_mb"]),
                "perplexity": float(row["sotu_ours"]),
                "continuation_percent": float(row["continuation_ours"]),
                "continuation_stderr": float(row["continuation_stderr"]),
                **{key: cost.get(key, "") for key in ("processor_seconds", "seconds", "peak_mb")},
            }
        )
    return found


def write(rows: list[dict], stem: Path, title: str) -> None:
    """stem.csv and stem.md."""
    with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [f"**{title}**", "", f"| {' | '.join(HEADS)} |", "| :-- | :-- |" + " --: |" * (len(HEADS) - 2)]
    for row in rows:
        cells = [row["label"], row["program"], f"{row['bits_per_weight']:.2f}", f"{row['zeros_percent']:.1f}"]
        cells += [f"{row['file_mb']:.1f}", f"{row['perplexity']:.2f}"]
        cells += [f"{row['continuation_percent']:.1f} ± {row['continuation_stderr']:.1f}"]
        cells += [f"{row[key]:,.0f}" if row[key] != "" else "–" for key in ("processor_seconds", "peak_mb")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {note}" for note in NOTES), f"- Machine: {machine()}."]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def machine() -> str:
    """Processor and number of cores."""
    told = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
