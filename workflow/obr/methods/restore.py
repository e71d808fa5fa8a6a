"""Restoration: layers checked, compressed by a method, and checked again.

All rows of layers that read the same input are solved together; the methods themselves are in `methods`.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from obr.config.pattern import Pattern
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.methods.grid import Grid
from obr.methods.layer_hessian import Hessian
from obr.methods.masks import SCORES, check_mask, mask_from_scores
from obr.methods.refit_scales import refit_scale
from obr.methods.registry import METHODS


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
            clip, seed, row_weights, harmonic.

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
    harmonic: Tensor | None = None,
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
        harmonic: (n,), for the mask "wanda_harmonic": Σ_i ‖X_i[:, j]‖² / i over calibration sequences X_i (t, n) in
            their order, i from 1, as in `sum(x.square().sum(0) / i for i, x in enumerate(sequences, 1))`. A
            `Hessian` brings its own.

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
        hessian = _checked_hessian(weight, hessian, recipe, name, harmonic)
        if pattern is not None:
            pattern.check_width(weight.shape[1], name)
    dense = {name: weight.float().contiguous() for name, weight in weights.items()}  # sums depend on the layout
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


def _checked_hessian(weight: Tensor, hessian, recipe: Recipe, name: str, harmonic: Tensor | None) -> Hessian | None:
    if weight.ndim != 2:
        raise ObrError(f"{name}: the weight has shape {tuple(weight.shape)}; it must be a matrix (r, n).")
    if not torch.isfinite(weight).all():
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
            f"{name}: mask wanda_harmonic needs column norms weighted by sequence, which a Hessian does not hold; "
            "give them as `harmonic`, or use mask wanda."
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
    statistics = {"seed": recipe.seed}
    if recipe.mask == "wanda":
        statistics["hessian_diagonal"] = hessian.diagonal
    if recipe.mask == "wanda_harmonic":
        statistics["harmonic"] = hessian.harmonic
    if recipe.mask == "sparsegpt":
        statistics["inverse_factor_diagonal"] = hessian.inverse_factor.diagonal()
    return mask_from_scores(SCORES[recipe.mask](weight, **statistics), recipe.sparsity, pattern)


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
