"""Peak resident memory of each stage against the number of blocks of the model.

Blocks are streamed, so depth should not matter. Models of SmolLM2-135M's sizes with random weights, but with a
vocabulary of 8,192: beside embeddings of 49,152 tokens it would not show if all 30 blocks stayed in memory.
"""

import shutil
from pathlib import Path

from models import SMOLLM2_135M, evaluation, write_inputs
from peak import run_stage
from timing import machine

SIZES = {**SMOLLM2_135M, "vocab_size": 8192}
RECIPE = {"method": "obr_gptq", "calibration": "random", "rotation": "quarot"}


def measure(scratch: Path, depths: list[int], sizes: dict = SIZES, windows: int = 8, seqlen: int = 512):
    """Rows (blocks, stage, peak_mb, seconds); scratch: a folder that is removed afterwards."""
    rows = []
    for depth in depths:
        folder = scratch / f"depth_{depth}"
        try:
            peaks = measure_model(folder, {**sizes, "num_hidden_layers": depth}, windows, seqlen)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        rows += [{"blocks": depth, **row, **machine()} for row in peaks]
    return rows


def measure_model(folder: Path, sizes: dict, windows: int, seqlen: int) -> list[dict]:
    """The peaks of every stage for one random model, written to `folder`."""
    inputs, hessians = write_inputs(folder, sizes, windows, seqlen), folder / "hessians"
    cached, sequential = folder / "cached", folder / "sequential"
    rotated = ["--model", inputs.model, "--rotation", inputs.rotation]
    stages = {
        "Hessians": ["hessian", *rotated, "--tokens", inputs.tokens, "--out", hessians],
        "Compression, cached": [
            "compress", "--recipe", {**RECIPE, "hessian": "cached"}, *rotated, "--hessians", hessians,
            "--out", cached,
        ],
        "Compression, sequential": [
            "compress", "--recipe", {**RECIPE, "hessian": "sequential"}, *rotated, "--tokens", inputs.tokens,
            "--out", sequential,
        ],
        "Evaluation": [
            "evaluate", sequential, *evaluation(inputs, windows, seqlen), "--out", folder / "scores.json",
        ],
    }  # fmt: skip
    threads = ["--threads", machine()["threads"]]
    return [{"stage": name, **run_stage(*command, *threads)} for name, command in stages.items()]
