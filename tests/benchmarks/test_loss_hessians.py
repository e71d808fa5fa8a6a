"""The benchmark of Hessians that weigh what the loss feels: its matrices, its solvers, its table."""

import importlib
import subprocess
import sys

import pandas as pd
import pytest
import torch

import obr
from helpers.paths import ROOT
from obr.calibration.attention_weights import attention_weights
from obr.calibration.collect_hessians import inputs_of
from obr.models.blocks import Blocks, run_in_place

KINDS = ["inputs", "rows:2", "two-sided:tokens", "two-sided:G", "attention:1", "scaled"]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("loss_hessians")


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    model = obr.load_model(tiny_folder / "model", device="cpu").requires_grad_(False)
    tokens = torch.randint(0, model.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    return model, tokens


def test_gradients_of_sequences_are_those_of_weights(script, tiny):
    """G is what autograd gives for the weight itself."""
    model, tokens = tiny
    found = script.collected(model, tokens[:1], "two-sided:G")
    name, layer = list(script.linears(model).items())[3]
    layer.weight.requires_grad_()
    script.pass_back(model, tokens[:1], True, lambda *_: None)
    wanted, layer.weight.grad = layer.weight.grad, None
    layer.weight.requires_grad_(False)
    for matrix, product in zip(found[name], (wanted @ wanted.T, wanted.T @ wanted), strict=True):
        assert torch.allclose(matrix, product, rtol=1e-3, atol=1e-6 * float(product.abs().max()))


def test_groups_of_rows_are_those_of_squared_gradients(script, tiny):
    model, tokens = tiny
    seen = []
    script.pass_back(model, tokens, False, lambda name, x, g: seen.append((name, x, g)))
    halves, whole = (script.collected(model, tokens, f"rows:{count}") for count in (2, 1))
    for name in list(halves)[:4]:
        parts = [(x, g) for layer, x, g in seen if layer == name]
        rows = parts[0][1].shape[1] // 2
        naive = sum(torch.einsum("t,ti,tj->ij", g[:, :rows].square().mean(1), x, x) for x, g in parts)
        assert torch.allclose(halves[name][0], naive, rtol=1e-3, atol=1e-7)
        assert torch.allclose(sum(halves[name]) / 2, whole[name][0], rtol=1e-3, atol=1e-7)


def test_attention_weights_are_those_of_the_product(script, tiny):
    """H of q in the second block is that of `collect` with the weights that a compression takes; o has plain sums."""
    model, tokens = tiny
    found, plain = (script.collected(model, tokens, kind) for kind in ("attention:0.5", "inputs"))
    blocks = Blocks(model)
    hidden, arguments = blocks.embed(tokens)
    run_in_place(blocks.load(0), hidden, arguments[0])
    weights = attention_weights(blocks.load(1), blocks.layout, hidden, arguments[1], 0.5)
    x = torch.cat([inputs_of(blocks.load(1), "self_attn.q_proj", states, arguments[1]) for states in hidden])
    naive = torch.einsum("t,ti,tj->ij", weights.flatten(), x, x)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.allclose(found[f"1.self_attn.{name}"][0], naive, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plain["1.self_attn.q_proj"][0], naive, rtol=1e-2)
    assert torch.allclose(found["1.self_attn.o_proj"][0], plain["1.self_attn.o_proj"][0], rtol=1e-4, atol=1e-5)


def made_layer(seed: int, rows: int = 24, columns: int = 32):
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(64, n, generator=generator) @ torch.randn(n, n, generator=generator) for n in (columns, rows))
    return torch.randn(rows, columns, generator=generator), g.T @ g, x.T @ x


@pytest.mark.parametrize("recipe", [{"method": "gptq", "bits": 3}, {"method": "joint", "sparsity": 0.5, "sweeps": 0}])
def test_two_sided_losses_are_lower_than_of_one_side(script, recipe):
    lower = 0
    for seed in range(3):
        weight, outer, inner = made_layer(seed)
        losses = []
        for made in (script.two_sided(weight, outer, inner, recipe), script.one_sided(weight, [inner], recipe)):
            error = made - weight
            losses.append(float((outer @ error @ inner * error).sum()))
        lower += losses[0] < 0.97 * losses[1]
    assert lower == 3


@pytest.mark.parametrize("has_norm", [True, False])
def test_scales_are_the_least_squares(script, has_norm):
    weight, _, hessian = made_layer(0)
    codes = script.one_sided(weight, [hessian], {"method": "gptq", "bits": 2})

    def loss(made: torch.Tensor) -> float:
        error = (made - weight).double()
        return float((error @ hessian.double() * error).sum())

    (made,) = script.scaled([weight], [codes], hessian, has_norm)
    best = loss(made)
    assert best < loss(codes)
    for row in (0, 7):
        for step in (0.99, 1.01):
            moved = made.clone()
            moved[row] *= step
            assert loss(moved) > best * (1 - 1e-6)
    ratio = made / torch.where(codes == 0, torch.nan, codes)
    spread = (ratio / ratio.nanmean(1, keepdim=True)).nan_to_num(1.0).std()
    assert (spread > 1e-3) == has_norm, "columns have scales where a norm can take them, and only there"


@pytest.mark.slow
def test_every_kind_is_measured(tiny_folder, tmp_path):
    out = tmp_path / "runs.csv"
    command = [
        sys.executable, ROOT / "benchmarks" / "loss_hessians.py", "--model", tiny_folder / "model", "--out", out,
        "--calibration", tiny_folder / "train.txt", "--test", tiny_folder / "heldout.txt", "--windows", "4",
        "--seqlen", "64", "--tokens", "1024", "--recipe", "method=gptq bits=2", "--kinds", *KINDS,
    ]  # fmt: skip
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    frame = pd.read_csv(out)
    assert list(frame["kind"]) == KINDS and frame["perplexity"].nunique() == len(KINDS)
    assert frame["perplexity"].between(10, 200).all()
