"""Learners on families other than Llama: the loss falls, and what was learned changes nothing at 16 bits."""

import csv

import pytest
import torch

import obr
from helpers.family_models import EXPERTS, FAMILIES, TOKENS, random_model
from obr.data.token_windows import write_tokens
from obr.models.architectures import Dimensions
from obr.rotations import registry
from obr.rotations.learning.registry import learn_rotation

pytestmark = pytest.mark.slow

LOW = {"bits": 4, "activations": {"bits": 4}, "keys": {"bits": 4}, "values": {"bits": 4}}
SETTINGS = {
    "flatquant": {"epochs": 2, "batch": 2},
    "omniquant": {"epochs": 2, "batch": 2},
    "awq": {},
    "smoothquant": {},
    "spinquant": {"steps": 2, "batch": 2},
    "ostquant": {"steps": 2, "batch": 2},
}
CASES = [
    ("gemma2", "flatquant"),
    ("gemma2", "awq"),
    ("gemma3", "omniquant"),
    ("gemma3", "smoothquant"),
    ("glm4", "flatquant"),
    ("phi3, part of RoPE", "flatquant"),
    ("phi3, part of RoPE", "omniquant"),
    ("phi3, part of RoPE", "spinquant"),
    ("phi3, part of RoPE", "ostquant"),
    ("phi3, part of RoPE", "awq"),
]


OF_EXPERTS = [(family, kind) for family in ("qwen3_moe, a dense block", "deepseek_v3") for kind in SETTINGS]
OF_EXPERTS += [("qwen2_moe, shared", "flatquant"), ("qwen2_moe, shared", "awq"), ("mixtral", "omniquant")]


def learned(model, kind: str, folder, quantise=LOW):
    model.save_pretrained(folder / "model")
    windows = torch.randint(1, 64, (6, 16), generator=torch.Generator().manual_seed(0))
    write_tokens(windows, {"nsamples": 6, "seqlen": 16, "tokens": 96}, folder / "tokens.safetensors")
    learn = {"calibration": "c", "held_out": 2, "quantise": quantise, **SETTINGS[kind]}
    learn_rotation(
        {"kind": kind, "learn": learn},
        folder / "model",
        folder / "tokens.safetensors",
        folder / "r.safetensors",
        "cpu",
    )
    return registry.load(folder / "r.safetensors", Dimensions.of(model.config))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_learned_rotations_change_nothing_at_16_bits(family, kind, tmp_path):
    model = random_model(FAMILIES[family], torch.float32)
    rotation = learned(model, kind, tmp_path)
    assert rotation.kind != "none" and (tmp_path / "r.csv").read_text().count("\n") > 2
    before = model(TOKENS).logits
    obr.rotate(model, rotation)
    assert float((model(TOKENS).logits - before).abs().max() / before.abs().max()) < 1e-3


@pytest.mark.parametrize(("family", "kind"), OF_EXPERTS)
def test_rotations_learned_through_experts_change_nothing_at_16_bits(family, kind, tmp_path):
    """Blocks of either sort are learned: every expert has parameters of its own, also those that got no tokens."""
    model = random_model(EXPERTS[family], torch.float32)
    kept = ("bits", "activations") if "deepseek" in family else LOW
    quantise = {name: LOW[name] for name in kept}
    rotation = learned(model, kind, tmp_path, quantise)
    assert rotation.kind != "none" and (tmp_path / "r.csv").read_text(encoding="utf-8").count("\n") > 2
    of_experts = {n: p for n, p in rotation.parameters.items() if n.startswith("blocks.1.experts.")}
    assert all(len(p) == Dimensions.of(model.config).experts for n, p in of_experts.items() if "scale" in n)
    assert bool(of_experts) == (kind in ("flatquant", "ostquant", "awq"))
    before = model(TOKENS).logits
    obr.rotate(model, rotation)
    assert float((model(TOKENS).logits - before).abs().max() / before.abs().max()) < 1e-3


@pytest.mark.parametrize("kind", ["flatquant", "ostquant"])
def test_learning_through_experts_lowers_the_error(kind, tmp_path):
    model = random_model(EXPERTS["qwen3_moe, a dense block"], torch.float32)
    learned(model, kind, tmp_path)
    with open(tmp_path / "r.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    last = [row for row in rows if row.get("block", "1") == "1"]
    assert float(last[-1]["held_out"]) < float(last[0]["held_out"])
