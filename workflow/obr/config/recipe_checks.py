"""What must hold for the fields of a recipe. Each check raises ObrError with the field, its value and the choices."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from obr.config.methods import MASKS, METHODS, names_of
from obr.config.quantizer import check_choice
from obr.errors import ObrError

if TYPE_CHECKING:
    from obr.config.recipe import Recipe

WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
SCOPES = ("row", "layer")  # within which the zeros of a layer are placed
ROW_WEIGHTS = ("none", "gradient")
ORDERS = ("given", "hessian")  # of columns
CLIPS = ("minmax", "mse", "hessian", "learned")  # how a scale is found
SHRINKAGES = ("none", "held_out")  # of the steps to targets
HESSIAN_SCOPES = ("group", "block")  # of layers whose Hessians are collected at a time
DTYPES = ("float32", "float16", "bfloat16")  # of a computation


def check_choices(recipe: Recipe, name: str) -> None:
    """Raise ObrError at a field that has none of its values, or one that contradicts another."""
    check_choice(recipe.method, METHODS, f"{name}.method")
    check_choice(recipe.mask, MASKS, f"{name}.mask")
    check_choice(recipe.scope, SCOPES, f"{name}.scope")
    if recipe.scope == "layer" and (not METHODS[recipe.method].layer_scope or recipe.pattern):
        raise ObrError(
            f"{name}.scope is 'layer', but {f'pattern {recipe.pattern}' if recipe.pattern else recipe.method} "
            f"gives every row its own budget; use method {names_of('layer_scope')} without a pattern, or scope row."
        )
    check_choice(recipe.row_weights, ROW_WEIGHTS, f"{name}.row_weights")
    if recipe.row_weights != "none" and recipe.scope != "layer":
        raise ObrError(
            f"{name}.row_weights is {recipe.row_weights!r}, but with scope row every row has its own budget, and "
            f"weights would change nothing; use method {names_of('layer_scope')} with scope layer."
        )
    if not 0 <= recipe.sweeps <= 100_000:
        raise ObrError(f"{name}.sweeps is {recipe.sweeps}; it must lie between 0 and 100000.")
    check_choice(recipe.clip, CLIPS, f"{name}.clip")
    check_choice(recipe.hessian, ("sequential", "cached"), f"{name}.hessian")
    check_choice(recipe.hessian_scope, HESSIAN_SCOPES, f"{name}.hessian_scope")
    check_choice(recipe.hessian_inputs, ("plain", "quantised"), f"{name}.hessian_inputs")
    check_choice(recipe.online, ("model", "float32", "float64"), f"{name}.online")
    if recipe.dtype is not None:
        check_choice(recipe.dtype, DTYPES, f"{name}.dtype")
    if recipe.hessian_inputs == "quantised" and recipe.hessian == "cached":
        raise ObrError(f"{name}: cached Hessians are of plain inputs; use hessian: sequential for quantised ones.")
    check_choice(recipe.bits, WEIGHT_BITS, f"{name}.bits")


def check_ranges(recipe: Recipe, name: str) -> None:
    """Raise ObrError at a number out of range, or blocks that are no slice, and where calibration data is missing."""
    for field, low, high in (
        ("sparsity", 0, 0.95),
        ("alpha", 0, 1),
        ("damp", 0, 1),
        ("asymmetry", 0, 1),
        ("residual", 0, 1),
        ("token_weights", 0, 1),
        ("attention_weights", 0, 1),
        ("refine_steps", 0, 100_000),
        ("refine_rate", 0, 1),
    ):
        value = getattr(recipe, field)
        if not low <= value <= high:
            raise ObrError(f"{name}.{field} is {value}; it must lie between {low} and {high}.")
    if recipe.refine_rate == 0:
        raise ObrError(f"{name}.refine_rate is 0, which trains nothing; use a larger one, or leave refine_steps out.")
    if recipe.refine_rate != type(recipe).refine_rate and not recipe.refine_steps:
        raise ObrError(f"{name}.refine_rate is {recipe.refine_rate}, but no step is taken; give refine_steps.")
    if recipe.blocks is not None and not re.fullmatch(r"(-?\d+)?:(-?\d+)?", str(recipe.blocks)):
        raise ObrError(f"{name}.blocks is {recipe.blocks!r}; it must be a slice of block numbers, such as '0:2'.")
    if recipe.needs_hessian and not recipe.calibration:
        raise ObrError(f"{name}: method {recipe.method} reads activations; name one of the config's calibrations.")


def check_passes(recipe: Recipe, name: str) -> None:
    """Raise ObrError where what only passes through compressed blocks tell is asked for without them."""
    if type(recipe.held_out) is not int or recipe.held_out < 0:
        raise ObrError(f"{name}.held_out is {recipe.held_out!r}; it must be a number of calibration windows.")
    why = {
        "cached Hessians know the dense model's inputs alone; use hessian: sequential": recipe.hessian == "cached",
        f"method {recipe.method} reads no activations; use another method": not recipe.needs_hessian,
    }
    of_passes = {"asymmetry": 0, "residual": 0, "token_weights": 0, "refine_steps": 0, "held_out": 0}
    of_passes |= {"attention_weights": 0, "hessian_scope": "group"}
    for field, default in of_passes.items():
        for reason, clashing in why.items():
            value = getattr(recipe, field)
            if value != default and clashing:
                raise ObrError(f"{name}.{field} is {value}, but {reason}, or {field} {default}.")


def check_taken(given: dict, recipe: Recipe, name: str) -> None:
    """Raise ObrError at a value that the method does not take, in place of which the recipe has another.

    given: the fields of the recipe's entry.
    """
    if recipe.allocation is not None:
        return  # its options replace these fields
    for field in ("bits", "sparsity", "pattern", "mask"):
        value, taken = given.get(field), getattr(recipe, field)
        if value is None or value == taken or (field == "mask" and not METHODS[recipe.method].masks):
            continue
        if field == "sparsity" and recipe.pattern and (not value or math.isclose(value, taken, abs_tol=1e-3)):
            continue
        of = f"pattern {recipe.pattern}" if field == "sparsity" and recipe.pattern else f"method {recipe.method}"
        instead = "no weights are removed" if not recipe.prunes else f"it is {taken!r}"
        if field in ("bits", "mask"):
            instead = f"it is {taken!r}"
        raise ObrError(f"{name}.{field} is {value!r}, but with {of} {instead}; leave {field} out.")


def unread(entry: dict) -> dict[str, str]:
    """{field: which recipes read it} of the fields of a config's recipe that say something and are not read."""
    name, bits = entry.get("method"), entry.get("bits", 4)
    method = METHODS.get(name)
    if method is None or entry.get("allocation"):
        return {}  # refused elsewhere; an allocation's options may be of any method
    scales = bits < 16 and bool(entry.get("clip") == "hessian" or entry.get("refit"))
    hessian = scales or not method.data_free
    rounded = "recipes of fewer than 16 bits"
    found = {
        "alpha": ("the methods obr_rtn and obr_gptq", 0.5, method.solver == "obr"),
        "sweeps": ("the method joint", 600, method.solver == "joint"),
        "mask": ("methods that choose a mask by a score", "wanda", bool(method.masks)),
        "damp": ("recipes that read a Hessian", 0.01, hessian),
        "refit": (rounded, False, bits < 16 and name != "dense"),
        "int8_down_proj": ("methods that compress", False, name != "dense"),
        "hessian_inputs": ("recipes that name activations", "plain", bool(entry.get("activations"))),
    }  # fmt: skip
    return {
        field: readers
        for field, (readers, default, read) in found.items()
        if not read and entry.get(field) not in (None, default)
    }


def check_target(recipe: Recipe, name: str) -> None:
    """Raise ObrError for a shrinkage of targets that nothing decides, or that finds no step to shorten."""
    check_choice(recipe.target_shrinkage, SHRINKAGES, f"{name}.target_shrinkage")
    lacking = {
        "there are no held-out windows; give held_out": not recipe.held_out,
        "no step is taken; give asymmetry or residual": not recipe.needs_dense,
    }
    for reason, clashing in lacking.items():
        if recipe.target_shrinkage != "none" and clashing:
            raise ObrError(
                f"{name}.target_shrinkage is {recipe.target_shrinkage!r}, but {reason}, or target_shrinkage none."
            )


def check_order(recipe: Recipe, name: str) -> None:
    """Raise ObrError for an order of columns that would change nothing."""
    check_choice(recipe.column_order, ORDERS, f"{name}.column_order")
    methods = [option.method for option in recipe.options] or [recipe.method]
    if recipe.column_order != "given" and not any(METHODS[method].ordered for method in methods):
        raise ObrError(
            f"{name}.column_order is {recipe.column_order!r}, but {' and '.join(dict.fromkeys(methods))} "
            f"{'treats' if len(set(methods)) == 1 else 'treat'} all columns alike; use method "
            f"{names_of('ordered')}, or column_order given."
        )


def check_group(recipe: Recipe, name: str) -> None:
    """Raise ObrError for groups of no columns, or where there is one scale a row or none."""
    if recipe.group is None:
        return
    if type(recipe.group) is not int or recipe.group < 1:
        raise ObrError(f"{name}.group is {recipe.group!r}; it must be a number of columns such as 128, or null.")
    clashes = {
        f"method {recipe.method} takes one scale a row; use method {names_of('grouped')}": (
            not METHODS[recipe.method].grouped and recipe.allocation is None
        ),
        "the options of an allocation take one scale a row; drop the allocation": recipe.allocation is not None,
        "weights of 16 bits have no scales; use fewer bits": recipe.bits == 16,
    }
    for reason, clashing in clashes.items():
        if clashing:
            raise ObrError(f"{name}.group is {recipe.group}, but {reason}, or group: null.")


# What `Recipe.parse` asks of a recipe once its defaults are settled, in this order.
OF_FIELDS = (check_group, check_order, check_target, check_ranges, check_passes)
