"""Optimal Brain Restoration: errors of pruning and rounding moved to the weights that can still compensate."""

from dataclasses import replace

import torch
from torch import Tensor

from obr.methods.conjugate_gradient import TOLERANCE, images_on_support
from obr.methods.gptq import gptq_sweep
from obr.methods.grid import Grid
from obr.methods.layer import Layer, Solution
from obr.methods.layer_hessian import Hessian
from obr.methods.row_products import product

SWEPT_TOLERANCE = 1e-3  # of the solver where a GPTQ sweep follows; relative errors are equal to 7e-4


def restore_pruned(weight: Tensor, hessian: Hessian, mask: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Prune `weight (r, n)` and let the kept weights absorb the change: w_R += H_RR⁻¹ H_RE w_E (OBR, eq. 9).

    Solved in the dual, which is well conditioned since damping bounds the inverse: with G = H⁻¹ and E pruned,
    G_EE v = w_E, and w - v G is zero on E and optimal on R.
    """
    if mask.all():
        return weight
    return (weight - images_on_support(hessian.inverse, weight, ~mask, tolerance)).mul_(mask)


def restore_rounded(
    weight: Tensor, rounded: Tensor, hessian: Hessian, mask: Tensor, tolerance: float = TOLERANCE
) -> Tensor:
    """Let the kept weights right of the cut absorb the rounding error left of it (OBR, eq. 10).

    weight: (r, n), pruned. rounded: (r, c), final values of the first c columns. mask: (r, n).
    Returns the updated right part (r, n - c): w_R2 += H_R2R2⁻¹ H_R2E2 e. Only the trailing block of H enters:
    first all its columns move freely, then the pruned ones are held at zero in the dual.
    """
    cut = rounded.shape[1]
    right, kept = weight[:, cut:], mask[:, cut:]
    if not 0 < cut < weight.shape[1]:
        return right
    error = weight[:, :cut] - rounded
    inverse = hessian.tail_inverse(cut)
    change = product(product(error, hessian.matrix[:cut, cut:]), inverse)
    if not kept.all():
        change -= images_on_support(inverse, change, ~kept, tolerance)
    return (right + change).mul_(kept)


def obr_rtn(layer: Layer) -> Solution:
    """OBR with rounding to nearest: restore for the pruning, then for the rounding left of the cut."""
    hessian, mask, cut = layer.hessian, layer.mask, layer.cut
    weight = restore_pruned(layer.weight, hessian, mask)
    grid = _grid_of(layer, weight)
    left = grid.round(weight[:, :cut]) * mask[:, :cut]
    right = restore_rounded(weight, left, hessian, mask)
    right = grid.from_column(cut, mask.shape[1]).round(right)
    return Solution(torch.cat([left, right], dim=1) * mask, mask, grid)


def obr_gptq(layer: Layer) -> Solution:
    """OBR with a GPTQ sweep right of the cut."""
    hessian, mask, cut = layer.hessian, layer.mask, layer.cut
    weight = restore_pruned(layer.weight, hessian, mask, SWEPT_TOLERANCE)
    grid = _grid_of(layer, weight)
    left = grid.round(weight[:, :cut]) * mask[:, :cut]
    right = restore_rounded(weight, left, hessian, mask, SWEPT_TOLERANCE)
    static = grid.from_column(0, mask.shape[1])
    swept = gptq_sweep(replace(layer, weight=torch.cat([left, right], dim=1), grid=static), start=cut)
    return Solution(torch.cat([left, swept.weight], dim=1), swept.mask, grid)


def _grid_of(layer: Layer, weight: Tensor) -> Grid:
    """The layer's own grid; where groups of columns have scales, that of `weight (r, n)`, restored for the pruning:
    what a group absorbs may exceed the range of its dense weights."""
    grid = layer.grid
    if grid.group is None:
        return grid
    return grid.of_other(weight, layer.recipe.clip, layer.hessian.diagonal)
