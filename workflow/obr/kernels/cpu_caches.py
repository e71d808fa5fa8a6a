"""The processor's caches: how large they are, and a buffer that replaces what they hold.

A product that is timed on a CPU reads its weight from memory only if the caches do not still hold that weight. So a
buffer of a few times their size is read before each run. The buffer has a limit, since some caches are so large that
reading a multiple of them would take longer than all products together.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CPUS = Path("/sys/devices/system/cpu")
ASSUMED = 64 << 20  # bytes, where the system does not report the size
TIMES = 4  # the buffer's size over the caches', where the limit allows
ENOUGH = 2  # the least such ratio at which the caches count as cleared
UNITS = {"": 0, "K": 10, "M": 20, "G": 30}


def size() -> int | None:
    """Bytes of the last-level caches of all processors that this process may use; None where Linux's /sys has none.

    Each cache counts once, however many processors share it.
    """
    usable, levels = _usable(), {}
    for folder in sorted(CPUS.glob("cpu[0-9]*/cache/index[0-9]*")):
        if int(folder.parts[-3][3:]) not in usable:
            continue
        try:
            found = re.fullmatch(r"(\d+)([KMG]?)", (folder / "size").read_text(encoding="utf-8").strip())
            level, shared = (
                int((folder / "level").read_text(encoding="utf-8")),
                (folder / "shared_cpu_list").read_text(encoding="utf-8").strip(),
            )
        except (OSError, ValueError):
            continue
        if found and int(found[1]):
            levels.setdefault(level, {})[shared] = int(found[1]) << UNITS[found[2]]
    return sum(levels[max(levels)].values()) if levels else None


def _usable() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


@dataclass(frozen=True)
class Caches:
    """What is known of the caches, and how many bytes are read to replace what they hold.

    bytes: of the last level. known: whether the system reported them. buffer: bytes, `TIMES` as many or the limit.
    """

    bytes: int
    known: bool
    buffer: int

    @classmethod
    def of_this_machine(cls, limit: int) -> "Caches":
        """limit: of the buffer, in bytes."""
        found = size()
        bytes_ = ASSUMED if found is None else found
        return cls(bytes_, found is not None, min(TIMES * bytes_, limit))

    @property
    def cleared(self) -> bool:
        """Whether the buffer is large enough that a weight is read from memory afterwards."""
        return self.buffer >= ENOUGH * self.bytes

    @property
    def caution(self) -> str:
        """What a reader of the times must know of the caches; empty where there is nothing."""
        said = []
        if not self.known:
            said.append(f"the system reports no cache size, {_mb(self.bytes)} assumed")
        if not self.cleared:
            said.append(
                f"weights may stay in the cache: {_mb(self.bytes)} of cache, {_mb(self.buffer)} read before each run"
            )
        return "; ".join(said)

    def filler(self) -> Tensor:
        """The buffer, (n,) int64: its sum reads all of it."""
        return torch.ones(max(1, self.buffer // 8), dtype=torch.int64)


def _mb(count: int) -> str:
    return f"{count / 2**20:.4g} MB"
