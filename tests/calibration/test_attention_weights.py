"""Attention weights: against transformers' own attention, in the Hessians of q, k and v, and their price."""

import pytest
import torch

import obr
from helpers.family_models import EXPERTS, FAMILIES, random_model
from helpers.random_llama import random_llama
from obr.calibration.attention_weights import ATTENDED, attention_weights
from obr.calibration.collect_hessians import inputs_of
from obr.calibration.token_weights import token_weights
from obr.config.recipe import Recipe
from obr.methods.restore import restore
from obr.models.blocks import Blocks, run_block
from obr.planning import cost_model
from obr.planning.tensor_sizes import Sizes

RECIPE = {"method": "gptq", "bits": 3, "calibration": "c", "attention_weights": 0.75}
LENGTH = 24


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 60, (3, LENGTH), generator=torch.Generator().manual_seed(0))


def by_transformers(model, tokens) -> list[torch.Tensor]:
    """(b, s) of each block: the mean attention that a token gets, from transformers' eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        shares = model(tokens, output_attentions=True, use_cache=False).attentions
    return [share.float().mean(1).sum(1) / torch.arange(tokens.shape[1], 0, -1) for share in shares]


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_weights_are_the_attention_received(family, tokens):
    """Of the second block, whose inputs the first has changed; groups of heads, sliding windows and caps included."""
    config = {**FAMILIES, **EXPERTS}[family]
    expected = by_transformers(random_model(config).float(), tokens)[1]
    blocks = Blocks(random_model(config).float())
    hidden, arguments = blocks.embed(tokens)
    for number, states in enumerate(hidden):
        hidden[number] = run_block(blocks.load(0), states, arguments[0])
    found = attention_weights(blocks.load(1), blocks.layout_at(1), hidden, arguments[1], 0.75)
    wanted = 0.25 + 0.75 * expected / expected.mean(1, keepdim=True)
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)
    assert torch.allclose(found.mean(1), torch.ones(len(tokens)), atol=1e-5) and found.std() > 0.01
    assert not hasattr(blocks.load(1).self_attn, "attention_observer")


@pytest.mark.parametrize("extra", [{}, {"hessian_scope": "block"}, {"held_out": 1}, {"token_weights": 0.5}])
def test_queries_keys_and_values_are_restored_with_weighted_sums(tokens, extra):
    """Of the first block, whose inputs no layer has changed; its other groups keep plain sums."""
    model = random_llama(initializer_range=0.1)
    done = Blocks(obr.compress(random_llama(initializer_range=0.1), tokens, {**RECIPE, **extra}, progress=False))
    blocks, used = Blocks(model), tokens[: len(tokens) - extra.get("held_out", 0)]
    hidden, arguments = blocks.embed(used)
    weights = attention_weights(blocks.load(0), blocks.layout, hidden, arguments[0], 0.75).double()
    if extra.get("token_weights"):
        weights *= token_weights(Blocks(random_llama(initializer_range=0.1)), tokens, 0.5, progress=False)[0, "qkv"]
    block = blocks.load(0)
    x = torch.stack([inputs_of(block, "self_attn.q_proj", states, arguments[0]) for states in hidden]).double()
    matrix = torch.einsum("bti,btj->ij", x, x * weights[..., None]) * 2 / len(used)
    plain = torch.einsum("bti,btj->ij", x, x) * 2 / len(used)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = block.get_submodule(f"self_attn.{name}").weight.float()
        found = done.load(0).get_submodule(f"self_attn.{name}").weight
        same = []
        for hessian in (matrix, plain):
            expected = restore(weight, hessian.float(), "gptq", bits=3)
            same.append(float(((found / expected.scale).round() == expected.codes).float().mean()))
        assert same[0] > 0.98 and same[1] < 0.98, (name, same)


def test_other_layers_keep_their_results(tokens):
    """With the Hessians of a whole block, only q, k and v of the first block differ."""
    entry = {**RECIPE, "hessian_scope": "block"}
    models = []
    for share in (0.0, 1.0):
        recipe = {**entry, "attention_weights": share}
        models.append(Blocks(obr.compress(random_llama(initializer_range=0.1), tokens, recipe, progress=False)))
    for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        assert torch.equal(*(model.load(0).get_submodule(name).weight for model in models)), name
    assert not torch.equal(*(model.load(0).self_attn.k_proj.weight for model in models))


@pytest.mark.parametrize("family", EXPERTS)
def test_mixtures_of_experts_are_compressed_with_them(family, tokens):
    """Their attention is as others'; only q, k and v of the first block differ from plain sums before the experts."""
    models = []
    for share in (0.0, 1.0):
        recipe = {**RECIPE, "attention_weights": share, "hessian_scope": "block", "blocks": "0:1"}
        model = random_model(EXPERTS[family]).float()
        models.append(Blocks(obr.compress(model, tokens, recipe, progress=False)))
    layout = models[0].layout_at(0)
    weights = {
        name: [model.load(0).get_submodule(name).weight for model in models]
        for group, names in layout.groups.items()
        if group in (*ATTENDED, "o")
        for name in names
    }
    assert torch.equal(*weights.pop("self_attn.o_proj"))
    assert not any(torch.equal(*pair) for pair in weights.values())


def test_the_plan_prices_another_look_at_attention():
    sizes = Sizes.estimate(0.1)
    plain = cost_model.compress(sizes, Recipe.parse({**RECIPE, "attention_weights": 0.0}), 8192, 512)
    weighted = cost_model.compress(sizes, Recipe.parse(RECIPE), 8192, 512)
    assert plain.products < weighted.products < 1.5 * plain.products and weighted.exact == plain.exact
