"""What the tensor cores read: codes of 4 bits, two a byte, and the metadata of a sparse operand.

mma.sp of PTX multiplies, for 4-bit numbers, rows of which every 8 have 4 that are kept in aligned pairs: "pair-wise
structured sparse at a granularity of 4:8". The kept pairs lie one after the other; two bits for each say which of the
four of its group it is, the first of a group below the second. Sixteen such pairs, 64 columns, fill a word of
metadata, lowest bits first.

The instruction takes 16 rows and 128 columns at a time, and each of a warp's 32 threads hands over a word: thread
4 g + 2 h + u that of row g + 8 u, columns 64 h and up. The words of such a tile lie in this order one after the
other, tiles by rows before columns: CUTLASS's ColumnMajorInterleaved<2> after its reordering of rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from obr.errors import ObrError

ROWS, TOKENS, COLUMNS = 32, 32, 256  # of a weight, of tokens and of both, in multiples of which kernels compute
WORD = 64  # columns that a word of metadata tells of
PAIR_BITS = 2  # that tell which of a group's four pairs it is
EMPTY = 0x44444444  # metadata of groups that hold nothing: pairs 0 and 1; 0, twice pair 0, would be none
LOW, HIGH = -8, 7


@dataclass(frozen=True)
class Operand:
    """Codes (r, n) as the kernels read them, filled up with zeros to (rows, columns).

    codes: (rows, columns / 2) bytes, or of a sparse operand, (rows, columns / 4), the kept ones.
    metadata: int32 words of a sparse operand, columns / 64 for each row. shape: (r, n).
    """

    shape: tuple[int, int]
    rows: int
    columns: int
    codes: Tensor
    metadata: Tensor | None = None

    def to(self, device: torch.device | str) -> "Operand":
        """The same on a device."""
        metadata = None if self.metadata is None else self.metadata.to(device)
        return Operand(self.shape, self.rows, self.columns, self.codes.to(device), metadata)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that a product reads."""
        return (self.codes,) if self.metadata is None else (self.codes, self.metadata)


def dense(codes: Tensor, multiple: int = ROWS) -> Operand:
    """All codes (r, n) in [-8, 7]; multiple: to which rows are filled up, TOKENS for activations.

    Raises:
        ObrError: codes of more than 4 bits.
    """
    filled = _filled(codes, multiple)
    return Operand(tuple(codes.shape), *filled.shape, two_a_byte(filled))


def sparse(codes: Tensor, mask: Tensor) -> Operand:
    """The kept codes (r, n) of a weight in the pattern "paired 4:8". mask: (r, n), True where kept.

    Raises:
        ObrError: codes of more than 4 bits, or a mask that is not of the pattern in every group.
    """
    rows, columns = codes.shape
    if columns % 8 or mask.shape != codes.shape:
        raise ObrError(
            f"A mask {tuple(mask.shape)} on a weight {rows} x {columns} is no whole number of groups of 8."
        )
    groups = mask.reshape(rows, -1, 4, 2)
    if not bool((groups[..., 0] == groups[..., 1]).all() and (groups[..., 0].sum(-1) == 2).all()):
        raise ObrError(
            "INT4 tensor cores take the pattern 'paired 4:8' alone, which this mask is not in every group."
        )
    places = groups[..., 0].int().argsort(dim=-1, descending=True, stable=True)[..., :2]  # (r, n / 8, 2)
    filled = _filled(codes, ROWS)
    words = torch.full((len(filled), filled.shape[1] // WORD), EMPTY, dtype=torch.int64, device=codes.device)
    nibbles = places[..., 0] | places[..., 1] << PAIR_BITS
    words[:rows] = _words(nibbles, words.shape[1])
    pairs = torch.zeros(len(filled), filled.shape[1] // 8, 2, 2, dtype=codes.dtype, device=codes.device)
    kept = codes.reshape(rows, -1, 4, 2).gather(2, places[..., None].expand(-1, -1, -1, 2))
    pairs[:rows, : columns // 8] = kept
    compressed = two_a_byte(pairs.reshape(len(filled), -1))
    return Operand((rows, columns), *filled.shape, compressed, threads_order(_signed(words)))


def two_a_byte(codes: Tensor) -> Tensor:
    """Codes (r, n) in [-8, 7] as (r, n / 2) bytes, the first of two below."""
    q = (codes & 15).to(torch.uint8)
    return q[:, ::2] | q[:, 1::2] << 4


def threads_order(words: Tensor) -> Tensor:
    """Metadata (rows, columns / 64), row by row, in the order in which the threads of a warp want them, flat."""
    rows, count = words.shape
    tiles = words.reshape(rows // 16, 2, 8, count // 2, 2)  # tile, u, g, tile, h
    return tiles.permute(3, 0, 2, 4, 1).reshape(-1).contiguous()


def _words(nibbles: Tensor, count: int) -> Tensor:
    """Metadata (r, count) of groups' nibbles (r, n / 8), lowest first; empty beyond them."""
    rows, groups = nibbles.shape
    per_word = WORD // 8
    filled = torch.full((rows, count * per_word), EMPTY & 15, dtype=torch.int64, device=nibbles.device)
    filled[:, :groups] = nibbles
    shifts = 4 * torch.arange(per_word, device=nibbles.device)
    return (filled.reshape(rows, -1, per_word) << shifts).sum(-1)


def _signed(words: Tensor) -> Tensor:
    """Words below 2^32 as the int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _filled(codes: Tensor, multiple: int) -> Tensor:
    """Codes with rows and columns of zeros behind, to whole multiples."""
    if codes.numel() and (int(codes.min()) < LOW or int(codes.max()) > HIGH):
        raise ObrError(
            f"Codes from {int(codes.min())} to {int(codes.max())} are not of 4 bits; INT4 tensor cores take -8 to 7."
        )
    rows, columns = codes.shape
    behind = (0, -columns % COLUMNS, 0, -rows % multiple)
    return torch.nn.functional.pad(codes.to(torch.int8), behind)
