"""Released checkpoints: files in the layout of OBR's authors, written here from a rotated tiny model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import obr
from obr.checkpoint import load
from obr.errors import ObrError
from obr.layout import Layout
from obr.quantize import fake_quantize
from obr.recipe import QuantizerSettings, Recipe
from obr.released import adopt, distance_to_grid, download_released, spell

# 96 = 12 · 8: the transform before down_proj has a Hadamard matrix of order 12, which the file must bring along.
CONFIG = LlamaConfig(
    vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False, rms_norm_eps=1e-5,
)  # fmt: skip
RECIPE = Recipe.parse({"method": "released", "bits": 4, "sparsity": 0.5, "rotation": "quarot"})


def pruned_and_rounded(weight: torch.Tensor) -> torch.Tensor:
    """Half of every row removed, the rest on a 4-bit grid of one step a row, at 16 bits."""
    kept = weight.abs() > weight.abs().median(dim=1, keepdim=True).values
    return (fake_quantize(weight, QuantizerSettings(bits=4)) * kept).half()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the base model, the rotated and compressed model, its state dict in the authors' layout)."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "model")
    obr.rotate(model, "quarot", seed=5)
    state = {
        "model.embed_tokens.weight": model.model.embed_tokens.weight.half(),
        "lm_head.weight": model.lm_head.weight.half(),
    }
    model.model.embed_tokens.weight.data = state["model.embed_tokens.weight"].float()
    model.lm_head.weight.data = state["lm_head.weight"].float()
    state["model.norm.weight"] = torch.zeros(1)
    for index, block in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        state[f"{prefix}input_layernorm.weight"] = torch.zeros(1)
        state[f"{prefix}self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        wrapper = f"{prefix}self_attn.apply_rotary_pos_emb_qk_rotation_wrapper.k_quantizer"
        state |= {f"{wrapper}.{part}": torch.zeros(1) for part in ("maxq", "scale", "zero")}
        for name in Layout().linears:
            linear = block.get_submodule(name)
            weight = pruned_and_rounded(linear.weight.data)
            linear.weight.data = weight.float()
            state |= {f"{prefix}{name}.weight": weight, f"{prefix}{name}.module.weight": weight.clone()}
            state |= {f"{prefix}{name}.quantizer.{part}": torch.zeros(1) for part in ("maxq", "scale", "zero")}
        first = block.mlp.down_proj.transform.factors()[0]
        assert first.shape == (12, 12)
        state[f"{prefix}mlp.down_proj.had_K"] = (first * 12**0.5).float()
    return folder / "model", model, state


def written(folder, state, safe: bool = False, wrapped: bool = False):
    """A downloaded released checkpoint in `folder`."""
    source = folder / "hub"
    source.mkdir(parents=True)
    if safe:
        save_file({name: t.contiguous() for name, t in state.items()}, source / "model.safetensors")
    else:
        torch.save({"model": state} if wrapped else state, source / "pytorch_model.bin")
    download_released({"source": "path", "path": str(source)}, folder / "released")
    return folder / "released"


@pytest.mark.parametrize(
    "form", [{}, {"safe": True}, {"wrapped": True}], ids=["bin", "safetensors", "saved by QuaRot"]
)
def test_the_adopted_model_computes_what_the_released_one_does(made, tmp_path, form):
    folder, model, state = made
    manifest = adopt(folder, written(tmp_path, state, **form), RECIPE, tmp_path / "out")
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        expected, found = model(tokens).logits, load(tmp_path / "out", device="cpu")(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert manifest["bits_per_weight"]["theoretical"] == 3.0 and 8.5 < manifest["bits_per_weight"]["file"] < 9.5
    verified = json.loads((tmp_path / "out/manifest.json").read_text())["released"]
    assert verified["rows"] == 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert 3 <= verified["levels"] <= 16 and verified["off_grid"] == 0
    assert 0.5 <= verified["least_zeros"] <= verified["most_zeros"] < 1
    assert "0 rows off a grid" in spell(manifest)


def test_without_the_files_own_hadamard_matrix_the_model_would_be_another(made, tmp_path):
    """Another matrix of order 12 is as orthogonal, and wrong."""
    folder, model, state = made
    other = {k: v.roll(1, 0) if k.endswith("had_K") else v for k, v in state.items()}
    adopt(folder, written(tmp_path, other), RECIPE, tmp_path / "out")
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert (load(tmp_path / "out", device="cpu")(tokens).logits - model(tokens).logits).abs().max() > 1e-2


def missing(name):
    return lambda state: {k: v for k, v in state.items() if name not in k}


def changed(name, change):
    return lambda state: {k: change(v) if k.endswith(name) else v for k, v in state.items()}


def both_weights(change):
    return lambda state: {k: change(v) if Q in k and k.endswith(".weight") else v for k, v in state.items()}


def all_kept(weight):
    return torch.where(weight == 0, weight.abs().max() / 7, weight)


def too_fine(weight):
    return weight + (weight != 0) * torch.linspace(0, 0.001, weight.numel()).view_as(weight).half()


Q = "layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, sentence",
    [
        (missing(f"{Q}."), r"has no 'model.layers.1.self_attn.q_proj.weight'; it is not a whole released"),
        (missing("lm_head"), r"has no 'lm_head.weight'"),
        (missing("had_K"), r"has no mlp.down_proj.had_K, but 96 is no power of two"),
        (lambda s: s | {"model.layers.0.more": torch.ones(1)}, r"1 unexpected tensors, such as 'model.layers.0.more"),
        (lambda s: s | {"model.layers.2.mlp.up_proj.weight": torch.ones(1)}, r"unexpected tensors"),
        (changed(f"{Q}.weight", lambda w: w * 2), r"the two weights of model.layers.1.self_attn.q_proj differ"),
        (changed("embed_tokens.weight", lambda w: w[:9]), r"shape \(9, 64\), the model needs \(160, 64\)"),
        (changed("input_layernorm.weight", lambda w: torch.rand(64)), r"input_layernorm has a weight"),
        (both_weights(all_kept), r"% zeros, fewer than the 50.00 %"),
        (both_weights(too_fine), r"different values, more than the 16 of 4 bits"),
    ],
)  # fmt: skip
def test_whatever_is_not_as_released_is_refused(made, tmp_path, change, sentence):
    folder, _, state = made
    with pytest.raises(ObrError, match=sentence):
        adopt(folder, written(tmp_path, change(state)), RECIPE, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


class Planted:
    """What a pickle might run."""


def test_pickles_with_more_than_tensors_are_not_loaded(made, tmp_path):
    folder, _, state = made
    released = written(tmp_path, state | {"w_quantizers": Planted()})
    with pytest.raises(ObrError, match="holds more than plain tensors"):
        adopt(folder, released, RECIPE, tmp_path / "out")
    shutil.rmtree(tmp_path / "hub")
    (tmp_path / "hub").mkdir()
    with pytest.raises(ObrError, match="holds neither pytorch_model"):
        adopt(folder, released, RECIPE, tmp_path / "out")


def test_distance_to_a_grid():
    steps = torch.tensor([[-8.0, 3, 0, 7], [-7, 3, 0, 7], [5, 2, 0, 1]]) * torch.tensor([[0.013], [0.5], [2.0]])
    assert distance_to_grid(steps.half(), 4).max() < 0.01
    assert distance_to_grid(torch.tensor([[0.0, 7.0, 3.4, 1.55, 6.2, 2.3, 4.9]]), 4) > 0.1
