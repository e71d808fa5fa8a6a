"""SparseGPT and GPTQ, in one sweep or in two."""

import pytest
import torch

from helpers.layer_samples import layer
from obr.methods.grid import Grid
from obr.methods.restore import restore


def loop(weight, hessian, scale, mask, bits):
    """One sweep over the columns in float64: pruned, rounded if there are scales, errors carried to the rest."""
    work, columns = weight.double().clone(), weight.shape[1]
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    for j in range(columns):
        value = work[:, j]
        if bits < 16:
            value = (value / scale[:, j]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale[:, j]
        value = value * mask[:, j]
        error, work[:, j] = work[:, j] - value, value
        if j + 1 < columns:
            step = torch.linalg.solve(damped[j + 1 :, j + 1 :], damped[j + 1 :, j])
            work[:, j + 1 :] += torch.outer(error, step)
    return work


@pytest.mark.parametrize("group", [None, 16])
def test_second_sweep_rounds_what_the_first_has_pruned(group):
    weight, hessian = layer(8, 64)
    result = restore(weight, hessian, "sparsegpt_then_gptq", bits=4, group=group)
    assert torch.equal(result.mask, restore(weight, hessian, "sparsegpt_gptq", bits=16).mask)
    pruned = loop(weight, hessian, None, result.mask, 16)
    if group is None:
        assert torch.allclose(result.scale, Grid.fit(pruned.float(), 4).scale, rtol=1e-3)
    scale = Grid(result.scale, 4, group).over(64).double().expand_as(weight)
    rounded = loop(pruned, hessian, scale, result.mask, 4)
    assert ((rounded / scale).round() == result.codes).float().mean() > 0.99


def test_pruned_weights_stay_zero_and_sixteen_bits_are_pruning_alone():
    weight, hessian = layer(16, 128)
    result = restore(weight, hessian, "sparsegpt_then_gptq", bits=4, column_order="hessian", group=32)
    assert result.sparsity == pytest.approx(0.5, abs=0.01) and not result.weight[~result.mask].any()
    alone = restore(weight, hessian, "sparsegpt_gptq", bits=16)
    assert torch.equal(restore(weight, hessian, "sparsegpt_then_gptq", bits=16).weight, alone.weight)


@pytest.mark.parametrize("pattern", ["2:4", "paired 4:8"])
def test_patterns_hold_through_both_sweeps(pattern):
    weight, hessian = layer(8, 64)
    result = restore(weight, hessian, "sparsegpt_then_gptq", pattern=pattern, column_order="hessian")
    assert result.mask.view(8, -1, 8).sum(-1).eq(4).all()
