"""Fake quantisation of activations, keys and values."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from obr.config.quantizer import QuantizerSettings

if TYPE_CHECKING:
    from obr.models.online_transforms import Range


def fake_quantize(x: Tensor, settings: QuantizerSettings, bounds: "Range | None" = None) -> Tensor:
    """Round `x (..., c)` to b bits with one scale a token, or a token's group of channels, found on the fly.

    Symmetric: integers in [-2^(b-1), 2^(b-1) - 1], scale = clip_ratio * max|x| / (2^(b-1) - 1). Asymmetric:
    integers in [0, 2^b - 1] over [min, max], zero always inside. Computed in float32, returned in x's dtype.

    bounds: with `low` and `high` (1,), factors of min and max in place of a clip_ratio that is "learned".

    Example:
        >>> fake_quantize(torch.tensor([[0.5, -1.0, 7.0]]), QuantizerSettings(4)).tolist()
        [[0.0, -1.0, 7.0]]
    """
    if settings.bits == 16:
        return x
    group = settings.group_size or x.shape[-1]
    values = x.float().unflatten(-1, (-1, group))
    if settings.clip_ratio == "learned":
        low, top = values.amin(-1, keepdim=True) * bounds.low, values.amax(-1, keepdim=True) * bounds.high
    elif settings.symmetric:
        low = top = values.abs().amax(-1, keepdim=True) * settings.clip_ratio
    else:
        low, top = (extreme * settings.clip_ratio for extreme in values.aminmax(dim=-1, keepdim=True))
    if settings.symmetric:
        high = 2 ** (settings.bits - 1) - 1
        scale = (torch.maximum(low.abs(), top.abs()) / high).clamp_min_(1e-12)
        values = (values / scale).round_().clamp_(-high - 1, high).mul_(scale)
    else:
        high = 2**settings.bits - 1
        low, top = low.clamp_max(0), top.clamp_min(0)
        scale = ((top - low) / high).clamp_min_(1e-12)
        zero = (-low / scale).round_()
        values = (values / scale).round_().add_(zero).clamp_(0, high).sub_(zero).mul_(scale)
    return values.flatten(-2).to(x.dtype)
