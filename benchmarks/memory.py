"""Peak resident memory of collecting Hessians, compressing and evaluating, against the number of blocks.

    python benchmarks/memory.py --out results/benchmarks

Models of SmolLM2-135M's sizes with random weights; each stage runs as its own process, as in the workflow, and the
operating system says what it took at most. Blocks are streamed, so depth should not matter.
"""

import argparse
import json
import multiprocessing
import resource
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

RECIPE = {"method": "obr_gptq", "calibration": "random", "rotation": "quarot"}


def make_model(folder: Path, blocks: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=blocks, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder / "model")
    tokens = torch.randint(0, 49152, (8, 512))
    save_file({"tokens": tokens}, folder / "tokens.safetensors", metadata={"calibration": "{}"})


def peak_of(command: list[str]) -> float:
    """Peak resident memory in MB of a command and its children, measured in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (command,))


def _run(command: list[str]) -> float:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def measure(folder: Path, blocks: int) -> dict:
    make_model(folder, blocks)
    model, rotation, tokens = folder / "model", folder / "rotation.safetensors", folder / "tokens.safetensors"
    obr = [sys.executable, "-m", "obr.cli"]
    subprocess.run(
        [*obr, "download-rotation", "--entry", '{"kind": "quarot"}', "--model", model, "--out", rotation], check=True
    )
    row = {"blocks": blocks}
    common = ["--model", model, "--rotation", rotation]
    row["hessian_mb"] = peak_of([*obr, "hessian", *common, "--tokens", tokens, "--out", folder / "hessians"])
    for kind, statistics in (("cached", ["--hessians", folder / "hessians"]), ("sequential", ["--tokens", tokens])):
        entry = json.dumps({**RECIPE, "hessian": kind})
        command = [*obr, "compress", "--entry", entry, *common, *statistics, "--out", folder / kind]
        row[f"compress_{kind}_mb"] = peak_of(command)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16, 30])
    arguments = parser.parse_args()
    rows = [measure(arguments.out / f"depth_{blocks}", blocks) for blocks in arguments.blocks]
    frame = pd.DataFrame(rows)
    frame.to_csv(arguments.out / "memory.csv", index=False)
    print(frame.to_string(index=False, float_format="{:.0f}".format))


if __name__ == "__main__":
    main()
