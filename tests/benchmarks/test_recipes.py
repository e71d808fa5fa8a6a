"""The benchmark of recipes: one line a run, the same figures as the library gives, no run twice."""

import subprocess
import sys

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

import obr
from helpers.paths import ROOT


@pytest.mark.slow
def test_recipes_are_measured_once_and_as_the_library_does(tiny_folder, tmp_path):
    out = tmp_path / "runs.csv"
    command = [
        sys.executable, ROOT / "benchmarks" / "recipes.py", "--model", tiny_folder / "model", "--out", out,
        "--calibration", tiny_folder / "train.txt", "--test", tiny_folder / "heldout.txt", "--windows", "4",
        "--seqlen", "64", "--tokens", "256", "--length", "64", "--recipe", "method=dense",
        "--recipe", "method=gptq bits=3 column_order=hessian held_out=1",
    ]  # fmt: skip
    for _ in range(2):
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout == "", "what was measured is measured again"
    frame = pd.read_csv(out)
    assert list(frame["recipe"].str.split().str[0]) == ["method=dense", "method=gptq"]
    dense, gptq = frame.to_dict("records")
    assert dense["bits_per_weight"] == 16 and gptq["bits_per_weight"] == 3 and gptq["relative_error"] > 0
    assert gptq["held_out_error"] > 0 and gptq["peak_mb"] > 100 and gptq["threads"] == 1

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    text, test = ((tiny_folder / f"{name}.txt").read_text() for name in ("train", "heldout"))
    model = obr.load_model(tiny_folder / "model", device="cpu")
    windows = obr.evaluation_windows(tokenizer(test, return_tensors="pt").input_ids[0], 64, 256)
    assert dense["perplexity"] == pytest.approx(obr.perplexity(model, windows), rel=1e-6)
    tokens = obr.calibration_tokens(tokenizer, text, nsamples=4, seqlen=64)
    entry = {"method": "gptq", "bits": 3, "column_order": "hessian", "held_out": 1}
    obr.compress(model, tokens, entry, progress=False)
    assert gptq["perplexity"] == pytest.approx(obr.perplexity(model, windows), rel=1e-3)


@pytest.mark.slow
def test_layer_errors_are_those_of_the_library(tiny_folder, tmp_path):
    out = tmp_path / "layers.csv"
    command = [
        sys.executable, ROOT / "benchmarks" / "layer_errors.py", "--model", tiny_folder / "model", "--out", out,
        "--calibration", tiny_folder / "train.txt", "--blocks", "0", "1", "--windows", "4", "--seqlen", "64",
        "--every", "2", "--recipe", "method=rtn bits=4", "--recipe", "method=gptq bits=4 column_order=hessian",
    ]  # fmt: skip
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    frame = pd.read_csv(out)
    assert len(frame) == 2 * 2 * 4 and frame["relative_error"].between(0, 1).all()
    errors = frame.pivot(index=["block", "input"], columns="recipe", values="relative_error")
    rtn, gptq = sorted(errors, reverse=True)
    assert (errors[gptq] < errors[rtn]).all()


@pytest.mark.slow
def test_rotation_for_pruning_lowers_what_it_is_trained_for(tiny_folder, tmp_path):
    out = tmp_path / "rotations.csv"
    command = [
        sys.executable, ROOT / "benchmarks" / "pruning_rotation.py", "--model", tiny_folder / "model", "--out", out,
        "--calibration", tiny_folder / "train.txt", "--blocks", "0", "1", "--windows", "4", "--seqlen", "64",
        "--steps", "20", "--rows", "32", "--every", "8",
    ]  # fmt: skip
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    frame = pd.read_csv(out).set_index("rotation")
    assert len(frame) == 6
    for aim in ("pruned", "pruned and rounded"):
        column = aim.replace(" ", "_")
        assert frame.loc[f"{aim}, from Hadamard", column] < 0.95 * frame.loc["Hadamard", column]
        # Of all starts the gains of norms are in the weights, but not where there is no rotation.
        assert frame.loc[f"{aim}, from identity", column] < frame.loc["none", column]
