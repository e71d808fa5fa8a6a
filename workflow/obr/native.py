"""Compiled loops: native.cpp, built on first use and kept; where there is no compiler, PyTorch does the same."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from obr import caching
from obr.errors import ObrError

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


def build(sources: list[Path], flags: list[str], compiler: str | None = None) -> ctypes.CDLL:
    """The library compiled of the first of `sources`, which includes the others; built once and kept.

    compiler: other than the machine's for C++.

    Raises:
        ObrError: no compiler, or one that refuses.
    """
    compiler = compiler or os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise ObrError("No C++ compiler is found; install g++ or clang++, or name one in $CXX.")
    name = f"{_key(sources, flags, compiler)}.so"
    path = caching.folder("native") / name
    if not path.exists():
        path = _built(compiler, sources[0], flags, name)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ObrError(
            f"{path} cannot be loaded ({error}); delete it, or set OBR_CACHE to a folder whose programs may run."
        ) from error


def return_freed_memory() -> None:
    """Hand memory that was freed back to the system, where the C library can: small tensors that stay between large
    ones that go keep it resident otherwise.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """To a tensor's first element, for a compiled loop; the tensor must outlive the call."""
    return ctypes.c_void_p(tensor.data_ptr())


def _key(sources: list[Path], flags: list[str], compiler: str) -> str:
    """Differs with source, flags, compiler and processor, so that machines may share the folder."""
    parts = [
        *(source.read_text(encoding="utf-8") for source in sources),
        *flags,
        compiler,
        platform.machine(),
        *processor_flags(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def processor_flags() -> list[str]:
    """What the processor and the system can do, as Linux names it; empty elsewhere."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.exists() else []
    return next((line.split() for line in lines if line.startswith("flags")), [])


def _built(compiler: str, source: Path, flags: list[str], name: str) -> Path:
    """Compile `source` into the file `name` of the cache. Raises ObrError as `build` does."""
    try:
        path = caching.writable("native") / name
        partial = path.with_name(f"{name}.{os.getpid()}")  # jobs that start together each build their own
        command = [compiler, *flags, str(source), "-o", str(partial)]
        subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace")
        os.replace(partial, path)
        return path
    except subprocess.CalledProcessError as error:
        reason = " ".join((error.stderr or str(error)).split())[:300]
        raise ObrError(f"{source.name} cannot be built by {compiler}; install another one ({reason}).") from error
    except OSError as error:
        if error.filename == compiler:
            remedy = "install g++ or clang++, or name one in $CXX"
        else:
            remedy = "set OBR_CACHE to a folder with free space"
        raise ObrError(f"{source.name} cannot be built by {compiler} ({error}); {remedy}.") from error


def clip_errors(weight: Tensor, scale: Tensor, steps: int, low: int, high: int, exponent: float) -> Tensor | None:
    """Σ|Q(w) - w|^exponent of each row for its scale shrunk by 0, 1, 2 … per cent: (r, steps), good to 1e-5.

    Errors more than one per cent above the row's best may be any such number. weight: (r, n). scale: (r, 1).
    None where the compiled loops are not to be had or not for this device.
    """
    compiled = library() if weight.device.type == "cpu" else None
    if compiled is None:
        return None
    weight, scale = weight.float().contiguous(), scale.float().contiguous()
    errors = torch.empty(len(weight), steps)
    compiled.clip_errors(
        pointer(weight), pointer(scale),
        ctypes.c_int64(weight.shape[0]), ctypes.c_int64(weight.shape[1]), ctypes.c_int(steps),
        ctypes.c_float(low), ctypes.c_float(high), ctypes.c_float(exponent), ctypes.c_int(torch.get_num_threads()),
        pointer(errors),
    )  # fmt: skip
    return errors
