"""Which device a job computes on: one free GPU a job, taken by a file lock, since Snakemake hands out none."""

import fcntl
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from obr.errors import ObrError, first_line

_held = []  # lock files stay open, and locked, for the life of the process


def claim(device: str) -> str:
    """Reserve "cpu", or the first free GPU for "cuda", waiting until one is; call before torch is imported.

    Raises:
        ObrError: "cuda" is asked for and no NVIDIA GPU is visible.
    """
    if device != "cuda":
        return device
    gpus = _visible()
    if not gpus:
        raise ObrError("device is 'cuda' but no NVIDIA GPU is visible; use --config device=cpu.")
    while True:
        for gpu in gpus:
            path = Path(tempfile.gettempdir()) / f"obr-gpu-{os.getuid()}-{gpu}.lock"
            try:
                file = open(path, "w", encoding="utf-8")  # noqa: SIM115  held on purpose
            except OSError as error:
                raise ObrError(
                    f"{path}, which reserves GPU {gpu}, cannot be opened ({error.strerror}); delete it, or set "
                    "TMPDIR to a folder that can be written, the same one for all jobs."
                ) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _held.append(file)
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            return "cuda"
        time.sleep(5)


def device_of(name: str) -> str:
    """ "cpu" or "cuda" for a device that may be "auto": a GPU if one is visible."""
    if name != "auto":
        return name
    return "cuda" if _visible() else "cpu"


def _visible() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [gpu for gpu in given.split(",") if gpu.strip()]
    try:
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(
            query, capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


# What PyTorch says, as a mere RuntimeError, when a GPU is gone or a CPU's memory is full.
LOST_GPU = re.compile(r"CUDA (error|unknown error|driver)|No CUDA GPUs|no NVIDIA driver|CUBLAS_STATUS|cusolver error")
FULL_MEMORY = re.compile(r"can't allocate memory|[Cc]annot allocate memory")


def taken_away(error: Exception) -> str | None:
    """A sentence for an exception that tells of memory or a GPU that others have taken; None for any other."""
    torch, text = sys.modules.get("torch"), first_line(error)
    if torch and isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is full ({text}); see nvidia-smi for who uses it, then rerun to continue."
    if (torch and isinstance(error, getattr(torch, "AcceleratorError", ()))) or LOST_GPU.search(text):
        return f"the GPU failed or is gone ({text}); see nvidia-smi, then rerun to continue, there or elsewhere."
    if isinstance(error, MemoryError) or FULL_MEMORY.search(text):
        return f"memory is full ({text or 'no more was given'}); free some or ask for more, then rerun to continue."
    return None
