"""Annealed coordinate descent over {on the grid} ∩ {the sparsity pattern}, for all rows of a layer.

Each sweep visits every coordinate of a row. Its optimum given the others, t = c - g / h (c the code, g the gradient,
h the Hessian's diagonal), is moved by random noise and projected: rounded to a code, and kept if its gain
`h c (2t - c)` exceeds the row's price, or if it lies on a support that is given. With a pattern, every weight that
is kept may move to a better place of its group. As the noise dies away the codes settle in a good local minimum.
Nothing here knows a budget: whoever calls sets the prices.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from obr import native
from obr.quantize import Grid
from obr.recipe import Pattern

LANES = 16  # entries that the compiled loop looks at together; rows are padded to whole multiples
BLOCK = 128  # columns whose changes are carried to the others in one product


@dataclass
class Descent:
    """Rows of codes on their way down, in units of each row's scale.

    hessian: (n, n), damped. diagonal, inverse: (n,) of it and one over it, both 0 at dead columns. codes, gradient:
    (r, n), float32; gradient is `(codes - weight / scale) @ hessian`, and kept up to date.
    """

    hessian: Tensor
    dead: Tensor
    grid: Grid
    codes: Tensor
    gradient: Tensor

    @classmethod
    def begin(cls, weight: Tensor, values: Tensor, hessian: Tensor, dead: Tensor, grid: Grid) -> "Descent":
        """From `values (r, n)` on the grid, towards `weight (r, n)`; dead: (n,) columns that stay zero."""
        rows, columns = weight.shape
        padded = -(-columns // LANES) * LANES
        codes, gradient = weight.new_zeros(rows, padded), weight.new_zeros(rows, padded)
        codes, gradient = codes[:, :columns], gradient[:, :columns]  # views, whose rows are whole lanes apart
        torch.div(values, grid.scale, out=codes).round_()
        descent = cls(hessian.contiguous(), dead, grid, codes, gradient)
        descent.renew(weight)
        return descent

    def __post_init__(self):
        self.diagonal = self.hessian.diagonal().masked_fill(self.dead, 0)
        self.inverse = self.hessian.diagonal().reciprocal().masked_fill(self.dead, 0)

    def values(self) -> Tensor:
        """(r, n) on the grid."""
        return self.codes * self.grid.scale

    def gains(self) -> Tensor:
        """What keeping each weight gains in loss, (r, n): of those kept as they are, of the others with their best
        code."""
        optimum = self.codes - self.gradient * self.inverse
        code = torch.where(self.codes != 0, self.codes, self._nearest(optimum))
        return code * (2 * optimum - code) * self.diagonal * self.grid.scale.square()

    def deviations(self, weight: Tensor) -> Tensor:
        """(r,) the error, in codes, that in every coordinate alone would add up to the row's loss."""
        losses = (self.losses(weight) / self.grid.scale**2)[:, 0]
        return (losses.clamp_min(0) / self.diagonal.sum().clamp_min(1e-30)).sqrt()

    def renew(self, weight: Tensor) -> None:
        """Compute the gradient anew towards `weight (r, n)`."""
        self.gradient.copy_((self.codes - weight / self.grid.scale) @ self.hessian)

    @cached_property
    def rough(self) -> Tensor:
        """(n, n) the Hessian in bfloat16."""
        return self.hessian.bfloat16()

    def losses(self, weight: Tensor) -> Tensor:
        """(r, 1) loss of each row with the damped Hessian, from the gradient."""
        return ((self.codes - weight / self.grid.scale) * self.gradient).sum(1, keepdim=True) * self.grid.scale**2

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
    ) -> int:
        """Sweep once for each of `deviations`, the noise's standard deviation in codes; returns the changes made.

        prices: (r,) least gain in loss of a weight that is kept. support: (r, n) bool, instead: which are kept.
        pattern: of the support, within whose groups weights move to better places; it is updated. spread: (r,)
        multiplies the deviations. rough: changes are carried to the gradient with the Hessian in bfloat16, where
        loops are compiled: half the memory to read; `renew` takes the rounding out.
        """
        rows = len(self.codes)
        prices = self.codes.new_zeros(rows) if prices is None else prices / self.grid.scale[:, 0].square()
        spread = self.codes.new_ones(rows) if spread is None else spread
        compiled = native.library() if self.codes.device.type == "cpu" else None
        if compiled is None:
            generator = torch.Generator(self.codes.device).manual_seed(seed)
            chosen = (prices, support, pattern)
            return sum(self._sweep(float(d) * spread[:, None], *chosen, generator) for d in deviations)
        hessian = self.rough if rough else self.hessian
        spread, deviations = spread.float().contiguous(), torch.tensor(deviations, dtype=torch.float32)
        compiled.anneal.restype = ctypes.c_int64
        return compiled.anneal(
            native.pointer(hessian), ctypes.c_int(hessian.dtype == torch.bfloat16),
            native.pointer(self.inverse), native.pointer(self.codes), native.pointer(self.gradient),
            native.pointer(support) if support is not None else None, native.pointer(prices), native.pointer(spread),
            ctypes.c_int64(rows), ctypes.c_int64(self.codes.shape[1]), ctypes.c_int64(self.codes.stride(0)),
            ctypes.c_int(pattern.group if pattern else 0), ctypes.c_int(2 if pattern and pattern.paired else 1),
            ctypes.c_float(self.grid.low), ctypes.c_float(self.grid.high),
            native.pointer(deviations), ctypes.c_int(len(deviations)), ctypes.c_uint64(seed),
            ctypes.c_int(torch.get_num_threads()),
        )  # fmt: skip

    def _sweep(self, deviation: Tensor, prices, support, pattern, generator) -> int:
        """One sweep in PyTorch: all rows in step, the columns of a block one by one, or group by group."""
        step, changes = pattern.group if pattern else 1, 0
        width = max(step, BLOCK // step * step)
        for first in range(0, self.codes.shape[1], width):
            block = slice(first, first + width)
            codes, gradient = self.codes[:, block].clone(), self.gradient[:, block].clone()
            noise = torch.randn(codes.shape, generator=generator, device=codes.device) * deviation
            local, inverse = self.hessian[block, block], self.inverse[block]
            for start in range(0, codes.shape[1], step):
                part, whole = slice(start, start + step), slice(first + start, first + start + step)
                if pattern is not None:
                    to = self._moved(
                        codes[:, part], gradient[:, part], noise[:, part], support[:, whole], whole, pattern
                    )
                else:
                    optimum = codes[:, part] - gradient[:, part] * inverse[part] + noise[:, part]
                    to = self._nearest(optimum)
                    gains = to * (2 * optimum - to) * self.diagonal[whole]
                    to *= (support[:, whole] if support is not None else gains > prices[:, None]) & ~self.dead[whole]
                gradient += (to - codes[:, part]) @ local[part]
                codes[:, part] = to
            moved = codes - self.codes[:, block]
            changes += int(moved.count_nonzero())
            self.gradient += moved @ self.hessian[block]
            self.codes[:, block] = codes
        return changes

    def _moved(self, codes: Tensor, gradient: Tensor, noise: Tensor, support: Tensor, whole: slice, pattern: Pattern):
        """The codes (r, m) of a group after every unit that is kept went where it gains most; `support` follows."""
        unit, rows = 2 if pattern.paired else 1, torch.arange(len(codes), device=codes.device)
        local, inverse = self.hessian[whole, whole], self.inverse[whole]
        codes, gradient, cross = codes.clone(), gradient.clone(), local.diagonal(1)[::2]
        for start in range(0, pattern.group, unit):
            taken = slice(start, start + unit)
            active = support[:, start].clone()
            out = codes[:, taken] * active[:, None]
            slopes = gradient - out @ local[taken]
            to, gains = torch.zeros_like(codes), torch.zeros_like(codes)
            for k in range(unit):
                at = slice(k, None, unit)
                optimum = noise[:, at] - slopes[:, at] * inverse[at]
                aim = optimum
                if unit == 2 and k == 0:  # the first of a pair goes to its optimum beside a free second
                    ratio, back = cross * inverse[::2], cross * inverse[1::2]
                    aim = (optimum + slopes[:, 1::2] * inverse[1::2] * ratio) / (1 - ratio * back)
                to[:, at] = self._nearest(aim).masked_fill_(self.dead[whole][at], 0)
                gains[:, at] = to[:, at] * (2 * optimum - to[:, at]) * self.diagonal[whole][at]
                if unit == 2:  # and the second to its own beside that
                    slopes[:, 1::2] += to[:, ::2] * cross * (k == 0)
            gains = gains.unflatten(1, (-1, unit)).sum(2)
            free = ~support[:, ::unit]
            free[:, start // unit] = True
            best = gains.masked_fill_(~free, -torch.inf).argmax(1)
            change = torch.zeros_like(codes)
            change[:, taken] -= out
            support[:, taken] &= ~active[:, None]
            for k in range(unit):
                place = best * unit + k
                change[rows, place] += to[rows, place] * active
                support[rows, place] |= active
            codes += change
            gradient += change @ local
        return codes
