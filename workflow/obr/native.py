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

SOURCE = Path(__file__).with_name("native.cpp")
# Not -ffast-math: linked into a library, that would flush denormals to zero in the whole process.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffinite-math-only"]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, or None, with a warning, if they cannot be built: they change speed and no result."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        warnings.warn("No C++ compiler is found (g++, clang++ or $CXX); some loops run slower.", stacklevel=2)
        return None
    path = _folder() / f"{_key(compiler)}.so"
    try:
        if not path.exists():
            _build(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        warnings.warn(f"{SOURCE.name} cannot be built ({reason.strip()[:300]}); some loops run slower.", stacklevel=2)
        return None


def _folder() -> Path:
    return Path(os.environ.get("OBR_CACHE") or "~/.cache/obr").expanduser() / "native"


def _key(compiler: str) -> str:
    """Differs with source, flags, compiler and processor, so that machines may share the folder."""
    cpu = Path("/proc/cpuinfo")
    flags = next((line for line in cpu.open() if line.startswith("flags")), "") if cpu.exists() else ""
    parts = [SOURCE.read_text(), *FLAGS, compiler, platform.machine(), flags]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _build(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")  # jobs that start together each build their own
    subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(partial)], check=True, capture_output=True, text=True)
    os.replace(partial, path)


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
        ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(scale.data_ptr()),
        ctypes.c_int64(weight.shape[0]), ctypes.c_int64(weight.shape[1]), ctypes.c_int(steps),
        ctypes.c_float(low), ctypes.c_float(high), ctypes.c_float(exponent), ctypes.c_int(torch.get_num_threads()),
        ctypes.c_void_p(errors.data_ptr()),
    )  # fmt: skip
    return errors
