"""How a matrix of 2-, 3- or 4-bit codes, dense or pruned, lies in a GPU's memory.

Eight neighbouring columns of a row make a byte of its mask. Codes of kept weights follow each other in fields of
b bits, two's complement, lowest bits first, in 32-bit words; each row begins with a word. The mask is stored as one
bit a weight, or for N:M patterns as the number of each group's mask. Where scales belong to groups of columns, each
group is widened with zeros to a multiple of 16 columns, so that no block of columns reads two scales.
"""

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import combinations, product

import torch
from torch import Tensor

from obr.config.pattern import Pattern
from obr.errors import ObrError

WORD = 8  # columns whose fields are expanded together
WIDENED = 16  # groups of columns that share a scale are widened to a multiple of it: the least that tensor cores take
NUMBERED = (2, 4, 8, 16)  # M of the patterns N:M whose masks are stored as numbers
MOST_COLUMNS = 1 << 19  # sums of more may leave 32 bits
STEPS = (4, 2, 1)  # by how many fields an expansion moves codes, one after the other
_CHUNK = 1 << 24  # weights that are laid out at a time


@dataclass(frozen=True)
class Weight:
    """A matrix (r, n) of codes of `bits` bits with its scales, as the Triton kernels read it.

    layout: "dense", "bitmask", or the N:M pattern whose masks are numbered. group: columns that share a scale, or
    None. Tensors: codes (words,) int32; starts (r,) int32, the first word of each row; masks, uint8 (r, words of 8
    columns) for a bitmask, int32 (r, words) of numbers, empty if dense; scale (r, 1) float32 or (r, groups) float16.
    """

    layout: str
    bits: int
    rows: int
    columns: int
    group: int | None
    codes: Tensor
    starts: Tensor
    masks: Tensor
    scale: Tensor

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scale: Tensor,
        mask: Tensor | None = None,
        pattern: Pattern | None = None,
        bits: int = 4,
        group: int | None = None,
    ) -> "Weight":
        """Lay out codes (r, n) in [-2^(bits-1), 2^(bits-1) - 1] on their own device. The parameters are a layer's.

        scale: (r,), (r, 1) or (r, groups). mask: (r, n), True where kept; None for all. pattern: which N:M it is of.

        Raises:
            ObrError: codes of other bits, more columns than sums of 32 bits take, or a mask of another pattern.
        """
        rows, columns = codes.shape
        _check(codes, bits, columns)
        layout = _layout_of(mask, pattern, group)
        if layout not in ("dense", "bitmask"):
            _check_mask(mask, pattern, columns)
        kept, fields_ = [], []
        for part in range(0, rows, step := max(1, _CHUNK // columns)):
            chosen = None if mask is None else mask[part : part + step].to(codes.device)
            fields_.append(_row_words(_widened(codes[part : part + step], group), chosen, layout, bits, group))
            kept.append(_mask_bytes(chosen, layout, pattern, group, fields_[-1][0].device))
        starts = torch.cat([lengths for _, lengths in fields_]).cumsum(0) - torch.cat([n for _, n in fields_])
        if rows and int(starts[-1]) >= 2**31:
            raise ObrError(f"A weight of {rows} x {columns} is too large for places in 32 bits; load it unpacked.")
        words = torch.cat([*(words for words, _ in fields_), codes.new_zeros(1, dtype=torch.int32)])
        scale = scale.reshape(rows, -1).to(codes.device, torch.float32 if group is None else torch.float16)
        return cls(layout, bits, rows, columns, group, words, starts.int(), torch.cat(kept), scale.contiguous())

    def to(self, device: "torch.device | str") -> "Weight":
        """The same on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in PARTS})

    @property
    def words(self) -> int:
        """Words of eight columns in a row, groups widened."""
        return -(-_width(self.columns, self.group) // WORD)

    @property
    def bytes(self) -> int:
        """All that is kept in memory, scales and places included."""
        return sum(getattr(self, name).nbytes for name in PARTS)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over the number of weights, zeros included."""
        return 8 * self.bytes / (self.rows * self.columns)


PARTS = tuple(field.name for field in fields(Weight) if field.type is Tensor)


def widened_group(group: int) -> int:
    """Columns of a group as it lies in memory."""
    return -(-group // WIDENED) * WIDENED


@lru_cache(maxsize=16)
def controls(bits: int, device: str) -> Tensor:
    """(4, 256) int32: for each mask of eight columns how its codes are moved from the front to their columns.

    Rows 0 to 2: the fields that receive those 4, 2 and 1 places below. Row 3: the fields that are kept. The lowest
    four bits of row 0, which no move by 4 fields reaches, are the number of kept columns.
    """
    table = torch.zeros(4, 256, dtype=torch.int64)
    field = 2**bits - 1
    for mask in range(256):
        chosen = [j for j in range(WORD) if mask >> j & 1]
        for rank, target in enumerate(chosen):
            place = rank
            for row, step in enumerate(STEPS):
                if (target - rank) & step:
                    place += step
                    table[row, mask] |= field << (bits * place)
            table[3, mask] |= field << (bits * target)
        table[0, mask] |= len(chosen)
    return table.to(torch.int32).to(device)  # wraps above 2^31


@lru_cache(maxsize=16)
def masks_of(layout: str, device: str) -> Tensor:
    """number -> mask, int32: of a word's groups, or where M is 16 of the sixteen columns of two words."""
    if layout in ("dense", "bitmask"):
        return torch.zeros(1, dtype=torch.int32, device=device)
    pattern = Pattern.parse(layout)
    words, groups = _words(pattern), max(1, WORD // pattern.group)
    table = torch.zeros(1 << field_bits(layout), dtype=torch.int32)
    for chosen in product(range(len(words)), repeat=groups):
        number = sum(n << (pattern.index_bits * i) for i, n in enumerate(chosen))
        table[number] = sum(words[n] << (pattern.group * i) for i, n in enumerate(chosen))
    return table.to(device)


def field_bits(layout: str) -> int:
    """Bits of a number in `masks_of`; 0 for layouts without numbers."""
    if layout in ("dense", "bitmask"):
        return 0
    pattern = Pattern.parse(layout)
    return pattern.index_bits * max(1, WORD // pattern.group)


def _words(pattern: Pattern) -> list[int]:
    """The masks of a group in the order of their numbers, bit i for column i."""
    kept, units = pattern.units
    step = pattern.group // units
    return [sum((2**step - 1) << (step * i) for i in chosen) for chosen in combinations(range(units), kept)]


def _layout_of(mask: Tensor | None, pattern: Pattern | None, group: int | None) -> str:
    if mask is None or bool(mask.all()):
        return "dense"
    if pattern is None or pattern.group not in NUMBERED or (group and (group % WIDENED or group % pattern.group)):
        return "bitmask"
    return str(pattern)


def _check(codes: Tensor, bits: int, columns: int) -> None:
    if bits not in (2, 3, 4):
        raise ObrError(f"Weights of {bits} bits have no packed kernel; use 2 to 4.")
    if columns > MOST_COLUMNS:
        raise ObrError(f"A weight of {columns} columns is too wide for sums in 32 bits; the most are {MOST_COLUMNS}.")
    low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    if low < -(2 ** (bits - 1)) or high >= 2 ** (bits - 1):
        raise ObrError(f"Codes from {low} to {high} are not {bits}-bit; name the bits that the weight has.")


def _check_mask(mask: Tensor, pattern: Pattern, columns: int) -> None:
    pattern.check_width(columns, "the weight")
    groups = mask.reshape(-1, pattern.group)
    fits = (groups.sum(1) == pattern.kept).all()
    if pattern.paired:
        fits &= (groups[:, ::2] == groups[:, 1::2]).all()
    if not fits:
        raise ObrError(f"The mask is not of pattern {pattern} in every group; leave the pattern out.")


def _width(columns: int, group: int | None) -> int:
    return columns if group is None else -(-columns // group) * widened_group(group)


def _widened(values: Tensor, group: int | None) -> Tensor:
    """(r, whole words): `values` (r, n) at their places in memory, zeros elsewhere."""
    rows, columns = values.shape
    wide = values.new_zeros(rows, -(-_width(columns, group) // WORD) * WORD)
    places = torch.arange(columns, device=values.device)
    if group is not None:
        places = places // group * widened_group(group) + places % group
    wide[:, places] = values
    return wide


def _row_words(
    codes: Tensor, mask: Tensor | None, layout: str, bits: int, group: int | None
) -> tuple[Tensor, Tensor]:
    """(words of all rows (k,) int32, words of each row (r,)): the fields of kept codes, each row filled up."""
    if layout == "dense":
        kept = torch.ones_like(codes, dtype=torch.bool)
    else:
        kept = _widened(mask, group)
    ranks, counts = kept.cumsum(1) - 1, kept.sum(1)
    lengths = -(-counts * bits // 32)
    at = ((lengths.cumsum(0) - lengths)[:, None] * 32 + ranks * bits)[kept]
    values = codes[kept].long() & (2**bits - 1)
    words = torch.zeros(int(lengths.sum()) + 1, dtype=torch.int64, device=codes.device)
    moved = values << (at & 31)
    words.index_add_(0, at >> 5, moved & 0xFFFFFFFF)  # fields do not overlap: their sum is their union
    words.index_add_(0, (at >> 5) + 1, moved >> 32)
    return words[:-1].to(torch.int32), lengths


def _mask_bytes(mask: Tensor | None, layout: str, pattern: Pattern | None, group: int | None, device) -> Tensor:
    """The masks of some rows as they are stored."""
    if layout == "dense":
        return torch.zeros(0, dtype=torch.uint8, device=device)
    places = torch.arange(WORD, device=device)
    if layout == "bitmask":
        return (_widened(mask, group).unflatten(1, (-1, WORD)) << places).sum(2).to(torch.uint8)
    columns = torch.arange(pattern.group, device=device)
    words = (mask.unflatten(1, (-1, pattern.group)).long() << columns).sum(2)
    numbers = torch.zeros(1 << pattern.group, dtype=torch.int64, device=device)
    table = torch.tensor(_words(pattern), device=device)
    numbers[table] = torch.arange(len(table), device=device)
    numbers = numbers[words]
    bits = pattern.index_bits
    length = -(-numbers.shape[1] * bits // 32) + 1  # one more, which a kernel may read and ignores
    at = torch.arange(numbers.shape[1], device=device) * bits
    moved = numbers << (at & 31)
    rows = torch.zeros(len(mask), length, dtype=torch.int64, device=device)
    rows.index_add_(1, at >> 5, moved & 0xFFFFFFFF)
    rows.index_add_(1, (at >> 5) + 1, moved >> 32)
    return rows.to(torch.int32)
