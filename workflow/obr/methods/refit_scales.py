"""Scales refitted after a restoration has decided the codes."""

from dataclasses import replace

import torch
from torch import Tensor

from obr.methods.grid import HALF_RANGE, Grid
from obr.methods.layer import Solution
from obr.methods.layer_hessian import Hessian
from obr.methods.row_products import product

# Of a group's own curvature: enough for groups that no input, or no code, tells apart; moves the others by 1e-6.
_RIDGE = 1e-6
_SYSTEM_ELEMENTS = 1 << 24  # of the systems that are solved at once


def refit(weight: Tensor, solution: Solution, hessian: Hessian) -> Solution:
    """The solution with the scales of the least loss for its codes. weight: (r, n), dense.

    In each row s = w H c / (c H c), c the codes; where that is not positive the scale stays. With a scale for each
    group of columns a row's g scales are found together, by least squares: (C H Cᵀ) s = C H wᵀ, where row i of
    C (g, n) holds the codes of group i and zeros. They are rounded to float16, as they are stored; a row keeps its
    scales where one of the new ones is not positive.
    """
    grid = solution.grid
    codes = grid.codes(solution.weight).to(weight.dtype)
    if grid.group is not None:
        rows = max(1, _SYSTEM_ELEMENTS // grid.scale.shape[1] ** 2)
        parts = zip(weight.split(rows), codes.split(rows), grid.scale.split(rows), strict=True)
        grid = replace(grid, scale=torch.cat([_group_scales(*part, hessian.matrix, grid.group) for part in parts]))
        return replace(solution, weight=codes * grid.over(codes.shape[1]), grid=grid)
    images = product(codes, hessian.matrix)
    power = (codes * images).sum(1, keepdim=True)
    scale = (weight * images).sum(1, keepdim=True) / power
    grid = Grid(torch.where((power > 0) & (scale > 0), scale, grid.scale), grid.bits)
    return replace(solution, weight=codes * grid.scale, grid=grid)


def _group_scales(weight: Tensor, codes: Tensor, scale: Tensor, matrix: Tensor, group: int) -> Tensor:
    """Scales (r, g) of the least loss for `codes (r, n)`, near `scale (r, g)` where the loss does not care."""
    curvature = torch.stack(
        [
            _by_group(product(part, rows) * codes, group)
            for part, rows in zip(codes.split(group, 1), matrix.split(group), strict=True)
        ],
        dim=1,
    ).double()
    slope = _by_group(product(weight, matrix) * codes, group).double()
    own = curvature.diagonal(dim1=1, dim2=2)
    ridge = torch.where(own > 0, own * _RIDGE, 1.0)
    found, failed = torch.linalg.solve_ex(curvature + torch.diag_embed(ridge), slope + ridge * scale)
    kept = (failed[:, None] != 0) | ~(torch.isfinite(found) & (found > 0)).all(1, keepdim=True)
    return torch.where(kept, scale, found.clamp(*HALF_RANGE).half().to(scale.dtype))


def _by_group(products: Tensor, group: int) -> Tensor:
    """Sums (r, g) over the columns of each group."""
    return torch.stack([part.sum(1) for part in products.split(group, 1)], dim=1)
