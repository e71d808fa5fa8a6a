"""Hidden states between two blocks of a model: in memory while they fit, in a file when they do not."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

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


class StoredStates:
    """Hidden states in pieces of any shape, which a model's blocks read and overwrite one piece at a time.

    They lie on the host whatever the device, and `states[i]` brings one piece to the device. The file has no name:
    the system frees it when the process ends, however it ends. It is read and written, not mapped, so that it takes
    no resident memory.

    Args:
        shapes: of each piece. dtype, device: of what is read.

    Raises:
        ObrError: the disk has no room for them.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        room: MemoryBudget | None = None,
    ):
        room = room or MemoryBudget()
        self.shapes, self.dtype, self.device = shapes, dtype, device
        self.starts = [0, *accumulate(map(math.prod, shapes))]  # in elements
        self.memory, self.file, self.place = None, None, room.folder or Path(tempfile.gettempdir())
        if self.needed <= room.megabytes * 1e6:
            self.memory = torch.empty(self.starts[-1], dtype=dtype)
            return
        try:
            self.file = tempfile.TemporaryFile(dir=self.place)  # noqa: SIM115  lives as long as this object
            self.file.truncate(self.needed)
        except OSError as error:
            raise self._no_room(error) from error

    @property
    def needed(self) -> int:
        """Bytes of all pieces."""
        return self.starts[-1] * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        """Piece `index`, a copy of what is stored where that is on a disk or another device."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self.starts[index : index + 2]
        if self.memory is not None:
            return self.memory[start:end].view(self.shapes[index]).to(self.device)
        states = torch.empty(self.shapes[index], dtype=self.dtype)
        self.file.seek(start * self.dtype.itemsize)
        if self.file.readinto(_bytes_of(states)) != (end - start) * self.dtype.itemsize:
            raise ObrError(f"The file of hidden states in {self.place} was cut short; start the stage again.")
        return states.to(self.device)

    def __setitem__(self, index: int, states: Tensor) -> None:
        """Replace piece `index` by states of the same shape."""
        start, end = self.starts[index : index + 2]
        if self.memory is not None:
            self.memory[start:end].view(self.shapes[index]).copy_(states)
            return
        try:
            self.file.seek(start * self.dtype.itemsize)
            self.file.write(_bytes_of(states.to("cpu", self.dtype).contiguous()))
            self.file.flush()
        except OSError as error:
            raise self._no_room(error) from error

    def write(self, index: int, file: BinaryIO) -> None:
        """Write the bytes of piece `index` to an open file."""
        file.write(_bytes_of(self[index].to("cpu").contiguous()))

    def read(self, index: int, file: BinaryIO) -> None:
        """Replace piece `index` by bytes from an open file. Raises EOFError if there are too few."""
        states = torch.empty(self.shapes[index], dtype=self.dtype)
        wanted = states.numel() * self.dtype.itemsize
        if (found := file.readinto(_bytes_of(states))) != wanted:
            raise EOFError(f"{found} bytes of hidden states where {wanted} are expected")
        self[index] = states

    def _no_room(self, error: OSError) -> ObrError:
        return ObrError(
            f"{self.needed / 1e9:.1f} GB of hidden states cannot be written to {self.place} "
            f"({error.strerror}); free that space, or give more memory by --activations-memory."
        )


class HiddenStates(StoredStates):
    """The hidden states of b windows, `states[i]` (1, s, d).

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
        self.windows, self.shape = windows, tuple(shape)
        super().__init__([(1, *self.shape)] * windows, dtype, device, room)


def _bytes_of(states: Tensor) -> memoryview:
    return memoryview(states.view(torch.uint8).numpy()).cast("B")
