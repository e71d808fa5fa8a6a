"""Columns in the order of the Hessian's diagonal: as permuted outside, against a naive loop, and what must hold."""

import pytest
import torch

from helpers.layer_samples import layer
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.methods.grid import Grid
from obr.methods.layer_hessian import Hessian
from obr.methods.restore import restore, restore_together

ORDERED = {"column_order": "hessian"}


def uneven(rows: int = 12, columns: int = 64, seed: int = 0):
    """A layer some of whose inputs are much larger than others, as those of real models are."""
    weight, hessian = layer(rows, columns, seed)
    size = torch.rand(columns, generator=torch.Generator().manual_seed(seed)).mul_(3).exp_()
    return weight, hessian * size * size[:, None]


def largest_first(hessian: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sorted(range(len(hessian)), key=lambda j: (-float(hessian[j, j]), j)))


@pytest.mark.parametrize(
    ("method", "sparsity"),
    [
        ("gptq", 0.0),
        *((method, share) for method in ("sparsegpt_gptq", "obr_rtn", "obr_gptq") for share in (0.0, 0.5)),
    ],
)
def test_order_equals_a_layer_permuted_outside(method, sparsity):
    weight, hessian = uneven()
    order = largest_first(hessian)
    outside = restore(weight[:, order], hessian[order][:, order], method, sparsity=sparsity)
    inside = restore(weight, hessian, method, sparsity=sparsity, **ORDERED)
    assert torch.equal(inside.weight[:, order], outside.weight)
    assert torch.equal(inside.mask[:, order], outside.mask) and torch.equal(inside.scale, outside.scale)
    assert inside.relative_error == pytest.approx(outside.relative_error, rel=1e-5)
    assert not torch.equal(inside.weight, restore(weight, hessian, method, sparsity=sparsity).weight)


@pytest.mark.parametrize("clip", ["mse", "hessian"])
@pytest.mark.parametrize("group", [None, 16, 24])
def test_codes_equal_those_of_a_naive_loop(group, clip):
    """Column by column in float64: round, and move the columns that are left to where the loss is least."""
    weight, hessian = uneven(columns=160)
    result = restore(weight, hessian, "gptq", bits=3, group=group, clip=clip, **ORDERED)
    scale = Grid.fit(weight, 3, clip, group, hessian.diagonal()).over(160).double().expand_as(weight)
    work, left = weight.double(), largest_first(hessian).tolist()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(160, dtype=torch.float64)
    while left:
        column = left.pop(0)
        rounded = (work[:, column] / scale[:, column]).round().clamp(-4, 3) * scale[:, column]
        error, work[:, column] = work[:, column] - rounded, rounded
        if left:
            work[:, left] += torch.outer(error, torch.linalg.solve(damped[left][:, left], damped[left, column]))
    assert ((work / scale).round() == result.codes).float().mean() > 0.995


@pytest.mark.parametrize("order", ["given", "hessian"])
@pytest.mark.parametrize("group", [None, 24])
def test_scales_of_a_second_sweep_weigh_the_pruned_columns_in_their_own_order(group, order):
    weight, hessian = uneven()
    options = {"column_order": order, "clip": "hessian"}
    result = restore(weight, hessian, "sparsegpt_then_gptq", group=group, **options)
    pruned = restore(weight, hessian, "sparsegpt_gptq", bits=16, **options).weight
    expected = Grid.fit(pruned, 4, "hessian", group, hessian.diagonal()).scale
    same = torch.isclose(result.scale, expected, rtol=1e-3).float().mean()
    assert same == 1.0 if order == "hessian" or group is None else same > 0.3  # later groups are fitted on the way


def test_scales_of_groups_are_those_of_the_dense_columns():
    weight, hessian = uneven()
    ordered = restore(weight, hessian, "gptq", bits=3, group=16, **ORDERED)
    assert torch.equal(ordered.scale, restore(weight, hessian, "rtn", bits=3, group=16).scale)
    assert not torch.equal(ordered.scale, restore(weight, hessian, "gptq", bits=3, group=16).scale)


@pytest.mark.parametrize("options", [{}, {"group": 16}, {"refit": True}, {"group": 16, "refit": True}], ids=str)
def test_order_lowers_the_error_where_inputs_are_uneven(options):
    weight, hessian = uneven(32, 96)
    given, ordered = (restore(weight, hessian, "gptq", bits=3, **options, **o).relative_error for o in ({}, ORDERED))
    assert ordered < 0.9 * given


@pytest.mark.parametrize("pattern", ["2:4", "8:16", "paired 4:8"])
@pytest.mark.parametrize("method", ["sparsegpt_gptq", "obr_gptq"])
def test_patterns_hold_in_the_given_order(method, pattern):
    """`restore` checks them; groups in which SparseGPT chooses come in the order of their sums."""
    weight, hessian = uneven()
    result = restore(weight, hessian, method, pattern=pattern, **ORDERED)
    assert result.sparsity == 0.5 and result.mask.view(12, -1, 16).sum(-1).eq(8).all()
    assert not torch.equal(result.weight, restore(weight, hessian, method, pattern=pattern).weight)
    _, order = Hessian(hessian).by_diagonal(4)
    sums = hessian.diagonal().view(-1, 4).sum(1)[order[::4] // 4]
    assert (sums.diff() <= 0).all()
    assert torch.equal(order.view(-1, 4) - order[::4, None], torch.arange(4).expand(16, 4))


def test_damping_and_dead_columns_are_on_record():
    weight, hessian = layer(4, 32, tokens=8)
    hessian[:, 7] = hessian[7] = 0
    hessian -= 0.02 * hessian.diagonal().mean() * torch.eye(32) * (hessian.diagonal() != 0)
    for method in ("gptq", "sparsegpt_gptq"):
        result = restore(weight, hessian, method, **ORDERED)
        assert result.damp == pytest.approx(0.1) and not result.weight[:, 7].any()
        assert result.flags == ["1 dead columns", "damp raised from 0.01 to 0.1"]


def test_layers_of_one_input_share_the_ordered_hessian():
    (q, hessian), (k, _) = uneven(), uneven(6, seed=1)
    shared = Hessian(hessian)
    together = restore_together({"q": q, "k": k}, shared, {"method": "sparsegpt_gptq", **ORDERED})
    assert torch.equal(together["k"].weight, restore(k, hessian, "sparsegpt_gptq", **ORDERED).weight)
    assert shared.by_diagonal()[0] is shared.by_diagonal()[0]


def test_an_allocation_orders_the_layers_whose_method_can():
    options = [{"method": "gptq", "bits": 3}, {"method": "joint", "bits": 4, "sparsity": 0.5}]
    entry = {"method": "joint", "calibration": "c", "allocation": {"bits": 3.0, "options": options}, **ORDERED}
    recipe = Recipe.parse(entry)
    assert [recipe.of_layer(option).column_order for option in recipe.options] == ["hessian", "given"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"column_order": "norm"}, "r.column_order is 'norm'; choose one of given, hessian"),
        ({**ORDERED, "method": "rtn"}, "r.column_order is 'hessian', but rtn treats all columns alike; use"),
        ({**ORDERED, "method": "joint"}, "but joint treats all columns alike; use method gptq or sparsegpt_gptq"),
    ],
)
def test_an_order_without_an_effect_is_refused(options, sentence):
    with pytest.raises(ObrError, match=sentence):
        Recipe.parse({"method": "gptq", "calibration": "c", **options}, "r")
