"""Restoration: layers checked, compressed by a method, and checked again.

All rows of layers that read the same input are solved together; the methods themselves are in `methods`.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from obr.config.methods import METHODS
from obr.config.pattern import Pattern
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.methods.column_order import solve_in_order
from obr.methods.grid import Grid
from obr.methods.layer import Layer, Solution
from obr.methods.layer_hessian import Hessian, is_finite
from obr.methods.masks import check_mask, mask_from_scores
from obr.methods.refit_scales import refit
from obr.methods.registry import FUNCTIONS, SCORES


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
    weight: Tensor,
    hessian: "Tensor | Hessian | None",
    method: str = "obr_gptq",
    *,
    name: str = "layer",
    **options: Any,
) -> Restored:
    """Prune and quantise one linear layer and restore what that broke.

    Args:
        weight: (r, n), rows are output channels.
        hessian: (n, n) undamped, `2/S Σ XᵀX` or any multiple of it; a `Hessian` to share its factors between
            calls (its damping then counts); None is enough for "dense", "rtn" and "magnitude".
        method: a key of METHODS in `obr.config.methods`, but "released" and "external".
        options: fields of `Recipe` (bits, sparsity, pattern, mask, alpha, …), and row_weights and harmonic of
            `restore_together`. mask may be the mask itself, (r, n) bool, True = kept.

    Raises:
        ObrError: a value out of range, shapes that do not fit, a Hessian that cannot be factored, or a result
            that is not finite, not on the grid, or does not have the mask.

    Example:
        >>> weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        >>> layer = restore(weight, torch.eye(128), "obr_gptq", bits=4, sparsity=0.5)
        >>> layer.codes.dtype, layer.sparsity
        (torch.int8, 0.5)
    """
    given = {key: options.pop(key) for key in ("row_weights", "harmonic") if key in options}
    if isinstance(options.get("mask"), Tensor):
        given["mask"] = options.pop("mask")
    if isinstance(options.get("pattern"), Pattern):
        options["pattern"] = str(options["pattern"])
    return restore_together({name: weight}, hessian, {**options, "method": method}, **given)[name]


def recipe_of_layers(fields: "Recipe | dict", name: str = "layer") -> Recipe:
    """The recipe of layers whose Hessian is given, from its fields. Raises ObrError at values out of range."""
    return fields if isinstance(fields, Recipe) else Recipe.parse({"calibration": "given", **fields}, name)


@torch.no_grad()
def restore_together(
    weights: dict[str, Tensor],
    hessian: "Tensor | Hessian | None",
    recipe: "Recipe | dict",
    *,
    mask: Tensor | None = None,
    seeds: dict[str, int] | None = None,
    row_weights: "Tensor | dict[str, Tensor] | None" = None,
    harmonic: Tensor | None = None,
) -> dict[str, Restored]:
    """`restore` for layers that read the same input, such as q, k and v: their rows are solved as one layer's.

    Seven parameters, since three of them are data of the layers that few callers have.

    Args:
        weights: (r, n) each, by name. hessian: as for `restore`.
        recipe: of its fields those of a layer count; a dictionary of them is enough. Learned clipping is in the
            weights already.
        mask: for a single layer, the mask itself, (r, n) bool, True = kept, in place of one by the recipe's score.
        seeds: of random masks, by name; the recipe's by default.
        row_weights: (r,), or by layer, how much an error in a row counts beside others of its layer, where these
            share a budget (scope "layer"); 1 by default.
        harmonic: (n,), for the mask "wanda_harmonic": Σ_i ‖X_i[:, j]‖² / i over calibration sequences X_i (t, n) in
            their order, i from 1, as in `sum(x.square().sum(0) / i for i, x in enumerate(sequences, 1))`. A
            `Hessian` brings its own.

    Raises:
        ObrError: as `restore`, with the layer's name.
    """
    recipe = recipe_of_layers(recipe, ", ".join(weights))
    recipe = replace(recipe, clip="minmax") if recipe.clip == "learned" else recipe
    for name, weight in weights.items():
        hessian = _checked_hessian(weight, hessian, recipe, name, harmonic)
        if recipe.zeros is not None:
            recipe.zeros.check_width(weight.shape[1], name)
    dense = {name: weight.float().contiguous() for name, weight in weights.items()}  # sums depend on the layout
    if recipe.method == "dense":
        return {n: Restored(w, None, None, torch.ones_like(w, dtype=torch.bool), 0.0, 16) for n, w in dense.items()}

    works = {name: weight.clone() for name, weight in dense.items()}
    if hessian is not None:
        for work in works.values():
            work[:, hessian.dead] = 0  # an input that is always zero; the grid is still that of the dense row
    layers = {}
    for name, work in works.items():
        importance = hessian.diagonal if hessian is not None else None
        grid = Grid.fit(dense[name], recipe.bits, recipe.clip, recipe.group, importance)
        own = replace(recipe, seed=seeds[name]) if seeds else recipe
        layers[name] = Layer(work, hessian, _choose_mask(work, hessian, own, mask), grid, recipe, (len(work),))
    works = None  # held by the layers alone
    restored = {}
    for name, solution in _solved(layers, _checked_row_weights(row_weights, dense)).items():
        if recipe.refit and recipe.bits < 16:
            solution = refit(dense[name], solution, hessian)
        restored[name] = _restored(dense[name], solution, hessian, recipe)
        _assert_sound(restored[name], solution.grid, recipe, name, chosen=mask is None)
    return restored


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


def _solved(layers: dict[str, Layer], row_weights: Tensor | None) -> dict[str, Solution]:
    """Each layer's solution. Rows are stacked, but not where thresholds are over all rows of a layer.

    layers: emptied on the way, so that weights are not held twice.
    """
    recipe = next(iter(layers.values())).recipe
    apart = METHODS[recipe.method].rows_differ and recipe.zeros is None
    solutions = {}
    for names in [[name] for name in layers] if apart else [list(layers)]:
        parts = [layers.pop(name) for name in names]
        sizes = tuple(size for part in parts for size in part.sizes)
        stacked = Layer(
            _stacked([part.weight for part in parts]), parts[0].hessian, _stacked([part.mask for part in parts]),
            Grid.stack([part.grid for part in parts]), recipe, sizes, row_weights,
        )  # fmt: skip
        parts = None
        solution = solve_in_order(FUNCTIONS[recipe.method], stacked)
        rows = zip(names, solution.weight.split(sizes), solution.mask.split(sizes), _split(solution.grid, sizes))
        solutions |= {name: Solution(weight, mask, grid) for name, weight, mask, grid in rows}
    return solutions


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split(grid: Grid, sizes: tuple[int, ...]) -> list[Grid]:
    if grid.scale is None:
        return [grid] * len(sizes)
    return [replace(grid, scale=scale) for scale in grid.scale.split(sizes)]


def _restored(dense: Tensor, solution: Solution, hessian: Hessian | None, recipe: Recipe) -> Restored:
    grid = solution.grid
    return Restored(
        solution.weight, None if recipe.bits == 16 else grid.codes(solution.weight), grid.scale, solution.mask,
        relative_error(dense, solution.weight, hessian), recipe.bits, recipe.zeros,
        hessian.damp if hessian is not None else 0.0, list(hessian.flags) if hessian is not None else [],
        grid.group,
    )  # fmt: skip


def _checked_hessian(weight: Tensor, hessian, recipe: Recipe, name: str, harmonic: Tensor | None) -> Hessian | None:
    if weight.ndim != 2:
        raise ObrError(f"{name}: the weight has shape {tuple(weight.shape)}; it must be a matrix (r, n).")
    if not is_finite(weight):
        raise ObrError(f"{name}: the weight has NaN or infinite values; the model's file is broken.")
    if hessian is None:
        if recipe.needs_hessian:
            raise ObrError(f"{name}: method {recipe.method} needs a Hessian.")
        return None
    if not isinstance(hessian, Hessian):
        hessian = Hessian(hessian, recipe.damp, name, harmonic)
    elif harmonic is not None and harmonic is not hessian.harmonic:
        raise ObrError(f"{name}: harmonic is given beside a Hessian object; give it to that object.")
    if tuple(hessian.matrix.shape) != (weight.shape[1],) * 2:
        raise ObrError(
            f"{name}: the Hessian has shape {tuple(hessian.matrix.shape)}, but the weight has "
            f"{weight.shape[1]} columns; it must be (n, n)."
        )
    if recipe.needs_harmonic and hessian.harmonic is None:
        raise ObrError(
            f"{name}: mask {recipe.mask} needs column norms weighted by sequence, which a Hessian does not hold; "
            "give them as `harmonic`, or use mask wanda."
        )
    return hessian


def _choose_mask(weight: Tensor, hessian: Hessian | None, recipe: Recipe, mask: Tensor | None) -> Tensor:
    finds = METHODS[recipe.method].finds_mask
    if mask is not None:
        if finds:
            others = " or ".join(name for name, method in METHODS.items() if method.masks)
            raise ObrError(
                f"A mask is given, but method {recipe.method} finds its own; use {others} with a given mask."
            )
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise ObrError(f"The mask must be bool of the weight's shape {tuple(weight.shape)}, True = kept.")
        return mask.clone()
    if not recipe.sparsity or finds:
        return torch.ones_like(weight, dtype=torch.bool)
    return mask_from_scores(SCORES[recipe.mask](weight, hessian, recipe.seed), recipe.sparsity, recipe.zeros)


def relative_error(dense: Tensor, result: Tensor, hessian: Hessian | None) -> float:
    """Loss of `result (r, n)` over that of an all-zero layer, `dense (r, n)` the target; NaN without a Hessian."""
    if hessian is None:
        return float("nan")
    whole = hessian.loss(dense)
    return hessian.loss(dense - result) / whole if whole else 0.0


def _assert_sound(restored: Restored, grid: Grid, recipe: Recipe, name: str, chosen: bool) -> None:
    """What must hold for every layer, whatever the method: a result that fails here is never written.

    chosen: the mask was not given.
    """
    if not is_finite(restored.weight):
        raise ObrError(f"{name}: {recipe.method} gave NaN or infinite weights; use a larger damp.")
    if ((restored.weight != 0) & ~restored.mask).any():
        raise ObrError(f"{name}: {recipe.method} left pruned weights that are not zero.")
    if not grid.contains(restored.weight):
        raise ObrError(f"{name}: {recipe.method} left weights off the {recipe.bits}-bit grid.")
    thresholded = METHODS[recipe.method].rows_differ and recipe.zeros is None
    if chosen and not thresholded:
        check_mask(restored.mask, recipe.sparsity, restored.pattern, name, recipe.scope)
