"""The published algorithm's cost, written out plainly: every row factors its own two matrices.

OBR_GPTQ of arXiv 2509.11177 as a loop over rows, in float32, with the compensation's right sign. What all rows
share (scale, mask, damping, GPTQ's sweep over the columns right of the cut) is the library's, so that the
difference measured is that of the solver.
"""

import torch
from torch import Tensor

from obr.quantize import Grid
from obr.restoration import Hessian, gptq_sweep


def solve(matrix: Tensor, target: Tensor) -> Tensor:
    return torch.cholesky_solve(target[:, None], torch.linalg.cholesky(matrix))[:, 0]


def obr_gptq_rows(weight: Tensor, hessian: Hessian, mask: Tensor, grid: Grid, alpha: float = 0.5) -> Tensor:
    """weight, mask: (r, n). Returns the rows compressed, (r, n)."""
    damped = hessian.damped
    cut = int(alpha * weight.shape[1])
    restored = torch.zeros_like(weight)
    for row, (w, keep) in enumerate(zip(weight, mask, strict=True)):
        kept, gone = keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
        rows = damped[kept]
        w = w.clone()
        w[kept] += solve(rows[:, kept], rows[:, gone] @ w[gone])
        w[gone] = 0
        left, right = kept[kept < cut], kept[kept >= cut]
        rounded = grid_row(grid, row, w[left])
        rows = damped[right]
        w[right] += solve(rows[:, right], rows[:, left] @ (w[left] - rounded))
        w[left] = rounded
        restored[row] = w
    swept = gptq_sweep(restored, hessian, grid, mask, start=cut)
    return torch.cat([restored[:, :cut], swept], dim=1)


def grid_row(grid: Grid, row: int, values: Tensor) -> Tensor:
    return Grid(grid.scale[row : row + 1], grid.bits).round(values[None])[0]
