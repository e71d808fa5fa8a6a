"""AWQ (Lin et al., arXiv 2306.00978): scales and weight limits, each the best of a few by the error they leave."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.methods.grid import Grid
from obr.models.architectures import KIND_OF, kind_of, prefix_of
from obr.rotations import fold
from obr.rotations.base import Rotation
from obr.rotations.learning.blockwise import Place, learn_blocks, products, stacked
from obr.rotations.learning.run import LearningRun
from obr.rotations.scaling import Scaling

STEPS = 20  # ratios 0, 1/20 … 19/20
SHRINKS = 10  # 1, 19/20 … 11/20 of a row's largest weight
Calls = tuple[str, list[tuple[tuple, dict]]]  # path of a module, and the arguments of its calls
CLIPPED = ("v", "o", "up", "gate", "down")  # attention is too sensitive to the product of queries and keys


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
        scales = {}
        for together in groups(place):
            called = calls(place, together, settings.samples)
            for group in together:
                if called[group][1]:
                    errors = ratio_errors(place, group, means[group], *called.pop(group))
                    scales[group] = scale_of(means[group], min(errors, key=errors.get))
        if "o" in scales:
            scales["o"] = scales["o"].view(task.dimensions.kv_heads, -1)
        ones = torch.ones(task.dimensions.intermediate, device=place.inputs.device)
        parameters = {f"{group}.scale": s for group, s in stacked(scales, task, lambda _: ones).items()}
        if task.recipe.clip == "learned":
            parameters |= limits(place, parameters, samples)
        before, after = (Scaling(task.dimensions, place.parameters(p)) for p in ({}, parameters))
        return parameters, [place.look(before, 0), place.look(after, 1)]

    return learn_blocks(task, Scaling, learn_block)


def groups(place: Place) -> list[list[str]]:
    """Groups whose inputs are scaled, those together that one pass looks at.

    o only where v has as many heads as there are queries.
    """
    sizes = place.task.dimensions
    whole = sizes.kv_heads == sizes.heads and not sizes.latent
    return [[sizes.entry], *([["o"]] if whole else []), ["up_gate"], place.downs()]


def statistics(place: Place, tokens: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By group: mean|X| (n,) of each input channel, and inputs (t, n) of about so many tokens of all windows.

    Experts without tokens are left out; of the others' tokens the same part is kept as of all.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)
    observed = (place.task.dimensions.entry, "o", "up_gate", *place.downs())
    samples: dict[str, list[Tensor]] = {group: [] for group in observed}
    step = max(1, place.inputs.shape[0] * len(place.learned_from) // tokens)

    def observer(group: str) -> Callable[[Tensor], None]:
        def observe(x: Tensor) -> None:
            flat = x.float().flatten(0, -2)
            sums[group] = sums.get(group, 0) + flat.abs().sum(0)
            counts[group] += len(flat)
            samples[group].append(flat[::step].clone())

        return observe

    place.observe({group: observer(group) for group in samples})
    means = {group: total / counts[group] for group, total in sums.items()}
    return means, {group: torch.cat(samples[group]) for group in sums}


def scale_of(mean: Tensor, ratio: float) -> Tensor:
    """s (n,) = mean|X|^ratio, divided by the root of its largest times its smallest: weights are multiplied by it."""
    scale = mean.pow(ratio).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


@torch.no_grad()
def ratio_errors(
    place: Place, group: str, mean: Tensor, module: str, calls: list[tuple[tuple, dict]]
) -> dict[float, float]:
    """{ratio: mean squared error} at the output of the module at this path in the block, called as `calls` has it."""
    inspected, recipe = place.block.get_submodule(module), place.task.recipe
    names = {path: f"{path}.weight".removeprefix(f"{module}.") for path in place.weights(group)}
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
def calls(place: Place, groups: list[str], samples: int) -> dict[str, Calls]:
    """By group: path of the module whose output is looked at, and what it is called with in windows 0 … samples.

    That is attention, the MLP with all its experts, or the layer itself. Experts without tokens are not called.
    """
    found: dict[str, Calls] = {group: (_inspected(place, group), []) for group in groups}
    hooks = [
        place.block.get_submodule(module).register_forward_pre_hook(
            lambda _, args, kwargs, taken=taken: taken.append((args, kwargs)), with_kwargs=True
        )
        for module, taken in found.values()
    ]
    try:
        with products(place.task):
            for window in range(min(samples, len(place.learned_from))):
                place.block(place.inputs[window], **place.arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _inspected(place: Place, group: str) -> str:
    layout = place.layout
    if group == place.task.dimensions.entry:
        return layout.attention
    if group == "up_gate":  # of a block with experts, all of them, shared ones and the router
        first = layout.experts or layout.groups[group][0]
        return first.rpartition(".")[0]
    return layout.groups[group][0]


@torch.no_grad()
def limits(place: Place, scales: dict[str, Tensor], samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """{role.limit: (r, 1)}: of each row's shrunk maxima the one with the least error on the sampled inputs.

    scales: those found, which weights and inputs carry already. samples: plain inputs (t, n) by group. Weights of
    experts without tokens are left as they are.
    """
    rotation, found = Scaling(place.task.dimensions, place.parameters(scales)), {}
    changes = rotation.changes(place.index)
    folded = fold.fold_block(place.plain, changes, place.layout, dtype=torch.float32)
    for role, path in place.layout.roles.items():
        if kind_of(role) not in CLIPPED:
            continue
        kind, weight = KIND_OF[kind_of(role)], folded[f"{path}.weight"]
        group = f"{prefix_of(role)}{kind}" if kind == "down" else kind
        scale, inputs = rotation.parameter(place.index, f"{group}.scale"), samples.get(group)
        if inputs is not None and scale is not None:
            inputs = inputs / scale.flatten()
        if inputs is not None:
            found[role] = best_limit(weight, inputs, place.task.recipe)

    def largest(role: str) -> Tensor:
        return folded[f"{place.layout.roles[role]}.weight"].abs().amax(1, keepdim=True)

    return {f"{role}.limit": limit for role, limit in stacked(found, place.task, largest).items()}


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
