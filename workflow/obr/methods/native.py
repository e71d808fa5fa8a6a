"""Compiled loops of the methods: native.cpp; where there is no compiler, PyTorch does the same."""

import ctypes
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from obr.errors import ObrError
from obr.runtime.compiler import build, pointer

SOURCE = Path(__file__).with_name("native.cpp")
# Nothing that changes a result: no -ffast-math, no reordered sums (-fassociative-math), no fused multiply-add. So the
# loops give the same bits for every compiler and processor, and the same as their counterparts in PyTorch.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffinite-math-only"]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, or None, with a warning, if they cannot be built: they change speed and no result."""
    try:
        return build([SOURCE], FLAGS)
    except ObrError as error:
        warnings.warn(f"Some loops run slower: {error}", stacklevel=2)
        return None


def clip_errors(
    weight: Tensor,
    importance: Tensor | None,
    scale: Tensor,
    steps: int,
    low: int,
    high: int,
    exponent: float,
) -> Tensor | None:
    """Σ|Q(w) - w|^exponent of each row for its scale shrunk by 0, 1, 2 … per cent: (r, steps), good to 1e-5.

    Seven parameters, those of the compiled loop.

    Errors more than one per cent above the row's best may be any such number. weight: (r, n). scale: (r, 1).
    importance: (n,), each column's squared error is multiplied by it, whatever the exponent; None for alike.
    None where the compiled loops are not to be had or not for this device.
    """
    compiled = library() if weight.device.type == "cpu" else None
    if compiled is None:
        return None
    weight, scale = weight.float().contiguous(), scale.float().contiguous()
    importance = None if importance is None else importance.float().contiguous()
    errors = torch.empty(len(weight), steps)
    compiled.clip_errors(
        pointer(weight), None if importance is None else pointer(importance), pointer(scale),
        ctypes.c_int64(weight.shape[0]), ctypes.c_int64(weight.shape[1]), ctypes.c_int(steps),
        ctypes.c_float(low), ctypes.c_float(high), ctypes.c_float(exponent), ctypes.c_int(torch.get_num_threads()),
        pointer(errors),
    )  # fmt: skip
    return errors
