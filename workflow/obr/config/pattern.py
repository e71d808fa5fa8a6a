"""Patterns of zeros: M of every N weights, single or in aligned pairs."""

import re
from dataclasses import dataclass
from math import comb

from obr.errors import ObrError

MOST_UNITS = 20  # of a group: a table of all its masks, 2^20 of them, is kept to number them


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: of every `group` consecutive weights of a row, `kept` stay.

    `paired` patterns keep or drop aligned pairs of weights, the only 4:8 form that INT4 sparse tensor cores
    accept (PTX ISA, mma.sp for .s4).
    """

    kept: int
    group: int
    paired: bool = False

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read "2:4", "8:16" or "paired 4:8". Raises ObrError for anything else.

        Example:
            >>> pattern = Pattern.parse("paired 4:8")
            >>> pattern.sparsity, pattern.units, pattern.index_bits
            (0.5, (2, 4), 3)
        """
        match = re.fullmatch(r"(paired )?(\d+):(\d+)", str(text).strip())
        if not match:
            raise ObrError(f"Pattern {text!r} is not of the form 'N:M' or 'paired N:M', such as '2:4'.")
        pattern = cls(int(match[2]), int(match[3]), bool(match[1]))
        if not 0 < pattern.kept < pattern.group:
            raise ObrError(f"Pattern {text!r} must keep at least one and fewer than all of its weights.")
        if pattern.paired and (pattern.kept % 2 or pattern.group % 2):
            raise ObrError(f"Pattern {text!r} is paired: both of its numbers must be even.")
        if pattern.units[1] > MOST_UNITS:
            raise ObrError(
                f"Pattern {text!r} has too many masks a group to number them; choose an M of at most {MOST_UNITS}, "
                f"or {2 * MOST_UNITS} paired."
            )
        return pattern

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are zero: 0.5 for 2:4."""
        return 1 - self.kept / self.group

    @property
    def units(self) -> tuple[int, int]:
        """(kept, all) of the things chosen in a group: weights, or pairs of weights."""
        step = 2 if self.paired else 1
        return self.kept // step, self.group // step

    @property
    def index_bits(self) -> int:
        """Bits that number the possible masks of one group."""
        kept, units = self.units
        return max(1, (comb(units, kept) - 1).bit_length())

    def check_width(self, columns: int, what: str) -> None:
        """Raise ObrError unless `columns` is a whole number of groups."""
        if columns % self.group:
            raise ObrError(
                f"Pattern {self} does not divide the {columns} input columns of {what}; "
                f"choose a pattern whose M divides {columns}, or unstructured sparsity."
            )

    def __str__(self) -> str:
        return f"{'paired ' if self.paired else ''}{self.kept}:{self.group}"
