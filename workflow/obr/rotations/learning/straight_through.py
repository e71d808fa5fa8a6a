"""Quantisers for learning: forward as in evaluation, backward as if rounding were not there.

Two kinds, which the papers differ in. `ste_identity`: the gradient of the output is that of the input, scales are
constants (SpinQuant). `ste_range`: only rounding is passed over, so that gradients reach the range, and factors of
it, and stop at clipped values (FlatQuant, OmniQuant, OSTQuant). Either stands in for `fake_quant.fake_quantize`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from obr.config.quantizer import QuantizerSettings
from obr.methods.grid import Grid
from obr.models.fake_quant import fake_quantize
from obr.models.layers import KeyValueQuantizer, QuantLinear

if TYPE_CHECKING:
    from obr.models.online_transforms import Range


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(context, x: Tensor, quantised: Tensor) -> Tensor:
        return quantised

    @staticmethod
    def backward(context, gradient: Tensor):
        return gradient, None


def rounded(x: Tensor) -> Tensor:
    """The nearest integers, with the gradient of x."""
    return _Passed.apply(x, x.detach().round())


def ste_identity(x: Tensor, settings: QuantizerSettings, bounds: "Range | None" = None) -> Tensor:
    """`fake_quantize` of x (..., c) whose gradient is passed on unchanged, also beyond the range."""
    if settings.bits == 16:
        return x
    with torch.no_grad():
        quantised = fake_quantize(x, settings, bounds)
    return _Passed.apply(x, quantised)


def ste_range(x: Tensor, settings: QuantizerSettings, bounds: "Range | None" = None) -> Tensor:
    """`fake_quantize` of x (..., c) with gradients through scale, clamp and zero point, to learned bounds too."""
    if settings.bits == 16:
        return x
    values = x.float().unflatten(-1, (-1, settings.group_size or x.shape[-1]))
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    if settings.clip_ratio == "learned":
        low, high = low * bounds.low, high * bounds.high
    else:
        low, high = low * settings.clip_ratio, high * settings.clip_ratio
    quantised = symmetric if settings.symmetric else asymmetric
    return quantised(values, low, high, settings.bits).flatten(-2).to(x.dtype)


def symmetric(values: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Values (..., n) on the symmetric grid that reaches as far as the farther of low and high (..., 1)."""
    largest = 2 ** (bits - 1) - 1
    scale = (torch.maximum(low.abs(), high.abs()) / largest).clamp_min(1e-12)
    return rounded(values / scale).clamp(-largest - 1, largest) * scale


def asymmetric(values: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Values (..., n) on the grid of 2^bits points from low to high (..., 1), zero always among them."""
    largest = 2**bits - 1
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / largest).clamp_min(1e-12)
    zero = rounded(-low / scale)
    return ((rounded(values / scale) + zero).clamp(0, largest) - zero) * scale


def ste_weight(weight: Tensor, bits: int, clip: str = "mse", grid: Grid | None = None) -> Tensor:
    """Weight (r, n) on its rows' symmetric grid; the gradient is passed on unchanged.

    grid: as `Grid.fit` finds it for this weight, if that is known already.
    """
    if bits == 16:
        return weight
    with torch.no_grad():
        quantised = (grid or Grid.fit(weight, bits, clip)).round(weight)
    return _Passed.apply(weight, quantised)


def clipped_weight(weight: Tensor, bits: int, grid: Grid | None = None) -> Tensor:
    """Weight (r, n) on its rows' symmetric grids, with the scales that the search of `Grid.fit` finds.

    Scales are constants for the gradient, which passes rounding and stops at clipped weights, as in OSTQuant's code
    (arXiv 2501.13987). Its search minimises squared errors; `Grid.fit` minimises their power 2.4. grid: as of
    `ste_weight`.
    """
    if bits == 16:
        return weight
    if grid is None:
        with torch.no_grad():
            grid = Grid.fit(weight, bits, "mse")
    return rounded(weight / grid.scale).clamp(grid.low, grid.high) * grid.scale


def ste_range_weight(weight: Tensor, bits: int, group_size: int | None = None, is_symmetric: bool = True) -> Tensor:
    """Weight (r, n) on min-max grids of its rows, or of their groups of columns, with gradients through the range."""
    if bits == 16:
        return weight
    values = weight.unflatten(1, (-1, group_size or weight.shape[1]))
    quantised = symmetric if is_symmetric else asymmetric
    return quantised(values, values.amin(-1, keepdim=True), values.amax(-1, keepdim=True), bits).flatten(1)


def swap(block: nn.Module, quantiser: Callable) -> None:
    """Set the quantisers of a wrapped block's activations, keys and values to `ste_identity` or `ste_range`."""
    for module in block.modules():
        if isinstance(module, (QuantLinear, KeyValueQuantizer)):
            module.quantize = quantiser
