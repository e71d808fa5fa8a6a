"""The same model by llm-compressor, GPTQModel and AutoRound beside ours: one table, one command.

    python benchmarks/peers/run.py [--only external-w4-gptqmodel ...] [--jobs 2]      (make peers)

Each program quantises in its own environment, .peers/NAME, from the calibration windows that ours read. Its
checkpoint lies in results/peers/external/ROW and is evaluated by the same stages. results/peers/tables/beside.md and
beside.csv have the scores, bits, processor time and peak memory of each. What is there already is not made again.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import beside
from measure import measure

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
RESULTS = ROOT / "results/peers"
COSTS = RESULTS / "costs"
MODEL, WINDOWS = "smollm2-135m", "results/peers/calibration/sotu/smollm2-135m.safetensors"
CONFIG = "config/experiments/peers.yaml"
TITLE = "SmolLM2-135M by this project and by others"
# Recipe -> program and settings; the recipes of config/recipes/peers.tsv name the folders.
ROWS = {
    "external-w4-llmcompressor": ["llmcompressor", "--bits", "4"],
    "external-w4-gptqmodel": ["gptqmodel", "--bits", "4"],
    "external-w4-gptqmodel-ordered": ["gptqmodel", "--bits", "4", "--ordered"],
    "external-w3-llmcompressor": ["llmcompressor", "--bits", "3"],
    "external-w3-gptqmodel": ["gptqmodel", "--bits", "3"],
    "external-w3-gptqmodel-ordered": ["gptqmodel", "--bits", "3", "--ordered"],
    "external-w4s50-llmcompressor": ["llmcompressor", "--bits", "4", "--sparsity", "0.5"],
    "external-w4-llmcompressor-mse": ["llmcompressor", "--bits", "4", "--observer", "mse"],
    "external-w3-llmcompressor-mse": ["llmcompressor", "--bits", "3", "--observer", "mse"],
    "external-w4g64-gptqmodel": ["gptqmodel", "--bits", "4", "--group", "64"],
    "external-w4g64-autoround": ["autoround", "--bits", "4", "--group", "64", "--iters", "50"],
}
# One thread each: times are then the processor's, which other work on the machine hardly changes.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "NUMEXPR_NUM_THREADS")
SINGLE = dict.fromkeys(THREADS, "1") | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
# The program `obr` that jobs call: compressions are measured, other stages are not.
MEASURED_OBR = """#!/bin/sh
[ "$1" = compress ] || exec {obr} "$@"
for word; do [ "$last" = --out ] && name=$(basename "$word"); last=$word; done
exec {python} {measure} {costs}/"$name".json {obr} "$@"
"""


def measured_obr(folder: Path, program: str, costs: Path) -> Path:
    """A program `obr` in `folder` that calls `program` and writes costs/RECIPE.json of each compression."""
    places = {"obr": program, "python": sys.executable, "measure": FOLDER / "measure.py", "costs": costs}
    shim = folder / "obr"
    text = MEASURED_OBR.format(**{key: shlex.quote(str(value)) for key, value in places.items()})
    shim.write_text(text, encoding="utf-8")
    shim.chmod(0o755)
    return shim


def snakemake(*targets: str) -> None:
    """Run the workflow, which finds the measured `obr` on its path."""
    command = ["snakemake", "--cores", "all", "--configfile", CONFIG, "--", *targets]
    with tempfile.TemporaryDirectory() as folder:
        measured_obr(Path(folder), shutil.which("obr"), COSTS)
        env = os.environ | SINGLE | {"PATH": f"{folder}:{os.environ['PATH']}"}
        subprocess.run(command, cwd=ROOT, env=env, check=True)


def folder_of(row: str) -> str:
    return row.removeprefix("external-")


def make(row: str) -> None:
    """Quantise by another program, unless that is done."""
    program, *settings = ROWS[row]
    out = RESULTS / "external" / folder_of(row)
    if (COSTS / f"{row}.json").is_file():
        return
    shutil.rmtree(out, ignore_errors=True)
    command = [ROOT / ".peers" / program / "bin/python", FOLDER / "make.py", program]
    command += [RESULTS / "models" / MODEL, ROOT / WINDOWS, out, *settings]
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | SINGLE
    log = RESULTS / "logs" / f"{row}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, since GPTQModel writes logs/ where it runs.
    with tempfile.TemporaryDirectory() as scratch, log.open("w", encoding="utf-8") as written:
        said = {"stdout": written, "stderr": subprocess.STDOUT}
        status, used = measure(list(map(str, command)), env=plain, cwd=scratch, **said)
    if status:
        raise SystemExit(f"{row}: {program} ended with status {status}, see {log}")
    used["program"] = json.loads((out / "made.json").read_text(encoding="utf-8"))["program"]
    (COSTS / f"{row}.json").write_text(json.dumps(used) + "\n", encoding="utf-8")
    print(row, used, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=ROWS, help="rows to make; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="programs at a time")
    options = parser.parse_args()
    COSTS.mkdir(parents=True, exist_ok=True)
    snakemake(f"results/peers/models/{MODEL}/source.json", WINDOWS)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(make, options.only))
    snakemake()
    rows = beside.collect(RESULTS / "tables/peers.csv", COSTS)
    beside.write(rows, RESULTS / "tables/beside", TITLE)
    print((RESULTS / "tables/beside.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
