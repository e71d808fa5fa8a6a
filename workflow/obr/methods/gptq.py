"""GPTQ: weights rounded column by column, the error of each carried to the columns that follow."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from obr.methods.grid import Grid
from obr.methods.layer import Layer, Solution
from obr.methods.row_products import filled, parts, whole

BLOCK = 128  # columns of a GPTQ block


def gptq_sweep(
    layer: Layer, start: int = 0, choose: Callable[[Tensor, int], Tensor] | None = None, choose_every: int = BLOCK
) -> Solution:
    """Round columns left to right from `start`, each column's error carried to those after it (GPTQ).

    Pruned columns are rounded to zero and their error is carried too (SparseGPT).
    choose: replaces the mask every `choose_every` columns: (current weights (r, w), first column) -> (r, w).
    The scale of a group of columns is found when its first column is reached, from its weights as they are then;
    where the grid names the order of its columns, its scales stay. Others with groups need `start` 0.

    Returns weights (r, n - start) on the grid, the mask (r, n), and the grid with the scales as found. The first
    block of 128 starts at the cut, so no column is lost.
    """
    weight, hessian, mask, grid = layer.weight, layer.hessian, layer.mask, layer.grid
    width = weight.shape[1] - start
    static = grid.group is not None and grid.order is not None
    fixed = _in_parts(grid.over(weight.shape[1]).T[start:]) if static else None
    group = grid.group if fixed is None else None  # whose scales are found on the way
    if group is not None:
        grid = replace(grid, scale=grid.scale.clone())  # filled on the way
    factor, rows = hessian.factor(start), len(weight)
    scale = grid.scale[:, :1] if grid.scale is not None and fixed is None else torch.ones_like(weight[:, :1])
    # Transposed: a column of the layer is then contiguous, and so is all that follows it. In units of the scale:
    # rounding is then to integers, and the carrying on of errors is linear in each row. Filled up to whole parts.
    work = weight.new_zeros(width, whole(rows, weight.device))
    torch.div(weight.T[start:], scale.T, out=work[:, :rows])
    kept = filled(mask).T[start:].contiguous()
    for first, last in _blocks(width, group or BLOCK):
        # What a column's error, divided by the diagonal, is multiplied by.
        carried = factor[first:last, first:] / factor.diagonal()[first:last, None]
        block, local = work[first:last], carried[:, : last - first]
        errors = torch.empty_like(block)
        for i in range(last - first):
            if group is not None and first + i and (first + i) % group == 0:
                scale = _next_group(layer, grid, first + i, work[:, :rows], errors[:i, :rows], scale)
            if choose is not None and (first + i) % choose_every == 0:
                span = slice(first + i, min(first + i + choose_every, last))
                kept[span, :rows] = choose(work[span, :rows].T * scale, start + first + i).T.to(kept.dtype)
            errors[i] = block[i]
            if grid.scale is not None:
                _round(block[i], grid, None if fixed is None else fixed[first + i])
            block[i].mul_(kept[first + i])
            errors[i].sub_(block[i])
            # Not addr_, which rounds the last few elements of a tensor in another way than those before.
            block[i + 1 :].addcmul_(local[i, i + 1 :, None], errors[i], value=-1)
        for part in parts(rows, work.device):
            work[last:, part].addmm_(carried[:, last - first :].T, errors[:, part], alpha=-1)
    if choose is not None:
        mask = torch.cat([mask[:, :start], kept[:, :rows].T], dim=1)
    swept = work[:, :rows].T.contiguous().mul_(scale if group is None else grid.over(width))
    return Solution(swept, mask, grid)


def _in_parts(scales: Tensor) -> Tensor:
    """`scales (n, r)` with ones behind each column's, up to whole parts of rows."""
    return filled(scales.T, 1).T.contiguous()


def _round(column: Tensor, grid: Grid, scale: Tensor | None) -> None:
    """Round a column (r,) in place, which is in units of `scale (r,)`; None for integers, in units of one."""
    if scale is not None:
        column.div_(scale)
    column.round_().clamp_(grid.low, grid.high)
    if scale is not None:
        column.mul_(scale)


def _blocks(width: int, group: int) -> Iterator[tuple[int, int]]:
    """(first, last) of blocks of at most 128 columns, such that each group begins one or lies within one: then its
    columns have all errors before it when its scale is fitted."""
    span = BLOCK // group * group if group < BLOCK else group
    for begin in range(0, width, span):
        end = min(begin + span, width)
        yield from ((first, min(first + BLOCK, end)) for first in range(begin, end, BLOCK))


def _next_group(layer: Layer, grid: Grid, column: int, work: Tensor, errors: Tensor, scale: Tensor) -> Tensor:
    """Fit the scales (r, 1) of the group that begins at this column of `work (n, r)`, and put all that is still to be
    rounded or carried on in their units, from those of `scale (r, 1)`."""
    number = column // grid.group
    current = work[column : column + grid.group].T * scale
    importance = layer.hessian.diagonal[column : column + grid.group]
    fitted = Grid.fit(current, grid.bits, layer.recipe.clip, grid.group, importance).scale
    grid.scale[:, number : number + 1] = fitted
    for part in (work[column:], errors):
        part.mul_((scale / fitted).T)
    return fitted


def round_by_gptq(layer: Layer) -> Solution:
    """GPTQ with the mask given."""
    return gptq_sweep(layer)
