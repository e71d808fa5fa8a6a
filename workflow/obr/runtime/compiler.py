"""Compiled loops: native.cpp, built on first use and kept; where there is no compiler, PyTorch does the same."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from torch import Tensor

from obr.errors import ObrError
from obr.runtime import cache_folder


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
    path = cache_folder.folder("native") / name
    if not path.exists():
        path = _built(compiler, sources[0], flags, name)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ObrError(
            f"{path} cannot be loaded ({error}); delete it, or set OBR_CACHE to a folder whose programs may run."
        ) from error


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
        path = cache_folder.writable("native") / name
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
