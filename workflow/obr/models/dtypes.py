"""The dtype of a computation: which one counts where several are named, and whether two results share it."""

from dataclasses import replace

import torch

from obr.config.recipe import Recipe
from obr.errors import ObrError


def name_of(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def resolve_dtype(recipe: Recipe, given: torch.dtype | None) -> tuple[Recipe, torch.dtype | None]:
    """(recipe, dtype to compute in, None for the device's default).

    `given`, from the command line or a caller, wins over the recipe's own dtype. A recipe that names another dtype is
    returned with the given one, so that a manifest says what was computed.

        >>> resolve_dtype(Recipe("rtn", dtype="bfloat16"), None)[1]
        torch.bfloat16
    """
    if recipe.dtype is None:
        return recipe, given
    if given is None:
        return recipe, getattr(torch, recipe.dtype)
    return replace(recipe, dtype=name_of(given)), given


def check_shared(recipe: Recipe, noted: str | None, what: str) -> None:
    """Raise ObrError unless `what`, measured once for several recipes, was computed in the dtype that this one names.

    noted: the dtype that the artefact names. A recipe without a dtype takes any.
    """
    if recipe.dtype not in (None, noted):
        raise ObrError(
            f"{what} was computed in {noted or 'a dtype that it does not name'}, but the recipe's dtype is "
            f"{recipe.dtype}; compute it with --dtype {recipe.dtype}, or leave the recipe's dtype out."
        )
