"""The same model by llm-compressor, GPTQModel and AutoRound beside ours: one table, one command.

    python benchmarks/peers/run.py [--only gptqmodel-w4 ...]      (make peers)

Each program quantises in its own environment, .peers/NAME, from the calibration windows that ours read. Its
checkpoint lies in results/peers/external/ROW and is evaluated by the same stages. results/peers/tables/peers.md has
the scores and bits, results/peers/tables/cost.md seconds and peak memory. What is there already is not made again.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results/peers"
MODEL, WINDOWS = "smollm2-135m", "results/peers/calibration/sotu/smollm2-135m.safetensors"
CONFIG = "config/experiments/peers.yaml"
# Folder in results/peers/external -> program and settings; the recipes of config/recipes/peers.tsv name the folders.
ROWS = {
    "llmcompressor-w4": ["llmcompressor", "--bits", "4"],
    "gptqmodel-w4": ["gptqmodel", "--bits", "4"],
    "gptqmodel-w4g64": ["gptqmodel", "--bits", "4", "--group", "64"],
    "autoround-w4g64": ["autoround", "--bits", "4", "--group", "64", "--iters", "50"],
    "llmcompressor-w4s50": ["llmcompressor", "--bits", "4", "--sparsity", "0.5"],
    "llmcompressor-w3": ["llmcompressor", "--bits", "3"],
    "gptqmodel-w3": ["gptqmodel", "--bits", "3"],
}


def snakemake(*targets: str) -> None:
    command = ["snakemake", "--cores", "all", "--configfile", CONFIG, *targets]
    subprocess.run(command, cwd=ROOT, check=True)


def make(row: str) -> None:
    """Quantise by another program, unless that is done."""
    program, *settings = ROWS[row]
    out = RESULTS / "external" / row
    if (out / "made.json").is_file():
        return
    command = [ROOT / ".peers" / program / "bin/python", ROOT / "benchmarks/peers/make.py", program]
    command += [RESULTS / "models" / MODEL, ROOT / WINDOWS, out, *settings]
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(list(map(str, command)), env=plain, check=True)


def cost() -> str:
    """Seconds and peak memory of each row, theirs as `make.py` noted them, ours as Snakemake measured the job."""
    lines = ["| row | program | seconds | peak MB |", "| --- | --- | --: | --: |"]
    for file in sorted((RESULTS / "external").glob("*/made.json")):
        made = json.loads(file.read_text(encoding="utf-8"))
        program = f"{made['program']} {made['version']}"
        lines.append(f"| {file.parent.name} | {program} | {made['seconds']:.0f} | {made['peak_mb']:,} |")
    for file in sorted((RESULTS / "benchmarks/compress" / MODEL).glob("*.tsv")):
        (job,) = csv.DictReader(file.read_text(encoding="utf-8").splitlines(), delimiter="\t")
        lines.append(f"| {file.stem} | ours | {float(job['s']):.0f} | {float(job['max_rss']):,.0f} |")
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return "\n".join([*lines, "", f"On {machine}. Loading the model is included."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=ROWS, help="rows to make; default: all")
    options = parser.parse_args()
    snakemake(f"results/peers/models/{MODEL}/source.json", WINDOWS)
    for row in options.only:
        make(row)
    snakemake()
    (RESULTS / "tables/cost.md").write_text(cost(), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
