"""Grids of integers: scales, rounding, and the fake-quantisation of activations, keys and values."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from obr.methods import native

# The clip search of GPTQ: shrink factors 1.00, 0.99 … 0.21 and an exponent between L2 and L3.
SHRINK_STEPS = 80
ERROR_EXPONENT = 2.4
_SHRINK = [1 - i / 100 for i in range(SHRINK_STEPS)]
HALF_RANGE = (2.0**-24, 65504.0)  # the smallest and the largest that float16 holds
CANDIDATE_MARGIN = 1.0001  # the compiled search finds errors to 1e-5: what comes as near as this is looked at exactly
# Rows are searched in chunks: on a GPU such as keep it busy, on a CPU so small that PyTorch does not split them among
# threads. It computes powers in vectors, and the last few of a tensor, or of a thread's share, one by one, which
# differs in the last bit: rows of whole vectors in one share have all of theirs computed alike.
_SEARCH_ELEMENTS = {"cpu": 1 << 15, "cuda": 1 << 25}
_CHECKED_ROWS = 512  # at a time, by `contains`
_VECTORS = 32  # elements, a multiple of what PyTorch computes at once


@dataclass(frozen=True)
class Grid:
    """Symmetric b-bit grid of a weight matrix, one scale a row or a group of its columns; zero is on it.

    scale: (r, 1), (r, groups), or None at 16 bits, where every value is on the grid.
    group: consecutive columns that share a scale, fewer in the last group of a row; None for all of a row.
    order: (n,) which columns those of the weights are, where these are in another order; None for the first to the
    last.
    """

    scale: Tensor | None
    bits: int
    group: int | None = None
    order: Tensor | None = None

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        bits: int,
        clip: str = "mse",
        group: int | None = None,
        importance: Tensor | None = None,
    ) -> "Grid":
        """The grid of `weight (r, n)`: scale = max|w| / (2^(b-1) - 1), shrunk row by row by a search: if clip is
        "mse", for the least Σ|Q(w) - w|^2.4; if it is "hessian", for the least Σ importance |Q(w) - w|².

        importance: (n,), a column's diagonal element of the Hessian; needed and read for "hessian" alone.
        With groups each is fitted as a row is, and its scale rounded to float16, as it is stored.
        """
        importance = importance if clip == "hessian" else None
        if bits == 16:
            return cls(None, 16)
        if group is not None:
            counts = [None] * -(-weight.shape[1] // group) if importance is None else importance.split(group)
            parts = zip(weight.split(group, dim=1), counts, strict=True)
            scale = torch.cat([cls.fit(part, bits, clip, None, its).scale for part, its in parts], dim=1)
            return cls(scale.clamp(*HALF_RANGE).half().float(), bits, group)
        largest = 2 ** (bits - 1) - 1
        scale = weight.abs().amax(1, keepdim=True) / largest
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a row of zeros: any scale will do
        grid = cls(scale, bits)
        return grid._clip_search(weight, importance) if clip in ("mse", "hessian") else grid

    def of_other(self, weight: Tensor, clip: str, importance: Tensor) -> "Grid":
        """The grid of other weights (r, n) of the same layer, whose columns are in this grid's order; importance:
        (n,) as for `fit`, in that order, too."""
        if self.order is not None:
            back = self.order.argsort()
            weight, importance = weight.index_select(1, back), importance[back]
        return replace(self.fit(weight, self.bits, clip, self.group, importance), order=self.order)

    @classmethod
    def stack(cls, grids: "list[Grid]") -> "Grid":
        """The grid of matrices stacked row on row, all of the same bits."""
        first = grids[0]
        return first if first.scale is None else replace(first, scale=torch.cat([grid.scale for grid in grids]))

    @property
    def low(self) -> int:
        """The smallest integer: -8 with 4 bits."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """The largest integer: 7 with 4 bits."""
        return 2 ** (self.bits - 1) - 1

    def over(self, columns: int) -> Tensor:
        """The scales of a row's columns: (r, columns), or (r, 1) where a row has one."""
        if self.group is None:
            return self.scale
        order = torch.arange(columns, device=self.scale.device) if self.order is None else self.order[:columns]
        return self.scale[:, order // self.group]

    def from_column(self, first: int, columns: int) -> "Grid":
        """The grid of the columns from `first` on, of rows of so many `columns`; scales are those of all groups."""
        if self.group is None:
            return self
        order = torch.arange(columns, device=self.scale.device) if self.order is None else self.order
        return replace(self, order=order[first:])

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest integers (r, n), int8."""
        return (weight / self.over(weight.shape[1])).round_().clamp_(self.low, self.high).to(torch.int8)

    def round(self, weight: Tensor) -> Tensor:
        """Nearest values on the grid, (r, n)."""
        if self.scale is None:
            return weight
        scale = self.over(weight.shape[1])
        return (weight / scale).round_().clamp_(self.low, self.high).mul_(scale)

    def contains(self, weight: Tensor) -> bool:
        """Whether every value of `weight (r, n)` lies on the grid (to fp32 rounding)."""
        if self.scale is None:
            return True
        parts = zip(weight.split(_CHECKED_ROWS), self.scale.split(_CHECKED_ROWS), strict=True)
        near = [
            torch.isclose(replace(self, scale=scale).round(part), part, rtol=1e-5, atol=0).all()
            for part, scale in parts
        ]
        return not near or bool(torch.stack(near).all())  # once for all: a GPU is waited for

    def _clip_search(self, weight: Tensor, importance: Tensor | None) -> "Grid":
        errors = native.clip_errors(weight, importance, self.scale, SHRINK_STEPS, self.low, self.high, ERROR_EXPONENT)
        width = -(-weight.shape[1] // _VECTORS) * _VECTORS
        if importance is not None:
            importance = functional.pad(importance, (0, width - len(importance)))
        chunk = max(1, _SEARCH_ELEMENTS.get(weight.device.type, 1 << 25) // width)
        if errors is None:  # every step for every row: choosing rows would wait for a GPU
            parts = [slice(first, first + chunk) for first in range(0, len(weight), chunk)]
            candidates, scale = None, self.scale.clone()
        else:
            candidates = errors <= errors.amin(1, keepdim=True) * CANDIDATE_MARGIN
            scale = self.scale * torch.tensor(_SHRINK)[candidates.int().argmax(1, keepdim=True)]
            parts = (candidates.sum(1) > 1).nonzero()[:, 0].split(chunk)
        for part in parts:
            rows = functional.pad(weight[part], (0, width - weight.shape[1]))  # zeros have no error
            chosen = None if candidates is None else candidates[part]
            scale[part] = self._best_of(rows, importance, self.scale[part], chosen)
        return Grid(scale, self.bits)

    def _best_of(self, rows: Tensor, importance: Tensor | None, full: Tensor, candidates: Tensor | None) -> Tensor:
        """Of the shrunk scales marked in `candidates` (r, steps), each row's best, the first of equal ones.

        candidates: None for all steps in all rows.
        """
        scale, best = full.clone(), torch.full_like(full, torch.inf)
        for i, factor in enumerate(_SHRINK):
            of = slice(None) if candidates is None else candidates[:, i].nonzero()[:, 0]
            if candidates is not None and not len(of):
                continue
            trial, looked = full[of] * factor, rows[of]
            error = (looked / trial).round_().clamp_(self.low, self.high).mul_(trial).sub_(looked)
            error = error.abs_().pow_(ERROR_EXPONENT) if importance is None else error.square_().mul_(importance)
            error = error.sum(1, keepdim=True)
            better = error < best[of]
            best[of] = torch.where(better, error, best[of])
            scale[of] = torch.where(better, trial, scale[of])
        return scale
