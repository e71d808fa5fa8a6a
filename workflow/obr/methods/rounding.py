"""Rounding to nearest without compensation: RTN, and with a mask Wanda and magnitude pruning."""

from obr.methods.layer import Layer, Solution


def round_to_nearest(layer: Layer) -> Solution:
    """Prune by the mask, and round each weight to the nearest value on its row's grid."""
    return Solution(layer.grid.round(layer.weight) * layer.mask, layer.mask, layer.grid)
