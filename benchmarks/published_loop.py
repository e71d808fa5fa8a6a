"""The published algorithm's loop over rows: what the library's solver is measured against.

Optimal Brain Restoration (arXiv 2509.11177, Algorithm 1) as its authors' released code computes it, in float32.
For each row, alone:

* two gathers of the damped Hessian, all columns of the kept rows first: H[R][:, R] (k, k) and H[R][:, E];
* a fresh Cholesky factor of H_RR and a triangular solve, no explicit inverse: w_R += H_RR⁻¹ H_RE w_E;
* the kept weights are rounded, and of H_RR the part right of the cut is gathered and factored afresh, about
  (k/2, k/2), for the second solve: w_R2 += H_R2R2⁻¹ H_R2E2 e_E2.

At 50 % sparsity that is k = n/2, hence n³/24 and n³/192 multiply-adds a row. OBR_RTN then rounds all; OBR_GPTQ
rounds left of the cut and sweeps GPTQ's blocks of 128 columns over all rows at once right of it, each column's
error going to all that follow, pruned ones included.

Two departures, neither costing time: the compensation is added (the paper's equations subtract it, its code does
not), and the sweep's first block starts at the cut instead of at the next multiple of 128, where columns would be
left out. Nothing here is the library's, so that a change of the one cannot move the other.
"""

import torch
from torch import Tensor

BLOCK = 128


def damped(hessian: Tensor, damp: float = 0.01) -> Tensor:
    """The Hessian (n, n) as the loop uses it: `damp` times the mean of its diagonal on the diagonal."""
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian))


def rounded(values: Tensor, scale: Tensor, bits: int = 4) -> Tensor:
    return (values / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def solved(matrix: Tensor, target: Tensor) -> Tensor:
    return torch.cholesky_solve(target[:, None], torch.linalg.cholesky(matrix))[:, 0]


def restored_rows(weight: Tensor, hessian: Tensor, mask: Tensor, scale: Tensor, alpha: float = 0.5) -> Tensor:
    """The loop over rows. weight, mask: (r, n). hessian: (n, n), damped. scale: (r, 1). Returns (r, n), not rounded.

    Right of the cut, the rows hold both compensations; left of it, the first.
    """
    cut = int(alpha * weight.shape[1])
    result = weight * mask
    for row in range(len(weight)):
        kept, gone = mask[row].nonzero()[:, 0], (~mask[row]).nonzero()[:, 0]
        kept_kept = hessian[kept][:, kept]
        kept_gone = hessian[kept][:, gone]
        w = weight[row, kept] + solved(kept_kept, kept_gone @ weight[row, gone])

        error = w - rounded(w, scale[row])
        at = int(torch.searchsorted(kept, cut))
        left, right = torch.arange(at), torch.arange(at, len(kept))
        right_left = kept_kept[right][:, left]
        right_right = kept_kept[right][:, right]
        w[right] += solved(right_right, right_left @ error[left])
        result[row, kept] = w
    return result


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper factor of the inverse (n, n), by which GPTQ carries errors: three factorisations a layer."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def swept(weight: Tensor, factor: Tensor, mask: Tensor, scale: Tensor, cut: int) -> Tensor:
    """GPTQ right of the cut: (r, n - cut). weight, mask: (r, n). factor: (n, n) of `inverse_factor`."""
    work = weight.clone()
    result = torch.zeros_like(work)
    for first in range(cut, work.shape[1], BLOCK):
        last = min(first + BLOCK, work.shape[1])
        block, local = work[:, first:last].clone(), factor[first:last, first:last]
        errors = torch.zeros_like(block)
        for i in range(last - first):
            column = block[:, i]
            value = rounded(column[:, None], scale)[:, 0] * mask[:, first + i]
            error = (column - value) / local[i, i]
            result[:, first + i], errors[:, i] = value, error
            block[:, i:] -= error[:, None] @ local[i : i + 1, i:]
        work[:, last:] -= errors @ factor[first:last, last:]
    return result[:, cut:]


def obr_gptq(weight: Tensor, hessian: Tensor, mask: Tensor, scale: Tensor, alpha: float = 0.5) -> Tensor:
    """OBR_GPTQ of a whole layer. hessian: (n, n), undamped. Returns (r, n) on the grid."""
    hessian, cut = damped(hessian), int(alpha * weight.shape[1])
    restored = restored_rows(weight, hessian, mask, scale, alpha)
    right = swept(restored, inverse_factor(hessian), mask, scale, cut)
    return torch.cat([rounded(restored[:, :cut], scale), right], dim=1)


def obr_rtn(weight: Tensor, hessian: Tensor, mask: Tensor, scale: Tensor, alpha: float = 0.5) -> Tensor:
    """OBR_RTN of a whole layer, likewise."""
    return rounded(restored_rows(weight, damped(hessian), mask, scale, alpha), scale)
