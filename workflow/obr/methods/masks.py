"""Masks: which weights of a layer stay. True means kept.

A score is a function (weight (r, n), Hessian, seed) -> (r, n), named as its entry of MASKS in `obr.config.methods`;
the lowest scores are pruned.
"""

import torch
from torch import Tensor

from obr.config.pattern import Pattern
from obr.errors import ObrError
from obr.methods.layer_hessian import Hessian


def magnitude(weight: Tensor, hessian: Hessian | None, seed: int) -> Tensor:
    """|w|."""
    return weight.abs()


def wanda(weight: Tensor, hessian: Hessian, seed: int) -> Tensor:
    """|w| times the norm of its input channel (Sun et al. 2024); the Hessian's diagonal is that norm squared,
    up to a factor common to all columns."""
    return weight.abs() * hessian.diagonal.sqrt()


def wanda_harmonic(weight: Tensor, hessian: Hessian, seed: int) -> Tensor:
    """|w| √a with a_j = Σ_i ‖X_i[:, j]‖² / i over the calibration sequences X_i in their order, i from 1.

    The statistic of OBR's released code for QuaRot and FlatQuant, a running mean whose earlier terms are not scaled
    down: of 128 sequences the first counts 18 % and the last 0.14 %, where the mean (`wanda`) has 0.78 % for each.
    """
    return weight.abs() * hessian.harmonic.sqrt()


def sparsegpt(weight: Tensor, hessian: Hessian, seed: int) -> Tensor:
    """w² / d² with d the diagonal of the upper Cholesky factor of H⁻¹ (Frantar & Alistarh 2023)."""
    return saliency(weight, hessian.inverse_factor.diagonal())


def saliency(weight: Tensor, inverse_factor_diagonal: Tensor) -> Tensor:
    """w² / d², (r, n), with d (n,) the diagonal of the upper Cholesky factor of H⁻¹."""
    return (weight / inverse_factor_diagonal).square()


def random(weight: Tensor, hessian: Hessian | None, seed: int) -> Tensor:
    """Uniform noise, the same for the same seed and shape on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def mask_from_scores(scores: Tensor, sparsity: float, pattern: Pattern | None = None) -> Tensor:
    """The mask (r, n) that keeps the highest scores.

    Unstructured: of each row the int(n * sparsity) lowest go, of equal ones the first. With a pattern: the
    highest of each group stay, pairs being judged by their sum; of equal ones whichever torch.topk leaves, as in
    the published code.

    Raises:
        ObrError: the pattern's group does not divide n.

    Example:
        >>> mask_from_scores(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), 0.5).tolist()
        [[True, False, False, True]]
    """
    if pattern is None:
        return _keep_all_but(scores, int(scores.shape[1] * sparsity))
    pattern.check_width(scores.shape[1], "the layer")
    kept, units = pattern.units
    grouped = _units(scores, pattern)
    pruned = grouped.topk(units - kept, dim=-1, largest=False).indices
    mask = torch.ones_like(grouped, dtype=torch.bool).scatter_(-1, pruned, False)
    return _columns(mask, pattern)


def mask_from_ranks(scores: Tensor, pattern: Pattern) -> Tensor:
    """`mask_from_scores` with a pattern, but of equal scores in a group the first go, on every device."""
    kept, units = pattern.units
    grouped = _units(scores, pattern)
    ranks, place = torch.zeros_like(grouped, dtype=torch.int16), torch.arange(units, device=scores.device)
    for other, score in enumerate(grouped.unbind(-1)):
        score = score.unsqueeze(-1)
        ranks += torch.where(place > other, score <= grouped, score < grouped)
    return _columns(ranks >= units - kept, pattern)


def _units(scores: Tensor, pattern: Pattern) -> Tensor:
    """Scores (r, groups, units) of what a pattern keeps or prunes: weights, or pairs of them."""
    grouped = scores.reshape(len(scores), -1, pattern.group)
    return grouped.unflatten(-1, (-1, 2)).sum(-1) if pattern.paired else grouped


def _columns(mask: Tensor, pattern: Pattern) -> Tensor:
    """The mask (r, n) of a mask (r, groups, units)."""
    return (mask.repeat_interleave(2, dim=-1) if pattern.paired else mask).flatten(1)


def _keep_all_but(scores: Tensor, pruned: int) -> Tensor:
    if pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.topk(pruned, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    mask = scores > threshold
    if scores.device.type != "cpu":  # without asking how many rows are tied, for which a GPU would be waited for
        tied = scores == threshold
        left = pruned - (scores < threshold).sum(1, keepdim=True, dtype=torch.int32)
        return mask | (tied & (tied.cumsum(1, dtype=torch.int32) > left))
    tied = (mask.sum(1) != scores.shape[1] - pruned).nonzero()[:, 0]
    if len(tied):  # more scores equal the threshold than may go
        order = scores[tied].sort(dim=1, stable=True).indices[:, :pruned]
        mask[tied] = torch.ones_like(scores[tied], dtype=torch.bool).scatter_(1, order, False)
    return mask


def check_mask(mask: Tensor, sparsity: float, pattern: Pattern | None, what: str, scope: str = "row") -> None:
    """Raise ObrError unless `mask (r, n)` prunes what it should, in each row or group, or in all."""
    if pattern is None:
        expected = mask.shape[1] - int(mask.shape[1] * sparsity)
        kept = mask.sum(1)
        right = bool((kept == expected).all()) if scope == "row" else int(kept.sum()) == expected * len(mask)
    else:
        groups = mask.reshape(len(mask), -1, pattern.group)
        right = bool((groups.sum(-1) == pattern.kept).all())
        if pattern.paired:
            pairs = groups.unflatten(-1, (-1, 2))
            right = right and bool((pairs[..., 0] == pairs[..., 1]).all())
    if not right:
        raise ObrError(f"{what}: the mask does not have the asked sparsity {pattern or sparsity}.")
