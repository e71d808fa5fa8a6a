"""Hidden states between two blocks of a model: in memory while they fit, in a file when they do not."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from obr.errors import ObrError


@dataclass(frozen=True)
class MemoryBudget:
    """Where hidden states may lie: in `megabytes` of memory or, if they are more, in a file in `folder`.

    folder: None is the system's folder for temporary files.
    """

    megabytes: float = 4096
    folder: Path | None = None


class HiddenStates:
    """The hidden states of b windows, which a model's blocks read and overwrite one window at a time.

    They lie on the host whatever the device, and `states[i]` (1, s, d) brings one window to the device. The file
    has no name: the system frees it when the process ends, however it ends. It is read and written, not mapped,
    so that it takes no resident memory.

    Args:
        windows: b. shape: (s, d). dtype, device: of what is read.

    Raises:
        ObrError: the disk has no room for them.
    """

    def __init__(
        self,
        windows: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        room: MemoryBudget | None = None,
    ):
        room = room or MemoryBudget()
        self.windows, self.shape, self.dtype, self.device = windows, tuple(shape), dtype, device
        self.window_bytes = shape[0] * shape[1] * dtype.itemsize
        needed = windows * self.window_bytes
        self.memory, self.file, self.place = None, None, room.folder or Path(tempfile.gettempdir())
        if needed <= room.megabytes * 1e6:
            self.memory = torch.empty(windows, *shape, dtype=dtype)
            return
        try:
            self.file = tempfile.TemporaryFile(dir=self.place)  # noqa: SIM115  lives as long as this object
            self.file.truncate(needed)
        except OSError as error:
            raise self._no_room(error) from error

    def __len__(self) -> int:
        return self.windows

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(self.windows))

    def __getitem__(self, index: int) -> Tensor:
        """Window `index` (1, s, d), a copy of what is stored where that is on a disk or another device."""
        if not 0 <= index < self.windows:
            raise IndexError(index)
        if self.memory is not None:
            return self.memory[index : index + 1].to(self.device)
        states = torch.empty(1, *self.shape, dtype=self.dtype)
        self.file.seek(index * self.window_bytes)
        if self.file.readinto(_bytes_of(states)) != self.window_bytes:
            raise ObrError(f"The file of hidden states in {self.place} was cut short; start the stage again.")
        return states.to(self.device)

    def __setitem__(self, index: int, states: Tensor) -> None:
        """Replace window `index` by states (1, s, d)."""
        if self.memory is not None:
            self.memory[index] = states[0]
            return
        try:
            self.file.seek(index * self.window_bytes)
            self.file.write(_bytes_of(states.to("cpu", self.dtype).contiguous()))
            self.file.flush()
        except OSError as error:
            raise self._no_room(error) from error

    def _no_room(self, error: OSError) -> ObrError:
        return ObrError(
            f"{self.windows * self.window_bytes / 1e9:.1f} GB of hidden states cannot be written to {self.place} "
            f"({error.strerror}); free that space, or give more memory by --activations-memory."
        )


def _bytes_of(states: Tensor) -> memoryview:
    return memoryview(states.view(torch.uint8).numpy()).cast("B")
