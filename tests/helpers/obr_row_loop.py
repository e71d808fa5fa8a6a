"""Optimal Brain Restoration written out plainly, row by row in float64: the oracle of the tests.

From the equations of arXiv 2509.11177 with the compensation added instead of subtracted.
"""

import torch
from torch import Tensor


def damped(hessian: Tensor, damp: float) -> Tensor:
    hessian = hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def restore_rows(weight: Tensor, hessian: Tensor, mask: Tensor, scale: Tensor, bits: int, alpha: float, gptq: bool):
    """weight, mask: (r, n). scale: (r, 1). Returns (r, n)."""
    h = damped(hessian, 0.01)
    columns = weight.shape[1]
    cut = int(alpha * columns)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    result = torch.zeros_like(weight, dtype=torch.float64)
    for row, (w, keep) in enumerate(zip(weight.double(), mask, strict=True)):
        w = w.clone()
        s = float(scale[row])

        def nearest(x, s=s):
            return s * (x / s).round().clamp(low, high)

        kept, gone = keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
        if len(gone):
            w[kept] += torch.linalg.solve(h[kept][:, kept], h[kept][:, gone] @ w[gone])
            w[gone] = 0
        left, right = kept[kept < cut], kept[kept >= cut]
        error = w[left] - nearest(w[left])
        w[left] = nearest(w[left])
        if len(left) and len(right):
            w[right] += torch.linalg.solve(h[right][:, right], h[right][:, left] @ error)
        if gptq:
            for j in range(cut, columns):
                rounded = nearest(w[j]) if keep[j] else torch.zeros_like(w[j])
                step = (w[j] - rounded) / factor[j, j]
                w[j:] -= step * factor[j, j:]
                w[j] = rounded
        else:
            w[right] = nearest(w[right])
            w[gone] = 0
        result[row] = w
    return result
