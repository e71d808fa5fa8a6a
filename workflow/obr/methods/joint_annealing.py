"""Annealed coordinate descent over {on the grid} ∩ {the sparsity pattern}, for all rows of a layer.

Each sweep visits every coordinate of a row. Its optimum given the others, t = c - g / h (c the code, g the gradient,
h the Hessian's diagonal), is moved by random noise and projected: rounded to a code, and kept if its gain
`h c (2t - c)` exceeds the row's price, or if it lies on a support that is given. With a pattern, every weight that
is kept may move to a better place of its group. As the noise dies away the codes settle in a good local minimum.
Nothing here knows a budget: whoever calls sets the prices.

The noise is the same in every row, so a row's result does not depend on its place. On a CPU the sweeps are compiled
(native.cpp) or, without a compiler, made by PyTorch, with the same operations in the same order and the same result.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from obr.config.pattern import Pattern
from obr.methods import native
from obr.methods.grid import Grid
from obr.methods.row_products import product
from obr.runtime import compiler

LANES = 16  # entries that the compiled loop looks at together; rows are padded to whole multiples
BLOCK = 128  # columns whose changes PyTorch carries to the others together
TILE = 1 << 16  # elements of the gradient, such as stay in a CPU's cache, to which it carries them
_ALL = slice(None)
TRIANGLE = 6**0.5 / 65536  # brings the triangular noise from -65535 to 65535 to unit deviation


@dataclass
class CoordinateDescent:
    """Rows of codes on their way down, in units of each row's scale.

    hessian: (n, n), damped. diagonal, inverse: (n,) of it and one over it, both 0 at dead columns. codes, gradient:
    (r, n), float32; gradient is `(codes - weight / scale) @ hessian`, and kept up to date. With a scale for each
    group of columns, unit (r, 1) is a row's first, ratio (r, n) the others in units of it, and the gradient
    `(codes * ratio - weight / unit) @ hessian`.
    """

    hessian: Tensor
    dead: Tensor
    grid: Grid
    codes: Tensor
    gradient: Tensor

    @classmethod
    def begin(cls, weight: Tensor, values: Tensor, hessian: Tensor, dead: Tensor, grid: Grid) -> "CoordinateDescent":
        """From `values (r, n)` on the grid, towards `weight (r, n)`; dead: (n,) columns that stay zero."""
        rows, columns = weight.shape
        padded = -(-columns // LANES) * LANES
        codes, gradient = weight.new_zeros(rows, padded), weight.new_zeros(rows, padded)
        codes, gradient = codes[:, :columns], gradient[:, :columns]  # views, whose rows are whole lanes apart
        torch.div(values, grid.over(columns), out=codes).round_()
        descent = cls(hessian.contiguous(), dead, grid, codes, gradient)
        descent.renew(weight)
        return descent

    def __post_init__(self):
        self.diagonal = self.hessian.diagonal().masked_fill(self.dead, 0)
        self.inverse = self.hessian.diagonal().reciprocal().masked_fill(self.dead, 0)
        self.unit, self.scale = self.grid.scale[:, :1], self.grid.over(self.codes.shape[1])
        self.ratio = None if self.grid.group is None else self.scale / self.unit

    def values(self) -> Tensor:
        """(r, n) on the grid."""
        return self.codes * self.scale

    def _in_units(self) -> Tensor:
        """(r, n) the values in units of each row's scale."""
        return self.codes if self.ratio is None else self.codes * self.ratio

    def gains(self) -> Tensor:
        """What keeping each weight gains in loss, (r, n): of those kept as they are, of the others with their best
        code."""
        optimum = self.codes - self.gradient * (self.inverse if self.ratio is None else self.inverse / self.ratio)
        code = torch.where(self.codes != 0, self.codes, self._nearest(optimum))
        return code * (2 * optimum - code) * self.diagonal * self.scale.square()

    def deviations(self, weight: Tensor) -> Tensor:
        """(r,) the error, in codes, that in every coordinate alone would add up to the row's loss."""
        losses = (self.losses(weight) / self.unit**2)[:, 0]
        diagonal = self.diagonal.sum() if self.ratio is None else self.ratio.square() @ self.diagonal
        return (losses.clamp_min(0) / diagonal.clamp_min(1e-30)).sqrt()

    def renew(self, weight: Tensor) -> None:
        """Recompute the gradient towards `weight (r, n)`."""
        self.gradient.copy_(product(self._in_units() - weight / self.unit, self.hessian))

    @cached_property
    def rough(self) -> Tensor:
        """(n, n) the Hessian in bfloat16."""
        return self.hessian.bfloat16()

    def losses(self, weight: Tensor) -> Tensor:
        """(r, 1) loss of each row with the damped Hessian, from the gradient."""
        return ((self._in_units() - weight / self.unit) * self.gradient).sum(1, keepdim=True) * self.unit**2

    def _nearest(self, optimum: Tensor) -> Tensor:
        return optimum.round().clamp_(self.grid.low, self.grid.high)

    def sweep(
        self,
        deviations: Sequence[float],
        *,
        prices: Tensor | None = None,
        support: Tensor | None = None,
        pattern: Pattern | None = None,
        spread: Tensor | None = None,
        rough: bool = False,
        seed: int = 0,
    ) -> "int | Tensor":
        """Sweep once for each of `deviations`, the noise's standard deviation in codes; returns the changes made, on
        a GPU as a tensor: whoever looks waits for it.

        Seven parameters: each kind of sweep has its own.

        prices: (r,) least gain in loss of a weight that is kept. support: (r, n) bool, instead: which are kept.
        pattern: of the support, within whose groups weights move to better places; it is updated. spread: (r,)
        multiplies the deviations. rough: on a CPU changes are carried to the gradient with the Hessian in bfloat16,
        half the memory to read; `renew` takes the rounding out.
        """
        rows = len(self.codes)
        prices = self.codes.new_zeros(rows) if prices is None else prices / self.unit[:, 0].square()
        spread = self.codes.new_ones(rows) if spread is None else spread
        deviations = self.codes.new_tensor(deviations)[:, None] * spread * TRIANGLE  # (sweeps, r)
        noise = triangular(len(deviations), self.codes.shape[1], seed).to(self.codes.device)
        on_cpu = self.codes.device.type == "cpu"
        hessian = self.rough if rough and on_cpu else self.hessian
        if on_cpu and native.library() is not None:
            return self._compiled(hessian, deviations.contiguous(), noise, prices, support, pattern)
        hessian, chosen = hessian.float(), (prices, support, pattern)
        return sum(self._sweep(hessian, d[:, None] * z, *chosen) for d, z in zip(deviations, noise, strict=True))

    def _compiled(self, hessian: Tensor, deviations: Tensor, noise: Tensor, prices, support, pattern) -> int:
        """Sweep with noise (sweeps, n) in multiples of `deviations (sweeps, r)`, in compiled loops."""
        rows, columns, stride = *self.codes.shape, self.codes.stride(0)
        noise, inverse = (functional.pad(x, (0, stride - columns)) for x in (noise, self.inverse))
        ratio = None if self.ratio is None else functional.pad(self.ratio, (0, stride - columns), value=1.0)
        compiled = native.library()
        compiled.anneal.restype = ctypes.c_int64
        return compiled.anneal(
            compiler.pointer(hessian), ctypes.c_int(hessian.dtype == torch.bfloat16),
            compiler.pointer(inverse), None if ratio is None else compiler.pointer(ratio),
            compiler.pointer(self.codes), compiler.pointer(self.gradient),
            compiler.pointer(support) if support is not None else None, compiler.pointer(prices),
            ctypes.c_int64(rows), ctypes.c_int64(columns), ctypes.c_int64(stride),
            ctypes.c_int(pattern.group if pattern else 0), ctypes.c_int(2 if pattern and pattern.paired else 1),
            ctypes.c_float(self.grid.low), ctypes.c_float(self.grid.high),
            compiler.pointer(noise), compiler.pointer(deviations), ctypes.c_int(len(noise)),
            ctypes.c_int(torch.get_num_threads()),
        )  # fmt: skip

    def _sweep(self, hessian: Tensor, noise: Tensor, prices: Tensor, support, pattern) -> "int | Tensor":
        """One sweep in PyTorch, with noise (r, n): all rows in step, column by column or group by group.

        Returns the changes made; on a GPU, which is not waited for, the codes that are others than before.
        """
        step, changes = pattern.group if pattern else 1, 0
        width = max(step, BLOCK // step * step)
        for first in range(0, self.codes.shape[1], width):
            block = slice(first, first + width)
            on_cpu = self.codes.device.type == "cpu"
            swept = (_Block if on_cpu else _UnaskedBlock).of(self, hessian, block)
            for start in range(0, swept.codes.shape[1], step):
                place = slice(start, start + step)
                moves, own = noise[:, block][:, place], None if support is None else support[:, block][:, place]
                if pattern is None:
                    swept.round(start, moves[:, 0], None if own is None else own[:, 0], prices)
                else:
                    swept.move(place, moves, own, pattern)
            if on_cpu:
                swept.carry(self.gradient, hessian[block])
                changes += sum(int(by.count_nonzero()) for _, _, by in swept.made)
            else:
                moved = swept.codes - self.codes[:, block]
                self.gradient += (moved if swept.ratio is None else moved * swept.ratio) @ hessian[block]
                changes = changes + moved.count_nonzero()
            self.codes[:, block] = swept.codes
        return changes


def triangular(sweeps: int, columns: int, seed: int) -> Tensor:
    """Noise (sweeps, columns): whole numbers, float32, from -65535 to 65535, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    halves = torch.randint(1 << 16, (2, sweeps, columns), generator=generator)
    return (halves.sum(0) - 65535).float()


@dataclass
class _Block:
    """Columns of all rows while they are swept in PyTorch, with the operations of native.cpp in their order.

    hessian: (w, w) of the columns. inverse: (w,) one over its diagonal, 0 for dead columns. codes, gradient: (r, w).
    ratio: (r, w) or None, and own, the inverse over it: (r, w), or (w,). made: the changes in turn, (rows (k,), the
    column of each, or of all of them, and by how much (k,), in units of the rows' scales).
    """

    hessian: Tensor
    inverse: Tensor
    grid: Grid
    codes: Tensor
    gradient: Tensor
    ratio: Tensor | None
    own: Tensor
    made: list[tuple[Tensor | slice, Tensor | int, Tensor]]

    @classmethod
    def of(cls, descent: CoordinateDescent, hessian: Tensor, block: slice) -> "_Block":
        """A copy of some columns of a descent."""
        codes, gradient = descent.codes[:, block].clone(), descent.gradient[:, block].clone()
        inverse, ratio = descent.inverse[block], None if descent.ratio is None else descent.ratio[:, block]
        own = inverse if ratio is None else inverse / ratio
        return cls(hessian[block, block].contiguous(), inverse, descent.grid, codes, gradient, ratio, own, [])

    def carry(self, gradient: Tensor, hessian: Tensor) -> None:
        """Add all changes to the whole gradient (r, n), in turn; hessian: (w, n) rows of the block's columns."""
        width = max(1, TILE // len(gradient))
        for first in range(0, gradient.shape[1], width):
            tile = slice(first, first + width)
            sums, rows = gradient[:, tile].contiguous(), hessian[:, tile].contiguous()
            for some, column, by in self.made:
                sums[some] += by[:, None] * rows[column]
            gradient[:, tile] = sums

    def round(self, column: int, noise: Tensor, support: Tensor | None, prices: Tensor) -> None:
        """Bring one column to its optimum and noise (r,), on `support (r,)` or where it gains its price (r,)."""
        t = self.codes[:, column] - self.gradient[:, column] * self.own[..., column] + noise
        to = self._nearest(t)
        prices = prices * self.inverse[column]
        prices = prices if self.ratio is None else prices / self.ratio[:, column].square()
        kept = support if support is not None else to * (to - 2 * t) + prices < 0
        to = to * (kept & (self.inverse[column] > 0))
        self._change(_ALL, column, to - self.codes[:, column])

    def move(self, place: slice, noise: Tensor, support: Tensor, pattern: Pattern) -> None:
        """Take every unit out that is kept in the group `place`, and bring it to where it gains most: its own place
        or a free one. noise, support: (r, group); support follows."""
        unit = 2 if pattern.paired else 1
        for start in range(0, pattern.group, unit):
            active, codes, to = self._aims(place, noise, support, start, unit)
            stays, leaves = active & (to == start), (active & (to != start)).nonzero()[:, 0]
            to = to[leaves]
            for i in range(unit):
                column = place.start + start + i
                self._change(_ALL, column, (codes[:, start + i] - self.codes[:, column]) * stays)
                self._change(leaves, column, -self.codes[leaves, column])
                self._change(leaves, place.start + to + i, codes[leaves, to + i])  # where the code was 0
                support[leaves, start + i] = False
                support[leaves, to + i] = True

    def _aims(
        self, place: slice, noise: Tensor, support: Tensor, start: int, unit: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the unit at `start` in a group: where it is kept (r,), the best codes (r, group) of every unit in its
        stead, and the place (r,) of the one that gains most."""
        active, slopes = support[:, start].clone(), self.gradient[:, place].clone()
        for column in range(place.start + start, place.start + start + unit):
            slopes -= self._in_units(self.codes[:, column], _ALL, column)[:, None] * self.hessian[column, place]
        codes, gains = self._best(place, slopes, noise, unit)
        free = ~support[:, ::unit]
        free[:, start // unit] = True
        return active, codes, gains.masked_fill_(~free, -torch.inf).argmax(1) * unit  # of equal ones the first

    def _best(self, place: slice, slopes: Tensor, noise: Tensor, unit: int) -> tuple[Tensor, Tensor]:
        """Of each unit of a group the best codes (r, group), and what they gain (r, units).

        slopes, noise: (r, group). The first of a pair goes to its optimum beside a free second, the second to its own
        beside that.
        """
        inverse, cross = self.inverse[place], self.hessian[place, place].diagonal(1)[::2]
        own, ratio = self.own[..., place], 1.0 if self.ratio is None else self.ratio[:, place]
        codes, gains, dead = torch.zeros_like(slopes), torch.zeros_like(slopes[:, ::unit]), inverse == 0
        for k in range(unit):
            at = slice(k, None, unit)
            slope = slopes[:, at] if k == 0 else slopes[:, at] + (codes * ratio)[:, ::2] * cross
            optimum = noise[:, at] - slope * own[..., at]
            aim = optimum
            if unit == 2 and k == 0:
                one, other = inverse[::2], inverse[1::2]
                back = slopes[:, 1::2] * other * cross * own[..., ::2]
                aim = (optimum + back) / (1 - cross * one * cross * other)
            codes[:, at] = self._nearest(aim).masked_fill_(dead[at], 0)
            gained = codes[:, at] * (2 * optimum - codes[:, at])
            gained = gained / inverse[at] if self.ratio is None else gained * ratio[:, at].square() / inverse[at]
            gains += gained.masked_fill_(dead[at], 0)
        return codes, gains

    def _nearest(self, t: Tensor) -> Tensor:
        return t.round().clamp_(self.grid.low, self.grid.high)

    def _change(self, rows: "Tensor | slice", column: "Tensor | int", by: Tensor) -> None:
        """Change codes of some rows (k,) in each one's column (k,), or in one, by so much (k,); note it."""
        if by.any():
            self.codes[rows, column] += by
            by = self._in_units(by, rows, column)
            self.gradient[rows] += by[:, None] * self.hessian[column]
            self.made.append((rows, column, by))

    def _in_units(self, codes: Tensor, rows: "Tensor | slice", column: "Tensor | int") -> Tensor:
        """Codes (k,) of some rows, each in its column (k,) or all in one, in units of the rows' scales."""
        return codes if self.ratio is None else codes * self.ratio[rows, column]


class _UnaskedBlock(_Block):
    """The same on a GPU, which is never asked what it has found: all rows are changed, many of them by nothing."""

    def _change(self, rows: "Tensor | slice", column: "Tensor | int", by: Tensor) -> None:
        """Change codes of all rows in one column by so much (r,)."""
        self.codes[:, column] += by
        self.gradient += self._in_units(by, _ALL, column)[:, None] * self.hessian[column]

    def move(self, place: slice, noise: Tensor, support: Tensor, pattern: Pattern) -> None:
        unit = 2 if pattern.paired else 1
        places = torch.arange(pattern.group, device=support.device)
        for start in range(0, pattern.group, unit):
            active, codes, to = self._aims(place, noise, support, start, unit)
            leaves = active & (to != start)
            for i in range(unit):
                column = place.start + start + i
                aim = codes[:, start + i] * ~leaves
                self._change(_ALL, column, (aim - self.codes[:, column]) * active)
                into, gone = (to + i)[:, None], leaves[:, None]
                by, target = codes.gather(1, into) * gone, place.start + into  # where the code was 0
                self.codes.scatter_add_(1, target, by)
                by = by if self.ratio is None else by * self.ratio.gather(1, target)
                self.gradient += by * self.hessian[target[:, 0]]
                support &= ~(gone & (places == start + i))
                support |= gone & (places == into)
