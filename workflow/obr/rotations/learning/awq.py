"""AWQ (Lin et al., arXiv 2306.00978): scales and weight limits, each the best of a few by the error they leave."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.methods.grid import Grid
from obr.models.architectures import GROUP_OF
from obr.rotations import fold
from obr.rotations.base import Rotation
from obr.rotations.learning.blockwise import Place, learn_blocks, products
from obr.rotations.learning.run import LearningRun
from obr.rotations.scaling import Scaling

STEPS = 20  # ratios 0, 1/20 … 19/20
SHRINKS = 10  # 1, 19/20 … 11/20 of a row's largest weight
NOT_CLIPPED = ("q", "k")  # whose product attention is too sensitive to


def learn(task: LearningRun) -> tuple[Rotation, list[dict]]:
    """Scales mean|X|^ratio of every group, the ratio with the least error at the output of what the group is in.

    Values are scaled only where every query head has its own. Rows' weights are limited if `quantise` has clip:
    learned. Only weights are quantised as it is searched, whatever else `quantise` says.

    Own settings: samples (windows that the search for ratios looks at), tokens (of all windows, evenly spread,
    that the search for limits looks at).
    """
    settings = task.settings(samples=16, tokens=512)
    if task.recipe.bits == 16:
        raise ObrError("AWQ searches scales for quantised weights; set bits in learn.quantise.")

    def learn_block(place: Place) -> tuple[dict[str, Tensor], list[dict]]:
        means, samples = statistics(place, settings.tokens)
        parameters = {}
        for group in groups(task):
            errors = ratio_errors(place, group, means[group], settings.samples)
            scale = scale_of(means[group], min(errors, key=errors.get))
            if group == "o":
                scale = scale.view(task.dimensions.kv_heads, -1)
            parameters[f"{group}.scale"] = scale
        if task.recipe.clip == "learned":
            parameters |= limits(place, parameters, samples)
        before, after = (Scaling(task.dimensions, place.parameters(p)) for p in ({}, parameters))
        return parameters, [place.look(before, 0), place.look(after, 1)]

    return learn_blocks(task, Scaling, learn_block)


def groups(task: LearningRun) -> tuple[str, ...]:
    """Groups whose inputs are scaled: o only where v has as many heads as there are queries."""
    whole = task.dimensions.kv_heads == task.dimensions.heads
    return ("qkv", "o", "up_gate", "down") if whole else ("qkv", "up_gate", "down")


def statistics(place: Place, tokens: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By group: mean|X| (n,) of each input channel, and inputs (t, n) of about so many tokens of all windows."""
    sums: dict[str, Tensor] = {}
    samples: dict[str, list[Tensor]] = {group: [] for group in place.layout.groups}
    seen, windows = place.inputs.shape[0], len(place.learned_from)
    step = max(1, seen * windows // tokens)

    def observer(group: str) -> Callable[[Tensor], None]:
        def observe(x: Tensor) -> None:
            flat = x.float().flatten(0, -2)
            sums[group] = sums.get(group, 0) + flat.abs().sum(0)
            samples[group].append(flat[::step].clone())

        return observe

    place.observe({group: observer(group) for group in samples})
    means = {group: total / (seen * windows) for group, total in sums.items()}
    return means, {group: torch.cat(parts) for group, parts in samples.items()}


def scale_of(mean: Tensor, ratio: float) -> Tensor:
    """s (n,) = mean|X|^ratio, divided by the root of its largest times its smallest: weights are multiplied by it."""
    scale = mean.pow(ratio).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


@torch.no_grad()
def ratio_errors(place: Place, group: str, mean: Tensor, samples: int) -> dict[float, float]:
    """{ratio: mean squared error} at the output of attention, MLP, or the layer itself, for windows 0 … samples."""
    module, calls = _calls(place, group, min(samples, len(place.learned_from)))
    inspected, recipe = place.block.get_submodule(module), place.task.recipe
    names = {path: f"{path}.weight".removeprefix(f"{module}.") for path in place.layout.groups[group]}
    found: dict[float, Tensor] = {}
    with products(place.task):
        wanted = [_first(inspected(*args, **kwargs)) for args, kwargs in calls]
        for step in range(STEPS):
            scale = scale_of(mean, step / STEPS)
            new = {names[path]: rounded(w * scale, recipe) / scale for path, w in place.weights(group).items()}
            outputs = (_first(functional_call(inspected, new, args, kwargs)) for args, kwargs in calls)
            errors = [(out - want).float().square().mean() for out, want in zip(outputs, wanted, strict=True)]
            found[step / STEPS] = sum(errors)
    return {ratio: error / len(calls) for ratio, error in zip(found, torch.stack([*found.values()]).tolist())}


def _first(out) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def rounded(weight: Tensor, recipe: Recipe) -> Tensor:
    """Weight (r, n) on its rows' grids; limits that are to be learned come later, over minmax ones."""
    return Grid.fit(weight, recipe.bits, "mse" if recipe.clip == "mse" else "minmax").round(weight)


@torch.no_grad()
def _calls(place: Place, group: str, windows: int) -> tuple[str, list[tuple[tuple, dict]]]:
    """Path of the module whose output is looked at, and what it is called with for each window."""
    first = place.layout.groups[group][0]
    module = {"qkv": place.layout.attention, "up_gate": first.rpartition(".")[0]}.get(group, first)
    calls: list[tuple[tuple, dict]] = []
    hook = place.block.get_submodule(module).register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        with products(place.task):
            for window in range(windows):
                place.block(place.inputs[window], **place.arguments)
    finally:
        hook.remove()
    return module, calls


@torch.no_grad()
def limits(place: Place, scales: dict[str, Tensor], samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """{role.limit: (r, 1)}: of each row's shrunk maxima the one with the least error on the sampled inputs.

    scales: those found, which weights and inputs carry already. samples: plain inputs (t, n) by group.
    """
    rotation = Scaling(place.task.dimensions, place.parameters(scales))
    folded = fold.fold_block(place.plain, rotation.changes(place.index), place.layout, dtype=torch.float32)
    found = {}
    for role, path in place.layout.roles.items():
        if role in NOT_CLIPPED:
            continue
        group = GROUP_OF[role]
        scale = scales.get(f"{group}.scale")
        inputs = samples[group] if scale is None else samples[group] / scale.flatten()
        found[f"{role}.limit"] = best_limit(folded[f"{path}.weight"], inputs, place.task.recipe)
    return found


def best_limit(weight: Tensor, inputs: Tensor, recipe: Recipe) -> Tensor:
    """(r, 1): the largest |w| of each row of (r, n), shrunk so that its error on inputs (t, n) is least."""
    largest = weight.abs().amax(1, keepdim=True)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for step in range(SHRINKS):
        limit = largest * (1 - step / STEPS)
        clipped = weight.clamp(-limit, limit)
        error = ((rounded(clipped, recipe) - weight) @ inputs.T).square().sum(1, keepdim=True)
        better = error < least
        best, least = torch.where(better, limit, best), torch.where(better, error, least)
    return best
