"""What many at once cost: readers of one checkpoint, recipes over one set of Hessians, artefacts in a results folder.

    python benchmarks/load.py readers results/demo/compressed/smollm2-135m/obr_gptq   # 64 processes read it
    python benchmarks/load.py recipes      # snakemake -n: 10, 50, 100 and 200 recipes, nothing made yet
    python benchmarks/load.py artefacts    # snakemake -n: up to 10,000 finished files

Each writes a CSV file to --out, the last two with a figure (PDF, PNG).
"""

import argparse
import copy
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import yaml

from obr.errors import ObrError
from obr.runtime.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "results/load"


# --- Readers ----------------------------------------------------------------------------------------------


def read(checkpoint: Path, blocks: int | None, start, answers) -> None:
    """Load every block, once all readers are there; tell a hash of all weights, CPU seconds, private memory."""
    import torch

    from obr.checkpoints.format import CheckpointBlocks

    torch.set_num_threads(1)
    start.wait()
    opened = CheckpointBlocks(checkpoint, dtype=torch.float32, device="cpu")
    found, private = hashlib.sha256(), 0
    for index in range(len(opened) if blocks is None else min(blocks, len(opened))):
        for name, tensor in sorted(opened.load(index).state_dict().items()):
            found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        private = max(private, _private())
    answers.put({"sha256": found.hexdigest(), "cpu_s": time.process_time(), "private_mb": private / 1e6})


def _private() -> int:
    """Bytes of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def readers(checkpoint: Path, count: int, blocks: int | None = None) -> list[dict]:
    """A row for one reader alone and one for `count` at a time, each in a process of its own.

    Raises:
        ObrError: two of them have read different weights.
    """
    import torch

    from obr.checkpoints.format import CheckpointBlocks

    torch.set_num_threads(1)  # threads would not survive the fork
    CheckpointBlocks(checkpoint, dtype=torch.float32, device="cpu")  # imports what all need, once
    fork, rows, seen = multiprocessing.get_context("fork"), [], set()
    for together in (1, count):
        start, answers = fork.Barrier(together + 1), fork.SimpleQueue()
        processes = [fork.Process(target=read, args=(checkpoint, blocks, start, answers)) for _ in range(together)]
        for process in processes:
            process.start()
        start.wait()
        began = time.perf_counter()
        told = [answers.get() for _ in processes]
        seconds = time.perf_counter() - began
        for process in processes:
            process.join()
        seen |= {answer["sha256"] for answer in told}
        if len(seen) != 1:
            raise ObrError(f"{together} readers of {checkpoint} have read {len(seen)} different sets of weights.")
        rows.append(
            {
                "readers": together, "seconds": seconds, "cpu_s_each": sum(a["cpu_s"] for a in told) / together,
                "private_mb_each": max(a["private_mb"] for a in told), "sha256": seen.copy().pop(),
            }
        )  # fmt: skip
    return rows


# --- Dry runs ---------------------------------------------------------------------------------------------


def config_of(recipes: int, texts: int = 1) -> dict:
    """The tests' tiny workflow with so many recipes, which differ in alpha and share Hessians, and evaluations."""
    config = copy.deepcopy(yaml.safe_load((ROOT / "tests/config.yaml").read_text(encoding="utf-8")))
    entry = {"method": "obr_gptq", "rotation": "quarot", "calibration": "train", "hessian": "cached"}
    config["recipes"] = {f"r{n}": {**entry, "alpha": n / recipes} for n in range(recipes)}
    config["perplexity"] = {
        f"t{n}": {"text": "heldout", "seqlen": 128, "tokens": 128 * (n + 1)} for n in range(texts)
    }
    table = {"title": "Load", "models": ["tiny"], "rows": [*config["recipes"]], "perplexity": [*config["perplexity"]]}
    return config | {"tables": {"load": table}, "figures": {}, "zero_shot": {}, "results": RESULTS}


def snakemake(folder: Path, config: dict, *arguments: str, python: tuple[str, ...] = ()) -> dict:
    """Run Snakemake in a folder: {"jobs", "seconds", "cpu_s", "peak_mb"}; python: options of the interpreter.

    Raises:
        ObrError: it failed; what it printed is in the message.
    """
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for name in ("model", "train.txt", "heldout.txt"):  # what the config names must be there
        (folder / name).touch()
    command = [sys.executable, *python, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", folder]
    command += ["--configfile", folder / "config.yaml", "--cores", "1", *arguments]
    own = {"OBR_TINY": str(folder), "PYTHONPATH": str(ROOT / "workflow"), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | own)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        output.seek(0)
        printed = output.read()
    if os.waitstatus_to_exitcode(status):
        raise ObrError(f"Snakemake failed under the benchmark: {printed.strip()[-1000:]}")
    totals = [line.split()[1] for line in printed.splitlines() if line.startswith("total ")]
    jobs = int(totals[0]) if totals else 0
    cpu = used.ru_utime + used.ru_stime
    return {"jobs": jobs, "seconds": seconds, "cpu_s": cpu, "peak_mb": used.ru_maxrss * 1024 / 1e6}


def recipes(counts: list[int]) -> list[dict]:
    """Dry runs with nothing made yet."""
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(
                {"recipes": count, **snakemake(Path(folder), config_of(count), "--dry-run", "--quiet", "rules")}
            )
        print(rows[-1], flush=True)
    return rows


def artefacts(counts: list[int], texts: int = 8) -> list[dict]:
    """Dry runs over folders with so many finished files, each on record with Snakemake, so that all are compared."""
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            # Code is left out: whoever works on it meanwhile would have everything run again.
            folder, config = Path(name), config_of(count // (texts + 2), texts) | {"track_code": False}
            made = _pretend(folder, config)
            snakemake(folder, config, "--touch", "--quiet", "all", "--max-jobs-per-timespan", "10000/1s")
            rows.append(
                {"artefacts": made, "recipes": len(config["recipes"]), **snakemake(folder, config, "--dry-run")}
            )
        print(rows[-1], flush=True)
    return rows


def _pretend(folder: Path, config: dict) -> int:
    """Empty files in place of all results; returns their number."""
    paths = ["models/tiny/config.json", "models/tiny/source.json", "models/tiny.checked.json"]
    paths += [f"texts/{text}.{kind}" for text in config["texts"] for kind in ("txt", "json")]
    paths += ["rotations/quarot/tiny.safetensors", "calibration/train/tiny.safetensors", "tables/load.csv"]
    paths += ["hessians/tiny/quarot/train/hessian.json", "tables/load.md", "tables/load.tex"]
    for recipe in config["recipes"]:
        paths += [f"compressed/tiny/{recipe}/manifest.json", f"manifests/tiny/{recipe}.json"]
        paths += [f"layers/tiny/{recipe}.csv", f"evaluations/tiny/{recipe}/a16.json"]
    for path in paths:
        place = folder / RESULTS / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    sizes = {"num_attention_heads": 3, "hidden_size": 96, "intermediate_size": 192}
    (folder / RESULTS / "models/tiny/config.json").write_text(json.dumps(sizes), encoding="utf-8")
    return len(paths)


def draw(frame: pd.DataFrame, stem: Path) -> None:
    """Time and memory against the first column, with a straight line through the ends' neighbours."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    from obr.report.figures.canvas import COLOURS, PAGE, STYLE

    size, values = frame.columns[0], {"cpu_s": "CPU time (s)", "peak_mb": "Peak memory (MB)"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAGE, 2.6), layout="constrained")
        for axes, (column, label), colour in zip(figure.subplots(1, 2), values.items(), COLOURS, strict=False):
            line = np.polyfit(frame[size], frame[column], 1)
            axes.plot(frame[size], np.polyval(line, frame[size]), "--", color=colour, linewidth=0.8, alpha=0.7)
            axes.plot(frame[size], frame[column], "o", color=colour)
            limits = {"xlim": (0, 1.05 * frame[size].max()), "ylim": (0, 1.1 * frame[column].max())}
            axes.set(xlabel=size.capitalize(), ylabel=label, **limits)
            axes.set_title(f"{line[1]:.3g} + {line[0]:.3g} a {'recipe' if size == 'recipes' else 'file'}")
        for suffix in ("pdf", "png"):
            with atomic_write(stem.with_suffix(f".{suffix}")) as partial:
                figure.savefig(partial, format=suffix, dpi=200)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("readers", "recipes", "artefacts"))
    parser.add_argument("checkpoint", type=Path, nargs="?", help="for readers")
    parser.add_argument("--counts", type=int, nargs="+", help="default: 64; 10 50 100 200; 1000 2500 5000 10000")
    parser.add_argument("--blocks", type=int, help="of the checkpoint that are read; default: all")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    arguments = parser.parse_args()
    if arguments.what == "readers" and arguments.checkpoint is None:
        parser.error("readers wants a checkpoint")
    try:
        if arguments.what == "readers":
            rows = readers(arguments.checkpoint, *(arguments.counts or [64]), blocks=arguments.blocks)
        elif arguments.what == "recipes":
            rows = recipes(arguments.counts or [10, 50, 100, 200])
        else:
            rows = artefacts(arguments.counts or [1000, 2500, 5000, 10000])
    except ObrError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    frame, stem = pd.DataFrame(rows), arguments.out / f"load_{arguments.what}"
    with atomic_write(stem.with_suffix(".csv")) as partial:
        frame.to_csv(partial, index=False)
    if arguments.what != "readers":
        draw(frame, stem)
    print(frame.to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
