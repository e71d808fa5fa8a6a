"""Token weights: against one graph of the whole model, in Hessians and targets, and with attention weights."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import obr
from helpers.random_llama import random_llama
from obr.calibration.collect_hessians import inputs_of
from obr.calibration.token_weights import token_weights
from obr.compression.recompute import Places, repeat
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.methods.layer_hessian import Hessian
from obr.methods.restore import restore
from obr.models.blocks import Blocks, run_block
from obr.planning import cost_model, memory
from obr.planning.tensor_sizes import Sizes

PLAIN = {"method": "gptq", "bits": 3, "calibration": "c"}
RECIPE = {**PLAIN, "token_weights": 0.75}
GROUPS = {"qkv": "qkv", "o": "o", "up_gate": ("up", "gate"), "down": ("down",)}


def model_of():
    return random_llama(initializer_range=0.1)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 128, (8, 48), generator=torch.Generator().manual_seed(0))


def by_one_graph(tokens) -> dict:
    """{(block, group): (b, s)} squared output gradients, summed over channels, in float64."""
    model, found = model_of().double(), {}
    linears = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    kept = {}
    for name, linear in linears.items():
        linear.register_forward_hook(lambda _m, _i, out, name=name: kept.update({name: out}))
    for number, window in enumerate(tokens):
        states = model.get_input_embeddings()(window[None]).detach().requires_grad_()
        logits = model(inputs_embeds=states).logits[0]
        loss = F.cross_entropy(logits[:-1], window[1:], reduction="sum")
        for name, gradient in zip(linears, torch.autograd.grad(loss, list(kept.values())), strict=True):
            kind = name.rpartition(".")[2].removesuffix("_proj")
            group = next(g for g, kinds in GROUPS.items() if kind in kinds)
            key = int(name.split(".")[2]), group
            found.setdefault(key, torch.zeros(tokens.shape, dtype=torch.float64))
            found[key][number] += gradient[0].square().sum(1)
    return found


def test_weights_are_squared_gradients_of_the_whole_model(tokens):
    found, expected = token_weights(Blocks(model_of()), tokens, 0.75, progress=False), by_one_graph(tokens)
    assert found.keys() == expected.keys() and len(found) == 8
    for key, squares in expected.items():
        assert torch.allclose(found[key].double(), 0.25 + 0.75 * squares / squares.mean(), rtol=1e-3, atol=1e-3), key
        assert found[key].std() > 0.3 and float(found[key].mean()) == pytest.approx(1, abs=1e-5)
    alike = token_weights(Blocks(model_of()), tokens, 0.0, progress=False)
    assert all(bool((weights == 1).all()) for weights in alike.values())


@pytest.mark.parametrize("extra", [{}, {"hessian_scope": "block"}, {"asymmetry": 1.0}, {"held_out": 3}])
def test_layers_are_restored_with_weighted_sums(tokens, extra):
    """Of the last group, whose inputs come from compressed layers; Hessian and drift are summed in float64."""
    entry = {**RECIPE, **extra}
    done, dense, used = Blocks(obr.compress(model_of(), tokens, entry, progress=False)), Blocks(model_of()), tokens
    used = tokens[: len(tokens) - extra.get("held_out", 0)]
    weights = token_weights(Blocks(model_of()), tokens, 0.75, progress=False)
    hidden, arguments = done.embed(used)
    wanted, _ = dense.embed(used)
    for i, states in enumerate(hidden):
        hidden[i] = run_block(done.load(0), states, arguments[0])
        wanted[i] = run_block(dense.load(0), wanted[i], arguments[0])
    block = dense.load(1) if extra.get("hessian_scope") else done.load(1)
    x = torch.stack([inputs_of(block, "mlp.down_proj", states, arguments[1]) for states in hidden]).double()
    own = torch.stack([inputs_of(dense.load(1), "mlp.down_proj", states, arguments[1]) for states in wanted]).double()
    counted = x * weights[1, "down"][: len(used), :, None].double()
    matrix, drift = (torch.einsum("bti,btj->ij", y, counted) * 2 / len(used) for y in (x, own - x))
    target = dense.load(1).mlp.down_proj.weight.double()
    if extra.get("asymmetry"):
        target = target + target @ drift @ Hessian(matrix.float()).inverse.double()
    expected = restore(target.float(), matrix.float(), "gptq", bits=3)
    weight = done.load(1).mlp.down_proj.weight
    assert ((weight / expected.scale).round() == expected.codes).float().mean() > 0.98
    plain = restore(target.float(), torch.einsum("bti,btj->ij", x, x).float(), "gptq", bits=3)
    assert ((weight / plain.scale).round() == plain.codes).float().mean() < 0.97


WEIGHTS = ("token_weights", "attention_weights")


@pytest.mark.parametrize("option", WEIGHTS)
def test_layers_can_be_computed_again(option, tokens, tmp_path):
    model_of().save_pretrained(tmp_path / "model")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors", metadata={"calibration": "{}"})
    recipe = Recipe.parse({**PLAIN, option: 0.75, "asymmetry": 0.5, "hessian_scope": "block"})
    compress_stage(tmp_path / "model", recipe, tmp_path / "out", tokens=tmp_path / "tokens.safetensors", device="cpu")
    places = Places(model=tmp_path / "model", tokens=tmp_path / "tokens.safetensors")
    assert all(layer.identical for layer in repeat(tmp_path / "out", 3, places))


@pytest.mark.parametrize("option", WEIGHTS)
@pytest.mark.parametrize(
    ("wrong", "share", "sentence"),
    [
        ({}, 1.5, "is 1.5; it must lie between 0 and 1"),
        ({"hessian": "cached"}, 0.75, "is 0.75, but cached Hessians know the dense model's inputs alone"),
        ({"method": "rtn"}, 0.75, "is 0.75, but method rtn reads no activations"),
    ],
)
def test_weights_of_tokens_without_an_effect_are_refused(option, wrong, share, sentence):
    with pytest.raises(ObrError, match=f"{option} {sentence}"):
        Recipe.parse({**PLAIN, option: share, **wrong})


def test_the_plan_prices_a_pass_forward_and_back():
    sizes = Sizes.estimate(0.1)
    plain = cost_model.compress(sizes, Recipe.parse({**RECIPE, "token_weights": 0.0}), 8192, 512)
    weighted = cost_model.compress(sizes, Recipe.parse(RECIPE), 8192, 512)
    passes = cost_model.gradients(sizes, 8192, 512)
    assert weighted.products - plain.products == pytest.approx(passes.products)
    assert weighted.exact == plain.exact and weighted.runs > plain.runs
    states = memory.states_of("compress", sizes, 8192, False, Recipe.parse(RECIPE))
    assert states == memory.states_of("gradients", sizes, 8192, False)
    needed = memory.memory("compress", sizes, 8192, 512, False, Recipe.parse(RECIPE))[0]
    assert needed > memory.memory("gradients", sizes, 8192, 512, False)[0]


@pytest.mark.parametrize("factor", [0, torch.nan])
def test_gradients_that_weigh_no_token_are_refused(factor, tokens):
    model = model_of()
    model.model.layers[1].mlp.down_proj.weight.mul_(factor)
    with pytest.raises(ObrError, match=r"Block . [a-z_]+ has gradients that are not finite, or all zero"):
        token_weights(Blocks(model), tokens, 1.0, progress=False)
