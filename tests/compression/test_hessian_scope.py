"""Hessians of a whole block, collected before any of its layers changes."""

import pytest
import torch
from safetensors.torch import save_file

import obr
from helpers.random_llama import random_llama
from obr.calibration.collect_hessians import inputs_of
from obr.compression.recompute import Places, repeat
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.methods.restore import restore
from obr.models.blocks import Blocks, run_block

RECIPE = {"method": "gptq", "bits": 3, "calibration": "c"}
BLOCK = {"hessian_scope": "block"}


def model_of():
    return random_llama(initializer_range=0.1)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 128, (12, 64), generator=torch.Generator().manual_seed(0))


def layers_of(model) -> dict[str, torch.Tensor]:
    return {name: layer.weight.clone() for name, layer in model.named_modules() if name.endswith("_proj")}


def test_layers_see_compressed_blocks_but_none_of_their_own_block(tokens):
    """Every layer is what its method makes of a Hessian summed in float64 over the inputs that it should see."""
    found = obr.compress(model_of(), tokens, {**RECIPE, **BLOCK}, progress=False)
    dense, done = Blocks(model_of()), Blocks(found)
    hidden, arguments = dense.embed(tokens)
    for index in range(2):
        block = dense.load(index)
        for name in dense.layout.linears:
            x = torch.cat([inputs_of(block, name, states, arguments[index]) for states in hidden]).double()
            weight = block.get_submodule(name).weight
            expected = restore(weight, (x.T @ x / 6).float(), "gptq", bits=3)
            codes = (done.load(index).get_submodule(name).weight / expected.scale).round()
            assert (codes == expected.codes).float().mean() > 0.995, (index, name)
        for i, states in enumerate(hidden):
            hidden[i] = run_block(done.load(index), states, arguments[index])


def test_first_group_of_a_block_is_the_same_in_both_scopes(tokens):
    group, block = (layers_of(obr.compress(model_of(), tokens, {**RECIPE, **o}, progress=False)) for o in ({}, BLOCK))
    same = [name for name in group if torch.equal(group[name], block[name])]
    assert same == [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"]


@pytest.mark.parametrize("options", [{"asymmetry": 0.5}, {"held_out": 3}, {"hessian_inputs": "quantised"}], ids=str)
def test_block_scope_goes_with_other_statistics(options, tokens):
    """The first group sees the same as alone; the others differ."""
    entry = {**RECIPE, **options, "activations": {"bits": 6}}
    group, block = (obr.compress(model_of(), tokens, {**entry, **o}, progress=False) for o in ({}, BLOCK))
    rows = zip(group.obr_report.layers, block.obr_report.layers, strict=True)
    same = [one.layer for one, other in rows if one.block == 0 and one.relative_error == other.relative_error]
    assert same == [f"self_attn.{kind}_proj" for kind in "qkv"]
    held = [row.held_out_error for row in block.obr_report.layers]
    assert all((error == error) == ("held_out" in options) for error in held)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"asymmetry": 0.5}], ids=str)
def test_recompute_reproduces_layers_of_block_scope(options, tokens, tmp_path):
    model_of().save_pretrained(tmp_path / "model")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors", metadata={"calibration": "{}"})
    out = tmp_path / "m" / "out"
    recipe = Recipe.parse({**RECIPE, **BLOCK, **options})
    compress_stage(tmp_path / "model", recipe, out, tokens=tmp_path / "tokens.safetensors", device="cpu")
    again = repeat(out, 5, Places(tmp_path / "model", None, tmp_path / "tokens.safetensors"), device="cpu")
    assert len(again) == 5 and all(layer.identical for layer in again)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hessian_scope": "model"}, "r.hessian_scope is 'model'; choose one of group, block"),
        (
            {**BLOCK, "hessian": "cached"},
            "r.hessian_scope is block, but cached Hessians know the dense model's inputs",
        ),
        ({**BLOCK, "method": "rtn"}, "r.hessian_scope is block, but method rtn reads no activations"),
    ],
)
def test_a_scope_without_an_effect_is_refused(options, sentence):
    with pytest.raises(ObrError, match=sentence):
        Recipe.parse({**RECIPE, **options}, "r")
