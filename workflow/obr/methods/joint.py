"""Joint pruning and rounding: the least loss over {on the grid} ∩ {the sparsity pattern}, mask and codes in one go.

ADMM alternates between least squares and the projection onto the set, and finds the basin. Annealed coordinate
descent then settles mask and codes together; it lowers the loss about as far as ten times the iterations of ADMM.

ADMM as in ALPS (NeurIPS 2024) and ADMM-Q (arXiv 2605.11222), on the Hessian with unit diagonal; coordinate descent
as in QuantEase (arXiv 2309.01885).
"""

import ctypes
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from obr.config.pattern import Pattern
from obr.methods import native
from obr.methods.column_order import solve_in_order
from obr.methods.gptq import round_by_gptq
from obr.methods.grid import Grid
from obr.methods.joint_annealing import CoordinateDescent
from obr.methods.layer import Layer, Solution
from obr.methods.layer_hessian import factored, inverted
from obr.methods.masks import mask_from_ranks, mask_from_scores
from obr.methods.obr import restore_pruned
from obr.methods.row_products import product
from obr.runtime import compiler
from obr.runtime.processor import product_dtype

# (penalty, iterations) of the ADMM: few penalties, since each takes a factorisation, after which an iteration takes
# one product, in low precision. Chosen, like the noise, by the error on layers of SmolLM2-135M, rotated and not.
STAGES = ((0.1, 8), (0.4, 8))
SEARCH_BITS = 8  # of the grid on which a mask is found for weights that stay at 16 bits
# Deviation of the noise in the first sweep and the last, beside that of the errors that ADMM leaves: the square root
# of a row's loss over that of an error of one in every coordinate.
NOISE = (0.35, 0.08)
POLISH = 4  # sweeps without noise on a fixed support, at most, before annealing and after: later ones change little
ADAPT_EVERY, ADAPT = 4, 6.0  # after so many sweeps prices follow the number of weights kept, with this exponent


@dataclass
class Budget:
    """How many weights are kept, and where: the best of each row, of each layer, or of each group of a pattern.

    parts: rows of each layer, for a budget over all of a layer's rows; None for the same in every row.
    row_weights: (r, 1) what a unit of gain counts in a row, beside other rows of its layer.
    """

    columns: int
    sparsity: float
    pattern: Pattern | None
    parts: list[slice] | None
    row_weights: Tensor

    @property
    def kept(self) -> int:
        """Weights of a row, on average."""
        return self.columns - int(self.columns * self.sparsity)

    def select(self, gains: Tensor) -> Tensor:
        """The mask (r, n) with the largest gains (r, n), in units that are the same for all rows; of equal ones the
        last."""
        if self.pattern is not None:
            return mask_from_ranks(gains, self.pattern)
        if self.parts is None:
            return mask_from_scores(gains, self.sparsity)
        masks = []
        for part in self.parts:
            scores = gains[part].reshape(1, -1)
            share = (scores.shape[1] - self.kept * len(gains[part]) + 0.5) / scores.shape[1]
            masks.append(mask_from_scores(scores, share).view_as(gains[part]))
        return torch.cat(masks)

    def thresholds(self, gains: Tensor) -> Tensor:
        """(r,) the least gain that is kept."""
        gains = gains * self.row_weights
        kept = torch.where(self.select(gains), gains, torch.inf).amin(1)
        for part in self.parts or []:
            kept[part] = kept[part].amin()
        return kept / self.row_weights[:, 0]

    def adapt(self, prices: Tensor, codes: Tensor) -> None:
        """Raise the prices (r,) where `codes (r, n)` hold too many weights, lower them where too few."""
        ratio = codes.count_nonzero(1) / self.kept
        for part in self.parts or []:
            ratio[part] = ratio[part].mean()
        # In float64, where the last bit of an exponential, which may depend on a row's place, is rounded away.
        prices.mul_((ADAPT * (ratio - 1)).clamp_(-1, 1).double().exp_())


def prune_and_round(layer: Layer) -> Solution:
    """Prune and round together; the mask is found here.

    The recipe's scope "row": every row keeps the same number; "layer": a layer's rows share its budget. sweeps: of
    annealing; 0 for ADMM and plain coordinate descent. At 16 bits the mask is found on a fine grid, and what is kept
    restored (OBR, equation 9).

    The result is, each row for itself or each layer that has one budget, whichever has the least loss: the dense
    rows pruned and rounded, what ADMM found and coordinate descent polished, or what annealing made of that. Where
    nothing is pruned, also what GPTQ makes of the columns in the order of the Hessian's diagonal, and that polished.
    """
    weight, hessian, grid, recipe = layer.weight, layer.hessian, layer.grid, layer.recipe
    row_weights = (
        torch.ones_like(weight[:, :1]) if layer.row_weights is None else layer.row_weights.to(weight)[:, None]
    )
    parts = _slices(layer.sizes) if recipe.scope == "layer" and layer.pattern is None else None
    budget = Budget(weight.shape[1], recipe.sparsity, layer.pattern, parts, row_weights)
    swept = _swept(layer) if budget.kept == budget.columns and grid.scale is not None else None
    damped, shrinkages = _factored(hessian)
    search = Grid.fit(weight, SEARCH_BITS, "minmax") if grid.scale is None else grid
    first, (values, support) = admm(weight, damped.diagonal(), shrinkages, search, budget)
    shrinkages = None  # before annealing, which has matrices of its own
    descent = CoordinateDescent.begin(weight, values, damped, hessian.dead, search)
    candidates = [(*first, _losses(weight - first[0], hessian))]

    polish(descent, support)
    candidates.append(_candidate(weight, descent, support, hessian))
    if recipe.sweeps:
        support = anneal(descent, weight, budget, recipe.sweeps, support)
        polish(descent, support)
        candidates.append(_candidate(weight, descent, support, hessian))
    if swept is not None:
        candidates.append((swept, support, _losses(weight - swept, hessian)))
        descent = CoordinateDescent.begin(weight, swept, damped, hessian.dead, search)
        polish(descent, support)
        candidates.append(_candidate(weight, descent, support, hessian))
    best, mask = _best(candidates, budget)
    if grid.scale is None:
        best = restore_pruned(weight, hessian, mask)
    return Solution(best, mask, grid)


def _swept(layer: Layer) -> Tensor:
    """(r, n) by GPTQ, columns in the order of the Hessian's diagonal; the Hessian in that order is not kept."""
    ordered = replace(layer, recipe=replace(layer.recipe, column_order="hessian"))
    found = solve_in_order(round_by_gptq, ordered).weight
    layer.hessian.forget_order()
    return found


def _slices(sizes: tuple[int, ...]) -> list[slice]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _factored(hessian) -> tuple[Tensor, dict[float, Tensor]]:
    """The damped Hessian H (n, n), and for each penalty ρ of STAGES `ρ (H̃ + ρ)⁻¹` (n, n), H̃ that of unit diagonal."""
    shrinkages = [None]
    while any(matrix is None for matrix in shrinkages):
        damped = hessian.damped()
        root = damped.diagonal().clamp_min(torch.finfo(damped.dtype).tiny).rsqrt()
        shrinkages = [_shrinkage(damped, root, penalty) for penalty, _ in STAGES]
        if any(matrix is None for matrix in shrinkages):
            hessian.inverse  # noqa: B018  raises the damping on record, or refuses
    return damped, {penalty: matrix for (penalty, _), matrix in zip(STAGES, shrinkages, strict=True)}


def _shrinkage(damped: Tensor, root: Tensor, penalty: float) -> Tensor | None:
    scaled = (damped * root[:, None]).mul_(root)
    scaled.diagonal().add_(penalty)
    factor, positive = factored(scaled)
    return inverted(factor).mul_(penalty).to(product_dtype(damped.device.type)) if positive else None


def admm(
    weight: Tensor, diagonal: Tensor, shrinkages: dict[float, Tensor], grid: Grid, budget: Budget
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The first and the last (values, support), both (r, n), of the alternating projections.

    With X = W√h, all in units of √h: `B = X + (D - U - X) ρ(H̃ + ρ)⁻¹` is the least squares, `D = Π(B + U)` the
    projection, `U = U + B - D` the dual, rescaled where the penalty ρ grows. The first D is Π(X).
    """
    root = diagonal.sqrt()
    target, first, previous = weight * root, None, None
    projected, dual = target.clone(), torch.zeros_like(target)
    support = torch.zeros_like(target, dtype=torch.bool)
    is_compiled = target.device.type == "cpu" and grid.group is None and native.library()
    step = _compiled_step if is_compiled else _step
    for penalty, iterations in STAGES:
        if previous is not None:
            dual *= previous / penalty
        shrinkage, previous = shrinkages[penalty], penalty
        moved = (projected - dual - target).to(shrinkage.dtype)
        for _ in range(iterations):
            step(dual, product(moved, shrinkage), moved, target, root, projected, support, grid, budget)
            first = first or (grid.round(projected / root), support.clone())
    return first, (grid.round(projected / root), support)


def _step(dual, image, moved, target, root, projected, support, grid: Grid, budget: Budget) -> None:
    """`dual` becomes `b - Π(b)`, `projected` Π(b), `moved` what is multiplied next, b = dual + image + target.

    Nine parameters: the tensors of one iteration, which it overwrites.
    """
    dual += image.to(target.dtype).add_(target)
    values, kept = project(dual / root, root.square(), grid, budget)
    torch.mul(values, root, out=projected)
    dual -= projected
    moved.copy_(projected - dual - target)
    support.copy_(kept)


def _compiled_step(dual, image, moved, target, root, projected, support, grid: Grid, budget: Budget) -> None:
    """The same in one pass over memory, with the same result to the last bit.

    Nine parameters, those of `_step`.
    """
    parts = [] if budget.pattern else budget.parts or []
    ends = torch.tensor([0, *(part.stop for part in parts)])
    pattern, rows, columns = budget.pattern, *target.shape
    kept = columns // pattern.group * pattern.kept if pattern else budget.kept
    native.library().alternate(
        compiler.pointer(dual), compiler.pointer(image), compiler.pointer(moved),
        ctypes.c_int(moved.dtype == torch.bfloat16), compiler.pointer(target), compiler.pointer(root),
        compiler.pointer(grid.scale), compiler.pointer(budget.row_weights), compiler.pointer(projected),
        compiler.pointer(support),
        ctypes.c_int64(rows), ctypes.c_int64(columns), compiler.pointer(ends), ctypes.c_int(len(parts)),
        ctypes.c_int64(kept), ctypes.c_int(pattern.group if pattern else 0),
        ctypes.c_int(2 if pattern and pattern.paired else 1), ctypes.c_float(grid.low), ctypes.c_float(grid.high),
        ctypes.c_int(torch.get_num_threads()),
    )  # fmt: skip


def project(values: Tensor, diagonal: Tensor, grid: Grid, budget: Budget) -> tuple[Tensor, Tensor]:
    """Π: (rounded and pruned, mask) of `values (r, n)`; those with the largest h q (2 v - q) stay."""
    rounded = grid.round(values)
    gains = (rounded * (2 * values - rounded) * diagonal * budget.row_weights).clamp_min_(
        0
    )  # rounding may leave less
    support = budget.select(gains)
    return rounded * support, support


def polish(descent: CoordinateDescent, support: Tensor) -> None:
    """Coordinate descent on a fixed support (r, n), until nothing changes."""
    for _ in range(POLISH):
        if not descent.sweep([0.0], support=support):
            return


def anneal(descent: CoordinateDescent, weight: Tensor, budget: Budget, sweeps: int, support: Tensor) -> Tensor:
    """Sweep with dying noise from a start with `support (r, n)`; returns the support (r, n) that meets the budget."""
    high, low = NOISE
    deviations = (high * (low / high) ** torch.linspace(0, 1, sweeps)).tolist()
    spread = descent.deviations(weight)
    if budget.kept == budget.columns:
        descent.sweep(deviations, support=support, spread=spread)
        return support
    if budget.pattern is not None:
        support = support.clone()
        descent.sweep(deviations, support=support, pattern=budget.pattern, spread=spread)
        return support
    prices = budget.thresholds(descent.gains())
    for start in range(0, sweeps, ADAPT_EVERY):
        part = deviations[start : start + ADAPT_EVERY]
        descent.sweep(part, prices=prices, spread=spread, rough=True, seed=start)
        budget.adapt(prices, descent.codes)
    descent.renew(weight)
    return budget.select(descent.gains() * budget.row_weights)


def _candidate(weight: Tensor, descent: CoordinateDescent, support: Tensor, hessian) -> tuple[Tensor, Tensor, Tensor]:
    """(values (r, n), support, losses (r, 1)) that the descent has come to."""
    values = descent.values()
    excess = descent.hessian.diagonal() - hessian.diagonal  # the damping; where columns are dead nothing changes
    return values, support, descent.losses(weight) - ((weight - values).square() * excess).sum(1, keepdim=True)


def _losses(change: Tensor, hessian) -> Tensor:
    return (product(change, hessian.matrix) * change).sum(1, keepdim=True)


def _best(candidates: list[tuple[Tensor, Tensor, Tensor]], budget: Budget) -> tuple[Tensor, Tensor]:
    """(values, support), both (r, n), of the candidates (values, support, losses) with the least loss, row by row or
    part by part."""
    best, mask, least = *candidates[0][:2], torch.full_like(candidates[0][2], torch.inf)
    for values, support, losses in candidates:
        losses = losses * budget.row_weights
        for part in budget.parts or []:
            losses[part] = losses[part].sum()
        better = losses < least
        least = torch.where(better, losses, least)
        best = torch.where(better, values, best)
        mask = torch.where(better, support, mask)
    return best, mask
