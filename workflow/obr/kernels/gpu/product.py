"""Products of packed weights with tokens on a GPU: kernels for few tokens, rows unpacked and multiplied for many."""

import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from obr.config.pattern import Pattern
from obr.config.quantizer import QuantizerSettings
from obr.errors import ObrError
from obr.kernels.gpu.layout import WORD, Weight, controls, field_bits, masks_of, widened_group

if TYPE_CHECKING:
    from obr.models.online_transforms import Range

FEW = 16  # tokens that the kernels take; more are multiplied by unpacked rows
UNPACKED = 1 << 25  # weights that are unpacked at a time
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of activations that are not rounded
LAYOUT_NUMBERS = {"dense": 0, "bitmask": 1}  # of programs.py; 2 for the numbers of N:M masks
# Rows, words of a program, and its warps, by the kernel. Chosen without a device: enough programs for all
# multiprocessors at 4096 rows, and few enough registers for several programs on each.
BLOCKS = {"one_token": (8, 64, 4), "few_tokens": (16, 32, 4), "unpack_rows": (8, 64, 4)}


@cache
def programs() -> ModuleType:
    """The Triton kernels. Raises ObrError where Triton is not installed."""
    try:
        from obr.kernels.gpu import programs as found
    except ImportError as error:
        raise ObrError(
            f"Packed weights on a GPU need Triton ({error}); install obr[triton], or load with packed=False."
        ) from error
    return found


@dataclass(frozen=True)
class Tokens:
    """Activations rounded to whole numbers, values * scale. values: (t, n) int8, or int16 where a zero point was
    taken off; scale: (t,)."""

    values: Tensor
    scale: Tensor

    @property
    def floats(self) -> Tensor:
        """The rounded activations (t, n) in float32."""
        return self.values * self.scale[:, None]


def quantize(x: Tensor, settings: QuantizerSettings, bounds: "Range | None" = None) -> Tokens:
    """Round `x (t, n)` token by token to the grid of `fake_quant.fake_quantize`, the same whole numbers.

    bounds: factors `low` and `high` (1,) of a token's extremes, for a learned clip_ratio.

    Raises:
        ObrError: settings that one scale a token and 8 bits cannot hold.
    """
    if settings.bits > 8 or settings.group_size is not None:
        raise ObrError(
            f"Activations of {settings.bits} bits, group_size {settings.group_size}: packed kernels take 2 to 8 "
            "bits and one scale a token (group_size null)."
        )
    values = x.float()
    low, top = (extreme for extreme in values.aminmax(dim=1, keepdim=True))
    if settings.clip_ratio == "learned":
        low, top = low * bounds.low, top * bounds.high
    elif settings.symmetric:
        low = top = torch.maximum(low.abs(), top.abs()) * settings.clip_ratio
    else:
        low, top = low * settings.clip_ratio, top * settings.clip_ratio
    if settings.symmetric:
        high = 2 ** (settings.bits - 1) - 1
        scale = (torch.maximum(low.abs(), top.abs()) / high).clamp_min_(1e-12)
        whole = (values / scale).round_().clamp_(-high - 1, high)
        kind = torch.int8
    else:
        high = 2**settings.bits - 1
        low, top = low.clamp_max(0), top.clamp_min(0)
        scale = ((top - low) / high).clamp_min_(1e-12)
        zero = (-low / scale).round_()
        whole = (values / scale).round_().add_(zero).clamp_(0, high).sub_(zero)
        kind = torch.int16
    return Tokens(whole.to(kind), scale[:, 0])


def multiply(
    weight: Weight, x: "Tensor | Tokens", bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The layer's output (t, r): x (t, n), floats of 16 or 32 bits or rounded tokens, by the weight's transpose.

    bias: (r,). dtype: of the output, by default that of floats, float32 for rounded tokens.

    Raises:
        ObrError: tokens of another width, device or type, a weight that is not on a GPU, or no Triton.
    """
    values = x.values if isinstance(x, Tokens) else x
    _check(weight, values, isinstance(x, Tokens))
    dtype = dtype or (torch.float32 if isinstance(x, Tokens) else x.dtype)
    if len(values) > FEW:
        return _by_unpacked_rows(weight, x.floats.to(dtype) if isinstance(x, Tokens) else x, bias, dtype)
    out = torch.empty(len(values), weight.rows, dtype=dtype, device=values.device)
    if not len(values):
        return out
    kernel = "one_token" if len(values) == 1 else "few_tokens"
    factor = x.scale if isinstance(x, Tokens) else weight.scale  # not read for floats
    arguments = [values.contiguous(), factor, *_operands(weight), weight.scale]
    arguments += [weight.scale if bias is None else bias.contiguous(), out, *_sizes(weight)]
    if kernel == "few_tokens":
        arguments.append(len(values))
    constants = constants_of(weight, kernel)
    constants |= {"WHOLE": isinstance(x, Tokens), "BIAS": bias is not None}
    _launch(kernel, weight.rows, arguments, constants, values.device)
    return out


def unpacked(weight: Weight, dtype: torch.dtype, first: int = 0, last: int | None = None) -> Tensor:
    """Rows `first` to `last` of the weight, codes times scales, (last - first, n). Raises ObrError as `multiply`."""
    last = weight.rows if last is None else last
    out = torch.empty(last - first, weight.columns, dtype=dtype, device=weight.codes.device)
    arguments = [*_operands(weight), weight.scale, out, *_sizes(weight), first, last]
    _launch("unpack_rows", last - first, arguments, constants_of(weight, "unpack_rows"), out.device)
    return out


def constants_of(weight: Weight, kernel: str) -> dict[str, Any]:
    """The compile-time constants of a kernel of programs.py for a weight, WHOLE and BIAS left out."""
    rows, words, warps = BLOCKS[kernel]
    wide = 0 if weight.group is None else widened_group(weight.group)
    pattern = None if weight.layout in LAYOUT_NUMBERS else Pattern.parse(weight.layout)
    found = {
        "BITS": weight.bits, "LAYOUT": LAYOUT_NUMBERS.get(weight.layout, 2), "M": pattern.group if pattern else 1,
        "N": pattern.kept if pattern else 1, "FIELD": field_bits(weight.layout), "GROUP": weight.group or 0,
        "WIDE": wide, "R": rows, "W": words, "num_warps": warps,
    }  # fmt: skip
    if kernel == "few_tokens":
        found["T"] = FEW
        while wide and (wide // WORD) % found["W"]:
            found["W"] //= 2  # so that a block reads one scale a row
    return found


def _by_unpacked_rows(weight: Weight, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(x), weight.rows, dtype=dtype, device=x.device)
    step = max(1, UNPACKED // weight.columns)
    for first in range(0, weight.rows, step):
        last = min(first + step, weight.rows)
        part = functional.linear(x, unpacked(weight, x.dtype, first, last))
        out[:, first:last] = part if bias is None else part + bias[first:last]
    return out


def _operands(weight: Weight) -> list[Tensor]:
    device = str(weight.codes.device)
    return [
        weight.codes, weight.starts, weight.masks, masks_of(weight.layout, device), controls(weight.bits, device)
    ]  # fmt: skip


def _sizes(weight: Weight) -> list[int]:
    stride = weight.masks.shape[1] if weight.masks.ndim == 2 else 0
    return [stride, weight.rows, weight.columns, weight.words, weight.scale.shape[1]]


def _launch(kernel: str, rows: int, arguments: list, constants: dict[str, Any], device: torch.device) -> None:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ObrError(f"Packed weights of a GPU's layout are on {device}; move the model back to the GPU.")
    grid, constants = (-(-rows // constants["R"]),), {**constants, "enable_fp_fusion": True}
    function = getattr(programs(), kernel)
    if device.type != "cuda":
        function[grid](*arguments, **constants)  # Triton's interpreter
        return
    with torch.cuda.device(device):
        function[grid](*arguments, **constants)


def _check(weight: Weight, values: Tensor, whole: bool) -> None:
    if values.shape[1] != weight.columns:
        raise ObrError(
            f"Tokens of {values.shape[1]} channels do not fit a weight of {weight.columns} columns; another layer's?"
        )
    if values.device != weight.codes.device:
        raise ObrError(
            f"Activations on {values.device} cannot meet packed weights on {weight.codes.device}; move one of them."
        )
    if not whole and values.dtype not in DTYPES:
        raise ObrError(f"Activations in {values.dtype} have no packed kernel; use float16, bfloat16 or float32.")
