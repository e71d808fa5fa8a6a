"""FlatQuant (Sun et al., arXiv 2410.09426): affine transforms, scales and clips that flatten one block at a time."""

from math import cos, pi

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from obr.config.recipe import Recipe
from obr.config.rotations import LEARNERS
from obr.errors import ObrError
from obr.models.architectures import without_number
from obr.models.hadamard import hadamard, random_orthogonal, random_signs
from obr.rotations.base import ENDS, Rotation
from obr.rotations.flatquant import FlatQuant, factor_pair, paired
from obr.rotations.learning.blockwise import Place, descend, largest_inputs, learn_blocks, stacked
from obr.rotations.learning.run import LearningRun
from obr.rotations.scaling import smoothing_scale

START = 4.0  # logit of clips: 0.982 of the range
LAST = 1e-3  # of the learning rate, at the end of the cosine


def learn(task: LearningRun) -> tuple[Rotation, list[dict]]:
    """Every transform that the kind has; scales and singular values as logarithms, so that none becomes zero.

    Weights are clipped by learned factors if `quantise` has clip: learned, and activations, keys and values where
    theirs is; keys are transformed if they or the queries are quantised. All blocks read 16-bit states.

    Own settings: epochs; batch (windows a step); lr (of transforms and scales) and lr_clips, both cosine to a
    thousandth, AdamW; alpha (of the scales' start max|W|^(1 - alpha) / max|X|^alpha); scales (whether there are
    any); parametrisation, "svd" (U diag(s) Vᵀ, U and V orthogonal by the Cayley map) or "direct" (any matrix);
    start, "orthogonal" (random, as the paper's) or "hadamard" (with random signs). The published runs took 15
    epochs of 128 windows of 2,048 tokens, 4 a step. A model of 135 million parameters learns in half an hour of
    two CPU cores, or less, by 4 epochs of 14 windows of 512 tokens, 2 a step, with lr 0.03 and lr_clips 0.15: few
    steps need to be long.
    """
    settings = task.settings(
        lr=5e-3, lr_clips=5e-2, alpha=0.3, scales=True, parametrisation="svd", start="orthogonal",
        **LEARNERS["flatquant"].defaults,
    )  # fmt: skip
    for key, choices in (("parametrisation", ("svd", "direct")), ("start", ("orthogonal", "hadamard"))):
        if getattr(settings, key) not in choices:
            raise ObrError(f"learn.{key} is {getattr(settings, key)!r}; choose one of {', '.join(choices)}.")

    def learn_block(place: Place) -> tuple[dict[str, Tensor], list[dict]]:
        generator = torch.Generator().manual_seed(task.seed * 10_007 + place.index)
        factor = Svd if settings.parametrisation == "svd" else Direct
        transforms = {n: factor(starting(size, settings.start, generator)) for n, size in sizes(place).items()}
        for transform in transforms.values():
            transform.to(place.inputs.device)
        scales = starting_scales(place, settings.alpha) if settings.scales else {}
        clips = starting_clips(place)
        for leaf in (*scales.values(), *clips.values()):
            leaf.data = leaf.to(place.inputs.device)
            leaf.requires_grad_()

        def parameters() -> dict[str, Tensor]:
            matrices = {name: transform() for name, transform in transforms.items()}
            return matrices | {name: scale.exp() for name, scale in scales.items()} | clips

        matrices = [p for transform in transforms.values() for p in transform.parameters()]
        groups = [{"params": [*matrices, *scales.values()], "lr": settings.lr}]
        if clips:
            groups.append({"params": list(clips.values()), "lr": settings.lr_clips})
        optimizer = torch.optim.AdamW(groups)
        rows = descend(place, FlatQuant, parameters, optimizer, settings.epochs, settings.batch, cosine)
        return parameters(), rows

    return learn_blocks(task, FlatQuant, learn_block)


def cosine(done: float) -> float:
    """Factor of a learning rate when a part of the steps is done: from one to LAST."""
    return LAST + (1 - LAST) * 0.5 * (1 + cos(pi * done))


class Direct(nn.Module):
    """A matrix (n, n), learned as it is."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.matrix = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        return self.matrix


class Svd(nn.Module):
    """U diag(s) Vᵀ (n, n), U and V orthogonal whatever is learned; to begin with, `start`, ones and the identity."""

    def __init__(self, start: Tensor):
        super().__init__()
        n = len(start)
        self.left = _orthogonal(start)
        self.right = _orthogonal(torch.eye(n, dtype=start.dtype))
        self.logarithms = nn.Parameter(torch.zeros(n, dtype=start.dtype))

    def forward(self) -> Tensor:
        return self.left.weight * self.logarithms.exp() @ self.right.weight.mT


def _orthogonal(start: Tensor) -> nn.Module:
    """A module whose weight (n, n) is orthogonal, and `start` to begin with: start times the Cayley map of zero."""
    holder = nn.Module()
    holder.weight = nn.Parameter(start.clone())
    return orthogonal(holder, "weight", orthogonal_map="cayley", use_trivialization=True)


def sizes(place: Place) -> dict[str, int]:
    """Sizes of the matrices that are learned in a block, by name."""
    dimensions, recipe, found = place.task.dimensions, place.task.recipe, {}
    own = {without_number(group) for group in place.layout.groups}
    for group, columns in paired(dimensions).items():
        if group == "up_gate" or group in own:
            found[f"{group}.left"], found[f"{group}.right"] = factor_pair(columns)
    found["o.heads"] = dimensions.heads
    if not dimensions.latent:
        found["value"] = dimensions.head_dim
        if recipe.keys.bits < 16 or recipe.queries.bits < 16:
            found["keys"] = dimensions.head_dim
    return found


def starting(n: int, start: str, generator: torch.Generator) -> Tensor:
    """Where a matrix (n, n) begins: float32, orthogonal."""
    if start == "orthogonal":
        return random_orthogonal(n, generator).float()
    matrix = hadamard(n, generator).matrix()
    return (matrix * random_signs(n, generator)[:, None]).float()


def starting_scales(place: Place, alpha: float) -> dict[str, Tensor]:
    """Logarithms of c = max|W|^(1 - alpha) / max|X|^alpha, by the names of the scales.

    Those of experts without tokens are 0.
    """
    groups = (place.task.dimensions.entry, "up_gate", *place.downs())
    scales = {
        group: -smoothing_scale(largest, list(place.weights(group).values()), alpha).log()
        for group, largest in largest_inputs(place, groups).items()
    }
    ones = torch.zeros(place.task.dimensions.intermediate, device=place.inputs.device)
    found = stacked(scales, place.task, lambda _: ones)
    return {f"{group}.scale": found[group] for group in map(without_number, groups) if group in found}


def starting_clips(place: Place) -> dict[str, Tensor]:
    """Logits of the clips that the task asks for, by name: of weights, and of what is quantised as it comes."""
    recipe: Recipe = place.task.recipe
    rows, clips = place.rows(), {}
    if recipe.clip == "learned" and recipe.bits < 16:
        clips |= {f"{role}.clip_{end}": torch.full((*r, 1), START) for role, r in rows.items() for end in ENDS}
    inputs = {role: recipe.o_inputs if role == "o" and recipe.o_inputs else recipe.activations for role in rows}
    cached = {} if place.layout.latent else {"keys": recipe.keys, "values": recipe.values}
    for role, settings in (inputs | cached).items():
        if settings.bits < 16 and settings.clip_ratio == "learned":
            shape = (*rows.get(role, (1,))[:-1], 1)
            clips |= {f"{role}.range_{end}": torch.full(shape, START) for end in ENDS}
    return clips
