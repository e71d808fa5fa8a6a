"""Which device a job computes on: one free GPU a job, taken by a file lock, since Snakemake hands out none."""

import fcntl
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from obr.errors import ObrError, first_line

VISIBLE = "CUDA_VISIBLE_DEVICES"
SECONDS = 5  # between looks for a free GPU
_held: list[IO] = []  # the lock file stays open, and locked, for the life of the process


def claim(device: str) -> str:
    """Reserve "cpu", or the first free GPU for "cuda", waiting until one is; call before a GPU is used.

    A MIG instance counts as a GPU. The process sees the reserved one alone, and keeps it until it ends, however it
    ends.

    Raises:
        ObrError: "cuda" is asked for and no NVIDIA GPU is visible, or its lock cannot be had.
    """
    if device != "cuda" or _held:
        return device
    gpus = visible_gpus()
    if not gpus:
        raise ObrError(f"device is 'cuda' but {_why_none()}; use --config device=cpu.")
    waits = False
    while True:
        for gpu, name in gpus.items():
            if (file := _locked(gpu, name)) is not None:
                _held.append(file)
                os.environ[VISIBLE] = gpu
                return "cuda"
        if not waits:
            which = f"All {len(gpus)} GPUs ({', '.join(gpus)}) are" if len(gpus) > 1 else f"GPU {gpu} is"
            print(f"obr: {which} reserved by other jobs; waiting for one.", file=sys.stderr, flush=True)
        waits = True
        time.sleep(SECONDS)


def device_of(name: str) -> str:
    """ "cpu" or "cuda" for a device that may be "auto": a GPU if one is visible."""
    if name != "auto":
        return name
    return "cuda" if visible_gpus() else "cpu"


def _locked(gpu: str, name: str) -> IO | None:
    """The lock file of a GPU, locked; None if another process holds it. name: of the file."""
    path = Path(tempfile.gettempdir()) / f"obr-gpu-{os.getuid()}-{name}.lock"
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115  held on purpose
    except OSError as error:
        raise ObrError(
            f"{path}, which reserves GPU {gpu}, cannot be opened ({error.strerror}); delete it, or set "
            "TMPDIR to a folder that can be written, the same one for all jobs."
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        file.close()
        raise ObrError(
            f"{path}, which reserves GPU {gpu}, cannot be locked ({error.strerror}); set TMPDIR to a folder on a "
            "local disk, the same one for all jobs."
        ) from error
    return file


def visible_gpus() -> dict[str, str]:
    """{entry of CUDA_VISIBLE_DEVICES: name of its lock} of each GPU and MIG instance that this process may use.

    As CUDA reads the variable: an entry that names no GPU ends the list. A lock has the UUID, so that an index and a
    UUID of one GPU share it. Where the UUID of an index is not certain, the lock has the host and the index.
    """
    cards, given = _cards(), os.environ.get(VISIBLE)
    if given is None:
        instances = {uuid: _lock_name(uuid) for card in cards for uuid in card.instances or [card.uuid]}
        return instances or {str(i): _lock_name(str(i)) for i in _indices()}
    found: dict[str, str] = {}
    for entry in map(str.strip, given.split(",")):
        if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", entry) or (cards and not _is_there(entry, cards)):
            break
        found[entry] = _lock_name(_uuid_of(entry, cards))
    return found


class _Card:
    """A GPU of nvidia-smi: its UUID, what it is, and the UUIDs of its MIG instances."""

    def __init__(self, kind: str, uuid: str):
        self.kind, self.uuid, self.instances = kind, uuid, []


CARD = re.compile(r"GPU \d+: (?P<kind>.*) \(UUID: (?P<uuid>GPU-[^)]+)\)")
INSTANCE = re.compile(r"\s+MIG .*\(UUID: (?P<uuid>MIG-[^)]+)\)")


def _cards() -> list[_Card]:
    """The machine's GPUs in the order of their indices; none where nvidia-smi does not list them."""
    found: list[_Card] = []
    for line in _asked("-L").splitlines():
        if card := CARD.match(line):
            found.append(_Card(card["kind"], card["uuid"]))
        elif found and (instance := INSTANCE.match(line)):
            found[-1].instances.append(instance["uuid"])
    return found


def _indices() -> list[str]:
    """Indices of the GPUs, of an nvidia-smi whose list is not understood."""
    return [line for line in _asked("--query-gpu=index", "--format=csv,noheader").split() if line.isdigit()]


def _asked(*arguments: str) -> str:
    """What nvidia-smi answers; nothing where it is not to be had or fails."""
    try:
        return subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, encoding="utf-8", errors="replace", check=True,
            timeout=60,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""


def _is_there(entry: str, cards: list[_Card]) -> bool:
    """Whether an entry of CUDA_VISIBLE_DEVICES names one of the cards; of a MIG instance, whose names vary, yes."""
    if entry.isdigit():
        return int(entry) < len(cards)
    return entry.startswith("MIG-") or any(card.uuid.startswith(entry) for card in cards)


def _uuid_of(entry: str, cards: list[_Card]) -> str:
    """The UUID that an entry of CUDA_VISIBLE_DEVICES stands for; the entry itself where that is not certain.

    A UUID may be shortened. An index counts cards as nvidia-smi does if the bus decides their order, which it also
    does among equal cards. On a card with MIG instances an index is the first of them.
    """
    if entry.isdigit():
        by_bus = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({card.kind for card in cards}) == 1
        if not by_bus or int(entry) >= len(cards):
            return entry
        card = cards[int(entry)]
        return (card.instances or [card.uuid])[0]
    known = [uuid for card in cards for uuid in (card.uuid, *card.instances) if uuid.startswith(entry)]
    return known[0] if len(known) == 1 else entry


def _lock_name(uuid: str) -> str:
    """An index counts the cards of one host, and temporary files may lie on a disk that hosts share."""
    return f"{platform.node()}-{uuid}" if uuid.isdigit() else re.sub(r"[^\w-]", "_", uuid)


def _why_none() -> str:
    given = os.environ.get(VISIBLE)
    return "no NVIDIA GPU is visible" if given is None else f"{VISIBLE} is {given!r}, which names no GPU"


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
