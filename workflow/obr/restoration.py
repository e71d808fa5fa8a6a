"""Restoration: one layer's weights from dense to pruned and quantised, errors compensated.

Every method is a function `(weight, hessian, mask, grid, **options) -> weight`, listed in METHODS. All rows of
a layer are solved together. The objective is `tr((W - Ŵ) H (W - Ŵ)ᵀ)`, H the Hessian of the layer's inputs.

Sources: OBR, arXiv 2509.11177 (the signs of its equations 9 and 10 are corrected: the compensation is added);
GPTQ, arXiv 2210.17323; SparseGPT, arXiv 2301.00774; Wanda, arXiv 2306.11695.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from obr.errors import ObrError
from obr.joint import joint
from obr.prune import SCORES, check_mask, mask_from_scores
from obr.quantize import Grid
from obr.recipe import PRUNING, Pattern, Recipe
from obr.solver import TOLERANCE, images_on_support

BLOCK = 128  # columns of a GPTQ block
DAMP_RETRIES = 3
SWEPT_TOLERANCE = 2e-3  # of the solver where a GPTQ sweep follows: a quarter faster, relative errors equal to 4e-4


class Hessian:
    """A layer's Hessian with what every method derives from it, each computed once.

    One object serves all layers that read the same input (q, k and v, say).

    Args:
        matrix: (n, n), undamped.
        damp: added to the diagonal, in units of its mean. If the matrix cannot be factored, ten times the
            damping is tried, up to three times; `damp` then holds the value used and `flags` says so.

    Raises:
        ObrError: values that are not finite, or no factor even with the largest damping.
    """

    def __init__(self, matrix: Tensor, damp: float = 0.01, name: str = "layer"):
        if not torch.isfinite(matrix).all():
            raise ObrError(
                f"{name}: the Hessian has NaN or infinite values; check the calibration activations (half "
                "precision overflows on some models: use dtype float32 or bfloat16) and rebuild it."
            )
        self.matrix = matrix.float()
        self.damp, self.name, self.flags = damp, name, []
        self._tails: dict[int, tuple[Tensor, Tensor]] = {}
        self.diagonal = self.matrix.diagonal().clone()
        self.dead = self.diagonal == 0
        if self.dead.any():
            self.flags.append(f"{int(self.dead.sum())} dead columns")

    def damped(self, start: int = 0) -> Tensor:
        """The trailing block from column `start` on, a copy: dead columns get a unit diagonal, then damping is added.

        Its size is `damp` times the mean of the whole diagonal. Before `inverse` it is the damping asked for.
        """
        damped = self.matrix[start:, start:].clone()
        diagonal = torch.where(self.dead, 1, self.diagonal)
        damped.diagonal().copy_((diagonal + self.damp * diagonal.mean())[start:])
        return damped

    @cached_property
    def inverse(self) -> Tensor:
        """(n, n) inverse of the damped Hessian; settles the damping."""
        asked = self.damp
        for _ in range(DAMP_RETRIES + 1):
            factor, info = torch.linalg.cholesky_ex(self.damped())
            if not info.any():
                if self.damp != asked:
                    self.flags.append(f"damp raised from {asked:g} to {self.damp:g}")
                return torch.cholesky_inverse(factor)
            self.damp = max(10 * self.damp, 1e-3)
        raise ObrError(
            f"{self.name}: the Hessian cannot be factored, even with damp {self.damp / 10:g}; use more "
            "calibration tokens than the layer has columns, or a larger damp."
        )

    def tail(self, start: int) -> tuple[Tensor, Tensor]:
        """Inverse of the damped Hessian's trailing block H[start:, start:], and its upper factor U.

        Both are (n - start, n - start), with UᵀU the inverse; the U of a trailing block is also that of H's
        inverse from `start` on.

        Raises:
            ObrError: the inverse cannot be factored.
        """
        if start not in self._tails:
            inverse = self.inverse
            if start:
                inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.damped(start)))
            factor, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if info.any():
                raise ObrError(f"{self.name}: the inverse Hessian is not positive definite; use a larger damp.")
            self._tails[start] = inverse, factor
        return self._tails[start]

    @property
    def inverse_factor(self) -> Tensor:
        """(n, n) upper U with UᵀU = H⁻¹."""
        return self.tail(0)[1]

    def loss(self, change: Tensor) -> float:
        """tr(D H Dᵀ) of `change (r, n)`, undamped H."""
        return float(((change @ self.matrix) * change).sum(dtype=torch.float64))


def restore_pruned(weight: Tensor, hessian: Hessian, mask: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Prune `weight (r, n)` and let the kept weights absorb the change: w_R += H_RR⁻¹ H_RE w_E (OBR, eq. 9).

    Solved in the dual, which is well conditioned since damping bounds the inverse: with G = H⁻¹ and E pruned,
    G_EE v = w_E, and w - v G is zero on E and optimal on R.
    """
    if mask.all():
        return weight
    return (weight - images_on_support(hessian.inverse, weight, ~mask, tolerance)).mul_(mask)


def restore_rounded(
    weight: Tensor, rounded: Tensor, hessian: Hessian, mask: Tensor, tolerance: float = TOLERANCE
) -> Tensor:
    """Let the kept weights right of the cut absorb the rounding error left of it (OBR, eq. 10).

    weight: (r, n), pruned. rounded: (r, c), final values of the first c columns. mask: (r, n).
    Returns the updated right part (r, n - c): w_R2 += H_R2R2⁻¹ H_R2E2 e. Only the trailing block of H enters:
    first all its columns move freely, then the pruned ones are held at zero in the dual.
    """
    cut = rounded.shape[1]
    right, kept = weight[:, cut:], mask[:, cut:]
    if not 0 < cut < weight.shape[1]:
        return right
    error = weight[:, :cut] - rounded
    inverse, _ = hessian.tail(cut)
    change = (error @ hessian.matrix[:cut, cut:]) @ inverse
    if not kept.all():
        change -= images_on_support(inverse, change, ~kept, tolerance)
    return (right + change).mul_(kept)


def gptq_sweep(
    weight: Tensor,
    hessian: Hessian,
    grid: Grid,
    mask: Tensor,
    start: int = 0,
    choose: Callable[[Tensor, int], Tensor] | None = None,
    choose_every: int = BLOCK,
    clip: str = "mse",
) -> Tensor:
    """Round columns left to right from `start`, each column's error carried to those after it (GPTQ).

    weight, mask: (r, n); pruned columns are rounded to zero and their error is carried too (SparseGPT).
    choose: replaces the mask every `choose_every` columns: (current weights (r, w), first column) -> (r, w).
    clip: how the scale of a group of columns is found when its first column is reached, from its weights as they are
        then; written into grid.scale. Groups need `start` 0.
    Returns (r, n - start) on the grid. The first block of 128 starts at the cut, so no column is lost.
    """
    _, factor = hessian.tail(start)
    factor = factor / factor.diagonal()[:, None]  # a column's error, divided by the diagonal, times its row
    scale = grid.scale[:, :1] if grid.scale is not None else torch.ones_like(weight[:, :1])
    # Transposed: a column of the layer is then contiguous, and so is all that follows it. In units of the scale:
    # rounding is then to integers, and the carrying on of errors is linear in each row.
    work, kept = (weight / scale).T[start:].contiguous(), mask.T[start:].to(weight.dtype).contiguous()
    width = len(work)
    for first, last in _blocks(width, grid.group or BLOCK):
        block, local = work[first:last], factor[first:last, first:last]
        errors = torch.empty_like(block)
        for i in range(last - first):
            if grid.group is not None and first + i and (first + i) % grid.group == 0:
                scale = _next_group(grid, first + i, work, errors[:i], scale, clip)
            if choose is not None and (first + i) % choose_every == 0:
                span = slice(first + i, min(first + i + choose_every, last))
                kept[span] = choose(work[span].T * scale, start + first + i).T.to(kept.dtype)
            errors[i] = block[i]
            if grid.scale is not None:
                block[i].round_().clamp_(grid.low, grid.high)
            block[i].mul_(kept[first + i])
            errors[i].sub_(block[i])
            block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        work[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    if choose is not None:
        mask[:, start:] = kept.T.bool()
    return work.T * (scale if grid.group is None else grid.over(width))


def _blocks(width: int, group: int) -> Iterator[tuple[int, int]]:
    """(first, last) of blocks of at most 128 columns, such that each group begins one or lies within one: then its
    columns have all errors before it when its scale is fitted."""
    span = BLOCK // group * group if group < BLOCK else group
    for begin in range(0, width, span):
        end = min(begin + span, width)
        yield from ((first, min(first + BLOCK, end)) for first in range(begin, end, BLOCK))


def _next_group(grid: Grid, column: int, work: Tensor, errors: Tensor, scale: Tensor, clip: str) -> Tensor:
    """Fit the scales (r, 1) of the group that begins at this column of `work (n, r)`, and put all that is still to be
    rounded or carried on in their units, from those of `scale (r, 1)`."""
    number = column // grid.group
    current = work[column : column + grid.group].T * scale
    fitted = Grid.fit(current, grid.bits, clip, grid.group).scale
    grid.scale[:, number : number + 1] = fitted
    for part in (work[column:], errors):
        part.mul_((scale / fitted).T)
    return fitted


def round_to_nearest(weight, hessian, mask, grid, **_):
    """RTN, or with a mask: prune and round, no compensation (Wanda, magnitude)."""
    return grid.round(weight) * mask


def gptq(weight, hessian, mask, grid, *, clip="mse", **_):
    """GPTQ with the mask given."""
    return gptq_sweep(weight, hessian, grid, mask, clip=clip)


def obr_rtn(weight, hessian, mask, grid, *, alpha=0.5, **_):
    """OBR with rounding to nearest: restore for the pruning, then for the rounding left of the cut."""
    weight = restore_pruned(weight, hessian, mask)
    cut = int(alpha * weight.shape[1])
    left = grid.round(weight[:, :cut]) * mask[:, :cut]
    right = restore_rounded(weight, left, hessian, mask)
    return torch.cat([left, grid.round(right)], dim=1) * mask


def obr_gptq(weight, hessian, mask, grid, *, alpha=0.5, **_):
    """OBR with a GPTQ sweep right of the cut."""
    weight = restore_pruned(weight, hessian, mask, SWEPT_TOLERANCE)
    cut = int(alpha * weight.shape[1])
    left = grid.round(weight[:, :cut]) * mask[:, :cut]
    right = restore_rounded(weight, left, hessian, mask, SWEPT_TOLERANCE)
    swept = gptq_sweep(torch.cat([left, right], dim=1), hessian, grid, mask, start=cut)
    return torch.cat([left, swept], dim=1)


def sparsegpt_gptq(weight, hessian, mask, grid, *, sparsity=0.5, pattern=None, **_):
    """SparseGPT and GPTQ in one sweep; the mask is chosen on the way and written into `mask`.

    Unstructured: in each block of 128 columns the lowest scores over *all rows* go, so rows differ in
    sparsity, as in SparseGPT's code. With a pattern: group by group.
    """
    diagonal = hessian.inverse_factor.diagonal()

    def choose(block: Tensor, first: int) -> Tensor:
        scores = SCORES["sparsegpt"](block, inverse_factor_diagonal=diagonal[first : first + block.shape[1]])
        if pattern is not None:
            return mask_from_scores(scores, sparsity, pattern)
        threshold = scores.flatten().sort().values[int(scores.numel() * sparsity)]
        return scores > threshold

    every = pattern.group if pattern is not None else BLOCK
    return gptq_sweep(weight, hessian, grid, mask, choose=choose, choose_every=every)


# (weight (r, n), Hessian, mask (r, n), Grid, **options) -> weight (r, n)
METHODS: dict[str, Callable[..., Tensor]] = {
    "rtn": round_to_nearest,
    "gptq": gptq,
    "magnitude": round_to_nearest,
    "wanda": round_to_nearest,
    "sparsegpt_gptq": sparsegpt_gptq,
    "obr_rtn": obr_rtn,
    "obr_gptq": obr_gptq,
    "joint": joint,
}


@dataclass
class Restored:
    """A compressed layer.

    weight: (r, n), on the grid and zero where pruned, float32. codes: (r, n) int8, or None at 16 bits.
    scale: (r, 1), or (r, groups) of `group` columns each, or None at 16 bits. mask: (r, n) bool, True = kept.
    relative_error: loss over that of an all-zero layer, undamped Hessian (NaN if there was none). damp: as used.
    flags: what the report should say.
    """

    weight: Tensor
    codes: Tensor | None
    scale: Tensor | None
    mask: Tensor
    relative_error: float
    bits: int
    pattern: Pattern | None = None
    damp: float = 0.0
    flags: list[str] = field(default_factory=list)
    group: int | None = None

    @property
    def sparsity(self) -> float:
        """Fraction pruned."""
        return 1 - float(self.mask.float().mean())


def restore(
    weight: Tensor, hessian: "Tensor | Hessian | None", method: str = "obr_gptq", *, name: str = "layer", **options
) -> Restored:
    """Prune and quantise one linear layer and restore what that broke.

    Args:
        weight: (r, n), rows are output channels.
        hessian: (n, n) undamped, `2/S Σ XᵀX` or any multiple of it; a `Hessian` to share its factors between
            calls (its damping then counts); None is enough for "dense", "rtn" and "magnitude".
        method: a key of METHODS, or "dense".
        options: of `restore_together`: bits, sparsity, pattern, mask, alpha, scope, sweeps, group, refit, damp,
            clip, seed, row_weights.

    Raises:
        ObrError: a value out of range, shapes that do not fit, a Hessian that cannot be factored, or a result
            that is not finite, not on the grid, or does not have the mask.
    """
    return restore_together({name: weight}, hessian, method, **options)[name]


@torch.no_grad()
def restore_together(
    weights: dict[str, Tensor],
    hessian: "Tensor | Hessian | None",
    method: str = "obr_gptq",
    *,
    bits: int = 4,
    sparsity: float = 0.5,
    pattern: str | Pattern | None = None,
    mask: "str | Tensor" = "wanda",
    alpha: float = 0.5,
    scope: str = "row",
    sweeps: int = Recipe.sweeps,
    group: int | None = None,
    refit: bool = False,
    damp: float = 0.01,
    clip: str = "mse",
    seed: "int | dict[str, int]" = 0,
    row_weights: "Tensor | dict[str, Tensor] | None" = None,
) -> dict[str, Restored]:
    """`restore` for layers that read the same input, such as q, k and v: their rows are solved as one layer's.

    Args:
        weights: (r, n) each, by name. hessian, method: as for `restore`.
        bits: 2 to 8, or 16 for pruning only.
        sparsity: fraction to remove; ignored by methods that do not prune ("dense", "rtn", "gptq").
        pattern: "2:4", "4:8", "8:16", "paired 4:8" …; overrides `sparsity`.
        mask: a key of SCORES, or, for a single layer, the mask itself, (r, n) bool, True = kept.
        alpha: the cut, as a fraction of the columns. scope, sweeps, group, refit, damp, clip: as in
            `Recipe`.
        seed: of random masks; a dictionary gives each layer its own.
        row_weights: (r,), or by layer, how much an error in a row counts beside others of its layer, where these
            share a budget (scope "layer"); 1 by default.

    Raises:
        ObrError: as `restore`, with the layer's name.
    """
    pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    recipe = Recipe.parse(
        {
            "method": method, "bits": bits, "sparsity": sparsity, "pattern": str(pattern) if pattern else None,
            "mask": mask if isinstance(mask, str) else "wanda", "alpha": alpha, "damp": damp, "clip": clip,
            "scope": scope, "sweeps": sweeps, "group": group, "refit": refit, "calibration": "given",
        },
        ", ".join(weights),
    )  # fmt: skip
    pattern = pattern if recipe.prunes else None
    for name, weight in weights.items():
        hessian = _checked_hessian(weight, hessian, recipe, name)
        if pattern is not None:
            pattern.check_width(weight.shape[1], name)
    dense = {name: weight.float() for name, weight in weights.items()}
    if method == "dense":
        return {n: Restored(w, None, None, torch.ones_like(w, dtype=torch.bool), 0.0, 16) for n, w in dense.items()}

    grids = {name: Grid.fit(weight, bits, clip, group) for name, weight in dense.items()}
    works = {name: weight.clone() for name, weight in dense.items()}
    if hessian is not None:
        for work in works.values():
            work[:, hessian.dead] = 0  # an input that is always zero; the grid is still that of the dense row
    seeds = seed if isinstance(seed, dict) else dict.fromkeys(weights, seed)
    masks = {
        n: _choose_mask(work, hessian, replace(recipe, seed=seeds[n]), mask, pattern) for n, work in works.items()
    }
    options = {"alpha": alpha, "sparsity": recipe.sparsity, "pattern": pattern, "scope": scope, "sweeps": sweeps}
    options |= {"clip": clip}
    options |= {"row_weights": _checked_row_weights(row_weights, works)}
    results = _run(method, works, hessian, masks, grids, options)
    restored = {}
    for name, (result, kept) in results.items():
        if recipe.refit and bits < 16:
            grids[name], result = refit_scale(dense[name], result, hessian, grids[name])
        restored[name] = _restored(name, dense[name], result, kept, grids[name], hessian, recipe, mask, pattern)
    return restored


def refit_scale(weight: Tensor, values: Tensor, hessian: Hessian, grid: Grid) -> tuple[Grid, Tensor]:
    """The grid whose scales have the least loss for the codes of `values (r, n)`, and these codes on it.

    In each row s = w H c / (c H c), c the codes; where that is not positive the scale stays.
    """
    codes = grid.codes(values).to(weight.dtype)
    images = codes @ hessian.matrix
    power = (codes * images).sum(1, keepdim=True)
    scale = (weight * images).sum(1, keepdim=True) / power
    grid = Grid(torch.where((power > 0) & (scale > 0), scale, grid.scale), grid.bits)
    return grid, codes * grid.scale


def _checked_row_weights(row_weights, works: dict[str, Tensor]) -> Tensor | None:
    if row_weights is None:
        return None
    if isinstance(row_weights, Tensor):
        row_weights = dict.fromkeys(works, row_weights)
    for name, work in works.items():
        given = row_weights.get(name)
        if given is None or given.shape != (len(work),) or not (torch.isfinite(given) & (given > 0)).all():
            raise ObrError(f"{name}: row_weights must hold one positive number for each of the {len(work)} rows.")
    return torch.cat([row_weights[name].to(work) for name, work in works.items()])


def _run(method: str, works: dict, hessian: Hessian | None, masks: dict, grids: dict, options: dict) -> dict:
    """{name: (weight, mask)}, and `grids` as they were used.

    Rows are stacked but for the method whose thresholds are over all rows of a layer.
    """
    coupled = method == "sparsegpt_gptq" and options["pattern"] is None
    results = {}
    for names in [[name] for name in works] if coupled else [list(works)]:
        kept, grid = torch.cat([masks[name] for name in names]), Grid.stack([grids[name] for name in names])
        sizes = [len(works[name]) for name in names]
        options["sizes"] = sizes
        stacked = torch.cat([works.pop(name) for name in names])
        stacked = METHODS[method](stacked, hessian, kept, grid, **options)
        results |= {n: (w, m) for n, w, m in zip(names, stacked.split(sizes), kept.split(sizes), strict=True)}
        if grid.group is not None:  # whose scales were found on the way
            grids |= {n: replace(grid, scale=s) for n, s in zip(names, grid.scale.split(sizes), strict=True)}
    return results


def _restored(
    name: str, dense: Tensor, result: Tensor, kept: Tensor, grid: Grid, hessian, recipe: Recipe, mask, pattern
) -> Restored:
    restored = Restored(
        result, None if recipe.bits == 16 else grid.codes(result), grid.scale, kept,
        relative_error(dense, result, hessian), recipe.bits, pattern,
        hessian.damp if hessian is not None else 0.0, list(hessian.flags) if hessian is not None else [],
        grid.group,
    )  # fmt: skip
    _assert_sound(restored, grid, recipe, mask, name)
    return restored


def _checked_hessian(weight: Tensor, hessian, recipe: Recipe, name: str) -> Hessian | None:
    if weight.ndim != 2:
        raise ObrError(f"{name}: the weight has shape {tuple(weight.shape)}; it must be a matrix (r, n).")
    if not torch.isfinite(weight).all():
        raise ObrError(f"{name}: the weight has NaN or infinite values; the model's file is broken.")
    if hessian is None:
        if recipe.needs_hessian:
            raise ObrError(f"{name}: method {recipe.method} needs a Hessian.")
        return None
    hessian = hessian if isinstance(hessian, Hessian) else Hessian(hessian, recipe.damp, name)
    if tuple(hessian.matrix.shape) != (weight.shape[1],) * 2:
        raise ObrError(
            f"{name}: the Hessian has shape {tuple(hessian.matrix.shape)}, but the weight has "
            f"{weight.shape[1]} columns; it must be (n, n)."
        )
    return hessian


def _choose_mask(weight: Tensor, hessian, recipe: Recipe, mask, pattern) -> Tensor:
    if isinstance(mask, Tensor):
        if recipe.method == "joint":
            raise ObrError(
                "A mask is given, but method joint finds its own; use obr_gptq or obr_rtn with a given mask."
            )
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise ObrError(f"The mask must be bool of the weight's shape {tuple(weight.shape)}, True = kept.")
        return mask.clone()
    if not recipe.sparsity or recipe.method in ("sparsegpt_gptq", "joint"):  # they fill it as they go
        return torch.ones_like(weight, dtype=torch.bool)
    score = PRUNING[recipe.method] or recipe.mask
    statistics = {"seed": recipe.seed}
    if score == "wanda":
        statistics["hessian_diagonal"] = hessian.diagonal
    if score == "sparsegpt":
        statistics["inverse_factor_diagonal"] = hessian.inverse_factor.diagonal()
    return mask_from_scores(SCORES[score](weight, **statistics), recipe.sparsity, pattern)


def relative_error(dense: Tensor, result: Tensor, hessian: Hessian | None) -> float:
    """Loss of `result (r, n)` over that of an all-zero layer, `dense (r, n)` the target; NaN without a Hessian."""
    if hessian is None:
        return float("nan")
    whole = hessian.loss(dense)
    return hessian.loss(dense - result) / whole if whole else 0.0


def _assert_sound(restored: Restored, grid: Grid, recipe: Recipe, mask, name: str) -> None:
    """What must hold for every layer, whatever the method: a result that fails here is never written."""
    if not torch.isfinite(restored.weight).all():
        raise ObrError(f"{name}: {recipe.method} gave NaN or infinite weights; use a larger damp.")
    if restored.weight[~restored.mask].any():
        raise ObrError(f"{name}: {recipe.method} left pruned weights that are not zero.")
    if not grid.contains(restored.weight):
        raise ObrError(f"{name}: {recipe.method} left weights off the {recipe.bits}-bit grid.")
    thresholded = recipe.method == "sparsegpt_gptq" and not restored.pattern  # rows differ by design
    if isinstance(mask, str) and not thresholded:
        check_mask(restored.mask, recipe.sparsity, restored.pattern, name, recipe.scope)
