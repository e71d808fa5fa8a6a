"""Allocation: bits and zeros chosen layer by layer, so that the predicted loss is least under one budget of bits.

The losses of every layer at every option come from `sensitivity`; choosing one for each layer is a knapsack problem,
solved by dynamic programming over the bits spent.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from obr.config.recipe import Allocation, Option, Recipe
from obr.errors import ObrError
from obr.runtime.files import read_json, write_json

STEPS = 500_000  # into which a budget is divided at most; where layers are coarser multiples, exactly into these


@dataclass(frozen=True)
class Choice:
    """What became of a budget: an option for each layer.

    losses: predicted, nats a token. uniform: what each option would cost if all layers took it, by its label:
    {"bits_per_weight", "loss"}.
    """

    allocation: Allocation
    layers: dict[tuple[int, str], Option]
    sizes: dict[tuple[int, str], int]
    stored: dict[tuple[int, str], int]
    losses: dict[tuple[int, str], float]
    uniform: dict[str, dict[str, float]]

    @property
    def bits_per_weight(self) -> float:
        """Mean over all layers, with masks and group scales."""
        return sum(self.stored.values()) / sum(self.sizes.values())

    def to_dict(self) -> dict:
        """Plain data: the artefact."""
        options = list(self.allocation.options)
        layers = [
            {
                "block": block, "layer": name, "option": options.index(option),
                "bits_per_weight": self.stored[block, name] / self.sizes[block, name],
                "loss": self.losses[block, name],
            }
            for (block, name), option in self.layers.items()
        ]  # fmt: skip
        return {
            "bits": self.allocation.bits,
            "scope": self.allocation.scope,
            "bits_per_weight": self.bits_per_weight,
            "total_bits": sum(self.stored.values()),
            "weights": sum(self.sizes.values()),
            "loss": sum(self.losses.values()),
            "uniform": self.uniform,
            "options": [asdict(option) for option in options],
            "layers": layers,
        }

    def summary(self) -> str:
        """Bits, predicted loss and the number of layers of each option, in a sentence."""
        counts = Counter(option.label for option in self.layers.values())
        rivals = {
            k: u["loss"] for k, u in self.uniform.items() if u["bits_per_weight"] <= self.allocation.bits + 1e-9
        }
        best = min(rivals, key=rivals.get, default=None)
        beside = f", the best of one kind ({best}) {rivals[best]:.4f}" if best else ""
        taken = "; ".join(f"{count} {label}" for label, count in counts.most_common())
        loss = sum(self.losses.values())
        return f"{self.bits_per_weight:.4f} bits a weight, predicted loss {loss:.4f}{beside}; layers: {taken}"


def choose(costs: np.ndarray, losses: np.ndarray, budget: int) -> np.ndarray:
    """For each of l layers the option (l,) with the least sum of losses whose costs sum to the budget at most.

    costs: (l, o) integers, bits. losses: (l, o). Exact where the costs' common divisor divides the budget into
    fewer than STEPS; otherwise costs are rounded up to steps, and what that leaves is spent greedily.

    Raises:
        ObrError: even the cheapest options cost more than the budget.

    Example:
        >>> costs, losses = np.array([[2, 4], [2, 4]]), np.array([[0.9, 0.1], [0.3, 0.2]])
        >>> choose(costs, losses, budget=6).tolist()  # the four bits go where they save most
        [1, 0]
    """
    if int(costs.min(1).sum()) > budget:
        raise ObrError(
            f"The smallest options take {int(costs.min(1).sum())} bits, the budget is {budget}; raise "
            "allocation.bits or add smaller options."
        )
    unit = max(int(np.gcd.reduce(costs.ravel())), -(-budget // STEPS))
    found = _spend(-(-costs // unit), losses, budget // unit)
    layers = range(len(costs))
    alike = [np.full(len(costs), option) for option in range(costs.shape[1])]
    candidates = [c for c in [found, costs.argmin(1), *alike] if c is not None and costs[layers, c].sum() <= budget]
    filled = [_fill(candidate, costs, losses, budget) for candidate in candidates]
    return min(filled, key=lambda chosen: losses[layers, chosen].sum())


def _spend(units: np.ndarray, losses: np.ndarray, room: int) -> np.ndarray | None:
    """The exact best (l,) in whole units (l, o); None if nothing fits."""
    least = np.zeros(room + 1)  # loss of the layers so far, by the units that they may take at most
    taken = np.zeros((len(units), room + 1), dtype=np.uint8)
    for layer, (own, lost) in enumerate(zip(units, losses, strict=True)):
        before, least = least, np.full(room + 1, np.inf)
        for option in np.flatnonzero(own <= room).astype(np.uint8):
            candidate = before[: room + 1 - own[option]] + lost[option]
            better = candidate < least[own[option] :]
            np.copyto(least[own[option] :], candidate, where=better)
            np.copyto(taken[layer, own[option] :], option, where=better)
    if np.isinf(least[room]):
        return None
    chosen = np.zeros(len(units), dtype=int)
    for layer in reversed(range(len(units))):
        chosen[layer] = taken[layer, room]
        room -= int(units[layer, chosen[layer]])
    return chosen


def _fill(chosen: np.ndarray, costs: np.ndarray, losses: np.ndarray, budget: int) -> np.ndarray:
    """Better options, the largest gains first, while they fit into what the choice (l,) leaves."""
    chosen, layers = chosen.copy(), np.arange(len(costs))
    while True:
        left = budget - costs[layers, chosen].sum()
        gains = losses[layers, chosen][:, None] - losses
        gains[costs - costs[layers, chosen][:, None] > left] = 0
        layer, option = np.unravel_index(gains.argmax(), gains.shape)
        if gains[layer, option] <= 0:
            return chosen
        chosen[layer] = option


def allocate(allocation: Allocation, layers: list[dict]) -> Choice:
    """An option for each layer, under one budget of bits or one for each block.

    layers: as `sensitivity` tells them: {"block", "layer", "rows", "columns", "losses"}, losses in the order of
    the options.

    Raises:
        ObrError: a budget is smaller than the cheapest options.
    """
    keys = [(layer["block"], layer["layer"]) for layer in layers]
    sizes = [layer["rows"] * layer["columns"] for layer in layers]
    costs = np.array([[o.stored_bits(row["rows"], row["columns"]) for o in allocation.options] for row in layers])
    losses = np.array([layer["losses"] for layer in layers], dtype=float)
    if not np.isfinite(losses).all():
        raise ObrError("A predicted loss is not finite; measure the sensitivity again.")
    found, every = np.zeros(len(layers), dtype=int), np.arange(len(layers))
    shares = np.array([block if allocation.scope == "block" else 0 for block, _ in keys])
    for share in np.unique(shares):
        own = every[shares == share]
        weights = sum(sizes[i] for i in own)
        found[own] = choose(costs[own], losses[own], math.floor(allocation.bits * weights + 1e-6))
    totals = zip(costs.sum(0).tolist(), losses.sum(0).tolist(), strict=True)
    return Choice(
        allocation,
        dict(zip(keys, [allocation.options[i] for i in found], strict=True)),
        dict(zip(keys, sizes, strict=True)),
        dict(zip(keys, costs[every, found].tolist(), strict=True)),
        dict(zip(keys, losses[every, found].tolist(), strict=True)),
        {
            option.label: {"bits_per_weight": bits / sum(sizes), "loss": loss}
            for option, (bits, loss) in zip(allocation.options, totals, strict=True)
        },
    )


def allocate_stage(recipe: Recipe, sensitivity: Path, out: Path) -> Choice:
    """The stage: from the measured losses of a model to the artefact `out`, for the blocks on which the recipe acts.

    Raises:
        ObrError: the losses are of other options, or the budget is too small.
    """
    if recipe.allocation is None:
        raise ObrError("The recipe has no allocation; give it bits and options.")
    measured = read_json(sensitivity)
    if [Option.parse(o, "option") for o in measured["options"]] != list(recipe.options):
        raise ObrError(f"{sensitivity} was measured at other options than the allocation has; measure it again.")
    chosen = recipe.chosen(measured["blocks"])
    if missing := set(chosen) - {layer["block"] for layer in measured["layers"]}:
        raise ObrError(
            f"{sensitivity} has no losses of block {min(missing)}, on which the recipe acts; measure it again."
        )
    choice = allocate(recipe.allocation, [layer for layer in measured["layers"] if layer["block"] in chosen])
    write_json(choice.to_dict() | {"dtype": measured.get("dtype")}, out)
    return choice


def chosen_options(measured: dict, what: str) -> dict[tuple[int, str], Option]:
    """{(block, layer): option} of an artefact's contents. Raises ObrError if they contradict each other."""
    try:
        found = [Option.parse(option, what) for option in measured["options"]]
        return {(row["block"], row["layer"]): found[row["option"]] for row in measured["layers"]}
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ObrError(f"{what} holds no allocation ({type(error).__name__} {error}); allocate again.") from error
