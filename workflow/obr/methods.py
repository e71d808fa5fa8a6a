"""The methods: from a layer's dense weights to pruned and quantised ones, errors compensated.

Every method is a function `(weight, hessian, mask, grid, **options) -> weight`, listed in METHODS. The objective is
`tr((W - Ŵ) H (W - Ŵ)ᵀ)`, H the Hessian of the layer's inputs.

Sources: OBR, arXiv 2509.11177 (the signs of its equations 9 and 10 are corrected: the compensation is added);
GPTQ, arXiv 2210.17323; SparseGPT, arXiv 2301.00774; Wanda, arXiv 2306.11695.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from obr.curvature import Hessian
from obr.joint import joint
from obr.prune import SCORES, mask_from_scores
from obr.quantize import Grid
from obr.rows import filled, parts, product
from obr.solver import TOLERANCE, images_on_support

BLOCK = 128  # columns of a GPTQ block
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
    inverse, _ = hessian.tail(cut)
    change = product(product(error, hessian.matrix[:cut, cut:]), inverse)
    if not kept.all():
        change -= images_on_support(inverse, change, ~kept, tolerance)
    return (right + change).mul_(kept)


def gptq_sweep(
    weight: Tensor,
    hessian: Hessian,
    grid: Grid,
    mask: Tensor,
    start: int = 0,
    choose: Callable[[Tensor, int], Tensor] | None = None,
    choose_every: int = BLOCK,
    clip: str = "mse",
) -> Tensor:
    """Round columns left to right from `start`, each column's error carried to those after it (GPTQ).

    weight, mask: (r, n); pruned columns are rounded to zero and their error is carried too (SparseGPT).
    choose: replaces the mask every `choose_every` columns: (current weights (r, w), first column) -> (r, w).
    clip: how the scale of a group of columns is found when its first column is reached, from its weights as they are
        then; written into grid.scale. Groups need `start` 0.
    Returns (r, n - start) on the grid. The first block of 128 starts at the cut, so no column is lost.
    """
    _, factor = hessian.tail(start)
    factor = factor / factor.diagonal()[:, None]  # a column's error, divided by the diagonal, times its row
    rows = len(weight)
    scale = grid.scale[:, :1] if grid.scale is not None else torch.ones_like(weight[:, :1])
    # Transposed: a column of the layer is then contiguous, and so is all that follows it. In units of the scale:
    # rounding is then to integers, and the carrying on of errors is linear in each row. Filled up to whole parts.
    work = filled(weight / scale).T[start:].contiguous()
    kept = filled(mask).T[start:].to(weight.dtype).contiguous()
    width = len(work)
    for first, last in _blocks(width, grid.group or BLOCK):
        block, local = work[first:last], factor[first:last, first:last]
        errors = torch.empty_like(block)
        for i in range(last - first):
            if grid.group is not None and first + i and (first + i) % grid.group == 0:
                scale = _next_group(grid, first + i, work[:, :rows], errors[:i, :rows], scale, clip)
            if choose is not None and (first + i) % choose_every == 0:
                span = slice(first + i, min(first + i + choose_every, last))
                kept[span, :rows] = choose(work[span, :rows].T * scale, start + first + i).T.to(kept.dtype)
            errors[i] = block[i]
            if grid.scale is not None:
                block[i].round_().clamp_(grid.low, grid.high)
            block[i].mul_(kept[first + i])
            errors[i].sub_(block[i])
            # Not addr_, which rounds the last few elements of a tensor in another way than those before.
            block[i + 1 :].addcmul_(local[i, i + 1 :, None], errors[i], value=-1)
        for part in parts(rows, work.device):
            work[last:, part].addmm_(factor[first:last, last:].T, errors[:, part], alpha=-1)
    if choose is not None:
        mask[:, start:] = kept[:, :rows].T.bool()
    return work[:, :rows].T.contiguous() * (scale if grid.group is None else grid.over(width))


def _blocks(width: int, group: int) -> Iterator[tuple[int, int]]:
    """(first, last) of blocks of at most 128 columns, such that each group begins one or lies within one: then its
    columns have all errors before it when its scale is fitted."""
    span = BLOCK // group * group if group < BLOCK else group
    for begin in range(0, width, span):
        end = min(begin + span, width)
        yield from ((first, min(first + BLOCK, end)) for first in range(begin, end, BLOCK))


def _next_group(grid: Grid, column: int, work: Tensor, errors: Tensor, scale: Tensor, clip: str) -> Tensor:
    """Fit the scales (r, 1) of the group that begins at this column of `work (n, r)`, and put all that is still to be
    rounded or carried on in their units, from those of `scale (r, 1)`."""
    number = column // grid.group
    current = work[column : column + grid.group].T * scale
    fitted = Grid.fit(current, grid.bits, clip, grid.group).scale
    grid.scale[:, number : number + 1] = fitted
    for part in (work[column:], errors):
        part.mul_((scale / fitted).T)
    return fitted


def round_to_nearest(weight, hessian, mask, grid, **_):
    """RTN, or with a mask: prune and round, no compensation (Wanda, magnitude)."""
    return grid.round(weight) * mask


def gptq(weight, hessian, mask, grid, *, clip="mse", **_):
    """GPTQ with the mask given."""
    return gptq_sweep(weight, hessian, grid, mask, clip=clip)


def obr_rtn(weight, hessian, mask, grid, *, alpha=0.5, **_):
    """OBR with rounding to nearest: restore for the pruning, then for the rounding left of the cut."""
    weight = restore_pruned(weight, hessian, mask)
    cut = int(alpha * weight.shape[1])
    left = grid.round(weight[:, :cut]) * mask[:, :cut]
    right = restore_rounded(weight, left, hessian, mask)
    return torch.cat([left, grid.round(right)], dim=1) * mask


def obr_gptq(weight, hessian, mask, grid, *, alpha=0.5, **_):
    """OBR with a GPTQ sweep right of the cut."""
    weight = restore_pruned(weight, hessian, mask, SWEPT_TOLERANCE)
    cut = int(alpha * weight.shape[1])
    left = grid.round(weight[:, :cut]) * mask[:, :cut]
    right = restore_rounded(weight, left, hessian, mask, SWEPT_TOLERANCE)
    swept = gptq_sweep(torch.cat([left, right], dim=1), hessian, grid, mask, start=cut)
    return torch.cat([left, swept], dim=1)


def sparsegpt_gptq(weight, hessian, mask, grid, *, sparsity=0.5, pattern=None, **_):
    """SparseGPT and GPTQ in one sweep; the mask is chosen on the way and written into `mask`.

    Unstructured: in each block of 128 columns the lowest scores over *all rows* go, so rows differ in
    sparsity, as in SparseGPT's code. With a pattern: group by group.
    """
    diagonal = hessian.inverse_factor.diagonal()

    def choose(block: Tensor, first: int) -> Tensor:
        scores = SCORES["sparsegpt"](block, inverse_factor_diagonal=diagonal[first : first + block.shape[1]])
        if pattern is not None:
            return mask_from_scores(scores, sparsity, pattern)
        threshold = scores.flatten().sort().values[int(scores.numel() * sparsity)]
        return scores > threshold

    every = pattern.group if pattern is not None else BLOCK
    return gptq_sweep(weight, hessian, grid, mask, choose=choose, choose_every=every)


# (weight (r, n), Hessian, mask (r, n), Grid, **options) -> weight (r, n)
METHODS: dict[str, Callable[..., Tensor]] = {
    "rtn": round_to_nearest,
    "gptq": gptq,
    "magnitude": round_to_nearest,
    "wanda": round_to_nearest,
    "sparsegpt_gptq": sparsegpt_gptq,
    "obr_rtn": obr_rtn,
    "obr_gptq": obr_gptq,
    "joint": joint,
}
