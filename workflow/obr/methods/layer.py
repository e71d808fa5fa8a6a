"""What a method gets and what it gives: a layer with its Hessian, and the pruned and quantised weights."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from obr.config.pattern import Pattern
from obr.config.recipe import Recipe
from obr.methods.grid import Grid
from obr.methods.layer_hessian import Hessian


@dataclass(frozen=True)
class Layer:
    """A linear layer to be compressed; or several that read the same input, their rows stacked.

    weight: (r, n) float32, zero at columns whose input is always zero. hessian: None for methods without data.
    mask: (r, n) bool, True = kept; all True for methods that find their own. grid: of the dense rows.
    sizes: rows of each of the stacked layers. row_weights: (r,) how much an error in a row counts beside others of
    its layer; None for alike.
    """

    weight: Tensor
    hessian: Hessian | None
    mask: Tensor
    grid: Grid
    recipe: Recipe
    sizes: tuple[int, ...]
    row_weights: Tensor | None = None

    @cached_property
    def pattern(self) -> Pattern | None:
        """The N:M pattern of the zeros; None where it is free, or nothing is removed."""
        return self.recipe.zeros

    @property
    def cut(self) -> int:
        """Columns left of OBR's cut, whose rounding errors the others absorb."""
        return int(self.recipe.alpha * self.weight.shape[1])


@dataclass(frozen=True)
class Solution:
    """Compressed rows: weight (r, n) on the grid and zero where pruned, mask (r, n), and the grid as it was used."""

    weight: Tensor
    mask: Tensor
    grid: Grid
