"""Learners on families other than Llama: the loss falls, and what was learned changes nothing at 16 bits."""

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


def learned(model, kind: str, folder):
    model.save_pretrained(folder / "model")
    windows = torch.randint(1, 64, (6, 16), generator=torch.Generator().manual_seed(0))
    write_tokens(windows, {"nsamples": 6, "seqlen": 16, "tokens": 96}, folder / "tokens.safetensors")
    learn = {"calibration": "c", "held_out": 2, "quantise": LOW, **SETTINGS[kind]}
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


def test_no_rotation_is_learned_through_experts(tmp_path, capsys):
    rotation = learned(random_model(EXPERTS["mixtral"], torch.float32), "spinquant", tmp_path)
    assert (
        rotation.about()["asked"] == "spinquant"
        and "no rotation is learned through experts" in capsys.readouterr().err
    )
