"""Restoration of layers: against published results, against the row loop, and what must hold for any layer."""

from pathlib import Path

import numpy as np
import pytest
import torch

import obr
from helpers.layer_samples import golden, layer
from helpers.obr_row_loop import restore_rows
from helpers.paths import FIXTURES
from obr.config.methods import METHODS
from obr.errors import ObrError
from obr.methods.layer_hessian import Hessian
from obr.methods.obr import restore_pruned
from obr.methods.registry import FUNCTIONS
from obr.methods.restore import restore, restore_together

RUNS = {
    "obr_gptq_50": {"method": "obr_gptq"},
    "obr_rtn_50": {"method": "obr_rtn"},
    "obr_rtn_50_alpha25": {"method": "obr_rtn", "alpha": 0.25},
    "obr_gptq_2_4": {"method": "obr_gptq", "pattern": "2:4"},
    "obr_rtn_4_8": {"method": "obr_rtn", "pattern": "4:8"},
    "sparsegpt_gptq_50": {"method": "sparsegpt_gptq"},
    "gptq_dense": {"method": "gptq"},
    "gptq_dense_3bit": {"method": "gptq", "bits": 3},
}


def check_golden(path: Path):
    data, weight, hessian, errors = golden(path)
    for name, pattern in (("mask_wanda_50", None), ("mask_wanda_2_4", "2:4"), ("mask_wanda_4_8", "4:8")):
        result = restore(weight, hessian, "wanda", pattern=pattern)
        assert (result.mask.numpy() == data[name]).all(), name
        assert np.abs(result.scale.numpy() / data["scale"] - 1).max() < 1e-6
    for name, options in RUNS.items():
        result = restore(weight, hessian, **options)
        codes = np.rint(data[name] / result.scale.numpy())
        reactive = name == "sparsegpt_gptq_50"  # its thresholds react to rounding
        assert result.relative_error == pytest.approx(errors[name], rel=0.02 if reactive else 0.005), name
        assert (codes == result.codes.numpy()).mean() >= (0.95 if reactive else 0.98), name


@pytest.mark.parametrize("name", ["small", "up_proj_512"])
def test_committed_golden_layers_match_published_code(name):
    check_golden(FIXTURES / f"{name}.npz")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["down_proj_1024", "o_proj_512_unrotated"])
def test_golden_layers_match_published_code(real_data, name):
    check_golden(real_data / "golden" / f"{name}.npz")


@pytest.mark.parametrize("gptq", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.4, 0.5, 0.75, 1.0])
def test_batched_restoration_equals_row_loop(gptq, alpha):
    weight, hessian = layer(6, 96)
    result = restore(weight, hessian, "obr_gptq" if gptq else "obr_rtn", alpha=alpha)
    plain = restore_rows(weight, hessian, result.mask, result.scale, 4, alpha, gptq)
    assert ((plain / result.scale).round() == result.codes).float().mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(FUNCTIONS))
@pytest.mark.parametrize("columns", [576, 896, 960])
def test_restoration_covers_every_column(method, columns):
    """Widths whose half is no multiple of 128: every column of every row must carry weights."""
    weight, hessian = layer(4, columns)
    for alpha in (0.25, 0.4, 0.75) if method.startswith("obr") else (0.5,):
        pruned = {"sparsity": 0.5} if METHODS[method].prunes else {}
        result = restore(weight, hessian, method, bits=8, alpha=alpha, **pruned)
        kept = result.weight[:, columns // 8 :].unflatten(1, (-1, columns // 8)).abs().sum((0, 2))
        assert (kept > 0).all()
        assert result.relative_error < 0.6


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8", "8:16", "paired 4:8"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt_gptq", "obr_rtn", "obr_gptq"])
def test_masks_and_grids_hold(method, pattern):
    weight, hessian = layer(8, 64)
    result = obr.restore(weight, hessian, method, pattern=pattern)
    assert result.weight.shape == (8, 64) and result.scale.shape == (8, 1)
    assert not result.weight[~result.mask].any()
    assert torch.equal(result.codes * result.scale, result.weight)
    assert result.codes.min() >= -8 and result.codes.max() <= 7
    assert result.sparsity == pytest.approx(0.5, abs=0.02)


def test_methods_order_by_relative_error():
    """Compensation pays: OBR beats pruning and rounding alone, and GPTQ beats RTN."""
    weight, hessian = layer(32, 128, tokens=256)
    error = {m: restore(weight, hessian, m).relative_error for m in FUNCTIONS}
    assert error["obr_gptq"] < error["obr_rtn"] < error["wanda"] < error["magnitude"] * 1.5
    assert error["sparsegpt_gptq"] < error["wanda"] and error["gptq"] < error["rtn"]


def test_compensation_with_printed_sign_is_worse_than_none():
    """Adding the compensation helps, subtracting it, as the paper prints, is worse than none."""
    weight, hessian = layer(8, 64)
    factors = Hessian(hessian)
    mask = restore(weight, hessian, "wanda").mask
    restored = restore_pruned(weight.clone(), factors, mask)
    pruned = weight * mask
    opposite = 2 * pruned - restored
    losses = [factors.loss(weight - w) for w in (restored, pruned, opposite)]
    assert losses[0] < losses[1] < losses[2]


def test_restoration_is_the_optimum():
    """At the optimum the loss's gradient vanishes on the kept weights."""
    weight, hessian = layer(8, 64)
    factors = Hessian(hessian)
    mask = torch.rand(8, 64, generator=torch.Generator().manual_seed(5)) > 0.4
    gradient = (weight - restore_pruned(weight.clone(), factors, mask)) @ factors.damped()
    assert gradient[mask].abs().max() < 1e-3 * (weight @ factors.damped()).abs().max()


def test_quantisation_only_obr_is_better_than_rtn():
    weight, hessian = layer(16, 128)
    rtn = restore(weight, hessian, "rtn").relative_error
    restored = restore(weight, hessian, "obr_rtn", sparsity=0.0)
    assert restored.mask.all() and restored.relative_error < 0.9 * rtn


def test_sixteen_bits_prune_only():
    weight, hessian = layer(16, 64)
    result = restore(weight, hessian, "obr_gptq", bits=16)
    assert result.codes is None and result.scale is None and result.sparsity == 0.5
    assert result.relative_error < restore(weight, hessian, "obr_gptq", bits=4).relative_error


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_error_falls_with_bits(bits):
    weight, hessian = layer(8, 64)
    assert (
        restore(weight, hessian, "gptq", bits=bits).relative_error
        > restore(weight, hessian, "gptq", bits=bits + 1 if bits < 8 else 16).relative_error
    )


def test_dead_columns_are_zeroed_and_told():
    weight, hessian = layer(4, 32)
    hessian[:, 7] = hessian[7] = 0
    for method in ("gptq", "obr_gptq", "obr_rtn", "sparsegpt_gptq"):
        result = restore(weight, hessian, method)
        assert not result.weight[:, 7].any() and result.flags == ["1 dead columns"]


def test_damping_is_raised_on_record_or_refused():
    weight, hessian = layer(4, 32, tokens=8)
    hessian -= 0.02 * hessian.diagonal().mean() * torch.eye(32)  # indefinite: rounding makes such
    result = restore(weight, hessian, "gptq", damp=0.01)
    assert result.damp == pytest.approx(0.1) and result.flags == ["damp raised from 0.01 to 0.1"]
    with pytest.raises(ObrError, match=r"block 3 o_proj: the Hessian cannot be factored, even with damp 10"):
        restore(weight, -1000 * torch.eye(32) + hessian, "gptq", damp=0.01, name="block 3 o_proj")


def test_a_hessian_is_shared_between_layers():
    weight, hessian = layer(8, 64)
    shared = Hessian(hessian)
    first, second = (restore(weight[rows], shared, "obr_gptq") for rows in (slice(0, 4), slice(4, 8)))
    together = restore(weight, hessian, "obr_gptq")
    assert torch.equal(torch.cat([first.codes, second.codes]), together.codes)


def test_random_masks_follow_the_seed():
    weight, hessian = layer(4, 32)
    masks = [restore(weight, hessian, mask="random", seed=s).mask for s in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"method": "magic"}, "method is 'magic'; choose one of"),
        ({"sparsity": 1.2}, r"sparsity is 1.2; it must lie between 0 and 0.95"),
        ({"bits": 9}, r"bits is 9; choose one of 2, 3"),
        ({"alpha": -0.1}, r"alpha is -0.1"),
        ({"mask": "luck"}, r"mask is 'luck'"),
        ({"pattern": "3:7"}, r"3:7 does not divide the 32 input columns"),
        ({"mask": torch.ones(3, 3)}, r"mask must be bool of the weight's shape"),
    ],
)
def test_impossible_settings_are_refused(options, sentence):
    weight, hessian = layer(4, 32)
    with pytest.raises(ObrError, match=sentence):
        restore(weight, hessian, **options)


def test_broken_input_is_refused():
    weight, hessian = layer(4, 32)
    for broken, sentence in (
        ((weight * float("nan"), hessian), "weight has NaN"),
        ((weight, hessian * float("inf")), "Hessian has NaN"),
        ((weight, hessian[:16, :16]), r"has shape \(16, 16\), but the weight has 32 columns"),
        ((weight[0], hessian), r"must be a matrix"),
        ((weight, None), "needs a Hessian"),
    ):
        with pytest.raises(ObrError, match=sentence):
            restore(*broken)


@pytest.mark.parametrize("method", [*FUNCTIONS, "dense"])
def test_layers_of_one_input_may_be_restored_together(method):
    (q, hessian), (k, _) = layer(12, 64), layer(6, 64, seed=1)
    shared = Hessian(hessian)
    together = restore_together({"q": q, "k": k}, shared, {"method": method})
    for name, weight in (("q", q), ("k", k)):
        alone = restore(weight, shared, method)
        noisy = method == "joint"  # its noise differs by row of what is restored together
        assert noisy or torch.equal(together[name].mask, alone.mask)
        assert together[name].relative_error == pytest.approx(alone.relative_error, rel=0.1 if noisy else 5e-3)
        assert together[name].scale is None or torch.equal(together[name].scale, alone.scale)


def test_layers_restored_together_have_own_random_masks():
    weight, hessian = layer(8, 64)
    options = {"method": "obr_rtn", "mask": "random"}
    together = restore_together({"q": weight, "k": weight}, hessian, options, seeds={"q": 1, "k": 2})
    assert torch.equal(together["q"].mask, restore(weight, hessian, **options, seed=1).mask)
    assert torch.equal(together["k"].mask, restore(weight, hessian, **options, seed=2).mask)
