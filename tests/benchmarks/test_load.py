"""Many at once: readers of one checkpoint see the same weights, and every further recipe costs the same planning."""

import hashlib
import importlib
import os
import pstats
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers.paths import ROOT
from helpers.random_llama import random_llama
from obr.checkpoints.format import CheckpointBlocks
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """The module of the benchmarks."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("load")
    sys.modules.pop("load", None)


@pytest.mark.slow
@pytest.mark.workflow
def test_planning_costs_as_much_for_every_further_recipe(load, tmp_path):
    """In calls of functions, which no other work on the machine changes."""
    jobs, calls = [], []
    for count in (10, 40, 70):
        profile = tmp_path / f"{count}.prof"
        run = load.snakemake(
            tmp_path, load.config_of(count), "--dry-run", "--quiet", "rules",
            python=("-m", "cProfile", "-o", str(profile)),
        )  # fmt: skip
        jobs.append(run["jobs"])
        calls.append(pstats.Stats(str(profile)).total_calls)
    # Beside compressions and perplexities: model, check, rotation, two texts, windows, one set of Hessians, table,
    # and `all`.
    assert jobs == [2 * count + 9 for count in (10, 40, 70)]
    assert calls[2] - calls[1] < 1.15 * (calls[1] - calls[0]), calls


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("load")
    random_llama(
        3, vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1
    ).save_pretrained(folder / "model")
    compress_stage(folder / "model", Recipe.parse({"method": "magnitude"}), folder / "c", device="cpu")
    return folder / "c"


@pytest.mark.slow
def test_readers_at_once_read_what_one_alone_reads(checkpoint, tmp_path):
    command = [sys.executable, str(FOLDER / "load.py"), "readers", str(checkpoint), "--counts", "64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    alone, together = pd.read_csv(tmp_path / "load_readers.csv").to_dict("records")
    assert (alone["readers"], together["readers"]) == (1, 64) and alone["sha256"] == together["sha256"]
    assert together["private_mb_each"] < alone["private_mb_each"] + 20
    blocks = CheckpointBlocks(checkpoint, dtype=torch.float32, device="cpu")
    found = hashlib.sha256()
    for index in range(len(blocks)):
        for name, tensor in sorted(blocks.load(index).state_dict().items()):
            found.update(name.encode() + tensor.numpy().tobytes())
    assert found.hexdigest() == alone["sha256"]
