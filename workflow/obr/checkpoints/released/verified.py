"""What the rows of released weights must be: few values, many zeros."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from obr.config.pattern import Pattern
from obr.config.recipe import Recipe
from obr.errors import ObrError

ON_GRID = 0.02  # of a step, to which rounding to float16 may move a code


@dataclass
class Verified:
    """What was found about the weights: of every row, how many values it has and how many are zero.

    likeness: the least cosine between a layer and the base model's layer, folded as the file says; None where the
    file does not say how it was folded.
    """

    rows: int = 0
    levels: int = 0  # most values in a row
    least_zeros: float = 1.0  # of a row
    most_zeros: float = 0.0
    off_grid: int = 0  # rows whose values are no multiples of one step
    likeness: float | None = None

    def add(self, weight: Tensor, recipe: Recipe, where: str, dtype: torch.dtype = torch.float16) -> None:
        """Count a layer (r, n), and refuse it if it is not what the recipe says.

        dtype: in which the weight was stored.

        Raises:
            ObrError: a row has more values than its bits allow, or fewer zeros than its sparsity asks for, or a
                group of a pattern keeps too many weights.
        """
        ordered = weight.sort(dim=1).values
        first = torch.ones_like(ordered, dtype=torch.bool)  # of its value in the row
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        levels = first.sum(1)
        zeros = (weight == 0).float().mean(1)
        allowed, asked = 2**recipe.bits, int(weight.shape[1] * recipe.sparsity) / weight.shape[1]
        if int(levels.max()) > allowed:
            raise ObrError(
                f"{where}: row {int(levels.argmax())} has {int(levels.max())} different values, more than the "
                f"{allowed} of {recipe.bits} bits; the checkpoint is not quantised as the recipe says."
            )
        if float(zeros.min()) < asked - 1e-9:
            raise ObrError(
                f"{where}: row {int(zeros.argmin())} is {100 * float(zeros.min()):.2f} % zeros, fewer than the "
                f"{100 * asked:.2f} % of the recipe; the checkpoint is not pruned as it says."
            )
        if recipe.pattern:
            _check_pattern(weight, Pattern.parse(recipe.pattern), where)
        self.rows += weight.shape[0]
        self.levels = max(self.levels, int(levels.max()))
        self.least_zeros = min(self.least_zeros, float(zeros.min()))
        self.most_zeros = max(self.most_zeros, float(zeros.max()))
        tolerated = max(ON_GRID, 2 ** (recipe.bits - 1) * torch.finfo(dtype).eps)
        self.off_grid += int((distance_to_grid(_distinct(ordered, first, levels), recipe.bits) > tolerated).sum())

    def resembles(self, likeness: float) -> None:
        """Note the cosine between a layer and the base model's."""
        self.likeness = likeness if self.likeness is None else min(self.likeness, likeness)

    def join(self, other: "Verified") -> None:
        """Add what was found about other layers."""
        self.rows, self.off_grid = self.rows + other.rows, self.off_grid + other.off_grid
        self.levels = max(self.levels, other.levels)
        self.least_zeros = min(self.least_zeros, other.least_zeros)
        self.most_zeros = max(self.most_zeros, other.most_zeros)
        if other.likeness is not None:
            self.resembles(other.likeness)

    @classmethod
    def of(cls, note: dict) -> "Verified":
        """From the fields that `vars` gives."""
        return cls(**{field.name: note[field.name] for field in fields(cls)})


def _distinct(ordered: Tensor, first: Tensor, levels: Tensor) -> Tensor:
    """(r, most levels): the different values of each row, then zeros, which are on every grid."""
    found = ordered.new_zeros(len(ordered), int(levels.max()))
    rows = first.nonzero()[:, 0]
    found[rows, torch.arange(len(rows)) - (levels.cumsum(0) - levels)[rows]] = ordered[first]
    return found


def _check_pattern(weight: Tensor, pattern: Pattern, where: str) -> None:
    """Raise ObrError unless every group of the weight (r, n) has as many zeros as the pattern removes."""
    pattern.check_width(weight.shape[1], where)
    kept = (weight != 0).view(weight.shape[0], -1, pattern.units[1], 2 if pattern.paired else 1).any(3).sum(2)
    if int(kept.max()) > pattern.units[0]:
        row, group = divmod(int(kept.argmax()), kept.shape[1])
        raise ObrError(
            f"{where}: group {group} of row {row} keeps more than the pattern {pattern} of the recipe allows; the "
            "checkpoint is not pruned as it says."
        )


def distance_to_grid(weight: Tensor, bits: int) -> Tensor:
    """(r,): how far the values of each row (r, n) lie from multiples of one step, in steps.

    The step is the row's largest magnitude over the code it may have, whichever of 1 … 2^(bits-1) fits best.
    """
    weight = weight.float()
    largest = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    best = torch.full((weight.shape[0],), float("inf"))
    for code in range(1, 2 ** (bits - 1) + 1):
        steps = weight * (code / largest)
        best = torch.minimum(best, (steps - steps.round()).abs().amax(1))
    return best
