"""A mask learned by a continuous relaxation: what the joint method is held against, and no method of the package.

Every weight has a gate, σ((score - threshold) / τ), the threshold the row's so that half of the gates are open. Gates
and values are learned together by Adam on the loss tr((W - V∘g) H (W - V∘g)ᵀ), whose best values for given gates are
the closed-form restoration's (OBR, equation 9), while τ falls until the gates are open or shut.
"""

import torch
from torch import Tensor

from obr.methods.masks import mask_from_scores

STEPS, RATE = 300, 0.01  # from a quarter to five times this rate the error changes by a twentieth at most
HOT, COLD = 0.5, 0.02  # τ at first and at last, in units of the scores' mean


def learned_mask(weight: Tensor, hessian: Tensor, sparsity: float = 0.5) -> Tensor:
    """(r, n) bool, True where kept: of weight (r, n), hessian (n, n)."""
    root = hessian.diagonal().clamp_min(1e-12).sqrt()
    scaled = hessian / root / root[:, None]
    target = weight.float() * root
    unit = target.abs().mean()
    scores, values = target.abs().clone().requires_grad_(), target.clone().requires_grad_()
    optimiser = torch.optim.Adam([scores, values], lr=RATE * float(unit))
    dropped = int(weight.shape[1] * sparsity)
    with torch.enable_grad():
        for step in range(STEPS):
            heat = float(unit) * HOT * (COLD / HOT) ** (step / STEPS)
            threshold = scores.detach().kthvalue(dropped, dim=1, keepdim=True).values
            change = target - values * torch.sigmoid((scores - threshold) / heat)
            optimiser.zero_grad()
            ((change @ scaled) * change).sum().div(change.square().sum().detach()).backward()
            optimiser.step()
    return mask_from_scores(scores.detach(), sparsity)
