"""The order in which a method treats a layer's columns.

The error of a column is carried to those behind it, so the columns whose errors cost most come first: those with the
largest diagonal elements of the Hessian (act-order of the code of GPTQ, arXiv 2210.17323). Methods get the columns in
that order and know nothing of it.
"""

from collections.abc import Callable
from dataclasses import replace

from obr.config.methods import METHODS
from obr.methods.layer import Layer, Solution


def solve_in_order(function: Callable[[Layer], Solution], layer: Layer) -> Solution:
    """`function` of the layer with its columns in the recipe's order; those of the solution are in the layer's own.

    With groups of columns the scales are those of the layer's grid, which are found before any column is rounded.

    Example:
        >>> import torch
        >>> from obr.methods.restore import restore
        >>> weight, hessian = torch.eye(3) + 0.3, torch.diag(torch.tensor([1.0, 9.0, 4.0]))  # columns 1, 2, 0
        >>> restore(weight, hessian, "gptq", bits=4, column_order="hessian").codes.tolist()  # columns 0, 1, 2
        [[7, 2, 2], [2, 7, 2], [2, 2, 7]]
    """
    if layer.recipe.column_order == "given":
        return function(layer)
    hessian, order = layer.hessian.by_diagonal(_unit(layer))
    moved = replace(
        layer, weight=layer.weight.index_select(1, order), hessian=hessian, mask=layer.mask.index_select(1, order),
        grid=replace(layer.grid, order=order),
    )  # fmt: skip
    solution, back = function(moved), order.argsort()
    layer.hessian.damp = hessian.damp
    return Solution(
        solution.weight.index_select(1, back), solution.mask.index_select(1, back), replace(solution.grid, order=None)
    )


def _unit(layer: Layer) -> int:
    """Columns that stay side by side: the groups of a pattern in which the method chooses what to keep."""
    pattern = layer.pattern if METHODS[layer.recipe.method].finds_mask else None
    return pattern.group if pattern is not None else 1
