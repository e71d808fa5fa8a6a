"""gemm.cu, compiled by nvcc with CUTLASS's headers on first use and kept, and called through ctypes.

Both come from PyPI, `make kernels` installs and builds; an nvcc of the system's and headers that $CUTLASS_PATH names
do as well. It compiles and loads without a GPU; calling it wants one.
"""

import ctypes
import os
import shutil
import sys
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from obr.errors import ObrError
from obr.kernels.cuda.operands import TOKENS, Operand, dense
from obr.runtime import compiler as native

SOURCE = Path(__file__).with_name("gemm.cu")
# Code for A100, for A40 and RTX 30, for L40 and RTX 40; others compile the intermediate form as they load it.
ARCHITECTURES = ("80", "86", "89")
FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "--expt-relaxed-constexpr", "-w"]
FLAGS += [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES]
FLAGS += ["-gencode=arch=compute_80,code=compute_80"]
SYSTEM = Path("/usr/local/cuda/bin/nvcc")
INSTALL = "run make kernels, which installs them"


def nvcc() -> str:
    """The CUDA compiler: $NVCC, that of the PyPI packages, or the system's. Raises ObrError if there is none."""
    packages = [folder / "nvidia/cu13/bin/nvcc" for folder in _packages()]
    candidates = [os.environ.get("NVCC"), *packages, shutil.which("nvcc"), SYSTEM]
    for path in candidates:
        if path and Path(path).is_file():
            return str(path)
    raise ObrError(f"No CUDA compiler (nvcc) is found; {INSTALL}, or name one in $NVCC.")


def headers() -> Path:
    """CUTLASS's include folder. Raises ObrError if there is none."""
    named = os.environ.get("CUTLASS_PATH")
    candidates = [Path(named) / "include"] if named else []
    candidates += [folder / "cutlass_library/source/include" for folder in _packages()]
    for path in candidates:
        if (path / "cutlass/gemm/device/gemm_sparse.h").is_file():
            return path
    raise ObrError(f"CUTLASS's headers are not found; {INSTALL}, or name their folder in $CUTLASS_PATH.")


def _packages() -> list[Path]:
    """Folders of installed packages; first that of `make kernels`, whose libraries are not to meet PyTorch's own."""
    return [Path(sys.prefix) / "cuda", *map(Path, sys.path)]


@cache
def library() -> ctypes.CDLL:
    """The compiled products. Raises ObrError without a compiler or headers, or if it does not compile."""
    compiler = nvcc()
    beside = Path(compiler).resolve().parent.parent / "lib"  # of the PyPI packages, which nvcc looks for in lib64
    compiled = native.build([SOURCE], [*FLAGS, f"-I{headers()}", f"-L{beside}"], compiler)
    compiled.obr_reason.restype = ctypes.c_char_p
    return compiled


def prepare() -> str:
    """Compile, if it was not; returns a sentence on what is there now, and what it cannot show here.

    Raises:
        ObrError: as `library`.
    """
    start = time.perf_counter()
    library()
    seconds = time.perf_counter() - start
    names = ", ".join(f"sm_{n}" for n in ARCHITECTURES)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    tried = f"{device} can run them." if device else "Without a CUDA device they were not run."
    return f"CUDA products for {names} by {nvcc()}, ready in {seconds:.0f} s. {tried}"


def integers(weight: Operand, tokens: Tensor) -> Tensor:
    """Σ token code, exactly: (t, r), int32, on the weight's device. tokens: (t, n), whole numbers in [-8, 7].

    Raises:
        ObrError: tokens of other widths, on another device or of more than 4 bits, or a kernel that refuses.
    """
    return multiply(weight, activations(weight, tokens)).t()[: len(tokens), : weight.shape[0]]


def activations(weight: Operand, tokens: Tensor) -> Operand:
    """Tokens (t, n) laid out for a product with `weight`; raises ObrError as `integers`."""
    if tokens.shape[1] != weight.shape[1]:
        raise ObrError(f"Tokens of {tokens.shape[1]} channels do not fit a weight of {weight.shape[1]} columns.")
    if tokens.device != weight.codes.device:
        raise ObrError(f"Tokens on {tokens.device} cannot meet a weight on {weight.codes.device}; move one of them.")
    return dense(tokens, TOKENS)


def multiply(weight: Operand, tokens: Operand) -> Tensor:
    """The kernel alone: (rows, tokens), int32, filled up as its operands are."""
    out = _out(weight.codes.device, weight.rows, tokens.rows, torch.int32)
    sizes = [ctypes.c_int(n) for n in (weight.rows, tokens.rows, weight.columns)]
    parts = [weight.codes, tokens.codes] + ([] if weight.metadata is None else [weight.metadata])
    function = "obr_int4_dense" if weight.metadata is None else "obr_int4_sparse"
    _call(function, sizes, [*parts, out], out.device)
    return out


def half(weight: Tensor, tokens: Tensor) -> Tensor:
    """weight (r, n) by tokens (t, n), both float16: (r, t), float16, sums in float32.

    Raises:
        ObrError: sizes that are no multiples of 8, or operands that are not float16 on one CUDA device.
    """
    (rows, columns), count = weight.shape, len(tokens)
    if any(size % 8 for size in (rows, columns, count)) or tokens.shape[1] != columns:
        raise ObrError(f"{tuple(tokens.shape)} by {tuple(weight.shape)}: all sizes must be multiples of 8, and fit.")
    if {weight.dtype, tokens.dtype} != {torch.float16} or weight.device != tokens.device:
        raise ObrError(f"{weight.dtype} on {weight.device} by {tokens.dtype} on {tokens.device}; use float16 on one.")
    out = _out(weight.device, rows, count, torch.float16)
    sizes = [ctypes.c_int(n) for n in (rows, count, columns)]
    _call("obr_fp16_dense", sizes, [weight.contiguous(), tokens.contiguous(), out], out.device)
    return out


def _out(device: torch.device, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if device.type != "cuda":
        raise ObrError(f"Operands on {device} cannot meet tensor cores; move them to a CUDA device.")
    return torch.empty(rows, columns, dtype=dtype, device=device)


def _call(function: str, sizes: list, tensors: list[Tensor], device: torch.device) -> None:
    compiled = library()
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = getattr(compiled, function)(*sizes, *map(native.pointer, tensors), stream)
    if status:
        raise ObrError(f"{function} is refused ({compiled.obr_reason(status).decode()}); choose another kernel.")
