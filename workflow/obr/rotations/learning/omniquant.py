"""OmniQuant (Shao et al., arXiv 2308.13137): scales, shifts and weight clips, learned one block at a time."""

import torch
from torch import Tensor

from obr.config.rotations import LEARNERS
from obr.rotations.base import ENDS, Rotation
from obr.rotations.learning.blockwise import Place, descend, learn_blocks
from obr.rotations.learning.flatquant import START
from obr.rotations.learning.run import LearningRun
from obr.rotations.learning.smoothquant import fed_by_norms, smoothing_scales
from obr.rotations.ostquant import over_pairs, pairs_of
from obr.rotations.scaling import Scaling


def learn(task: LearningRun) -> tuple[Rotation, list[dict]]:
    """Learned equivalent transformation (LET) and learned weight clipping (LWC), AdamW without decay or schedule.

    LET scales what the norms put out, from SmoothQuant's start, and, from one, the values and the keys: these per
    KV head and, so that RoPE lets them through, equal within its pairs. Scales are learned as logarithms. LWC is
    learned if `quantise` has clip: learned. Quantised blocks read quantised states, their targets 16-bit ones.

    Own settings: epochs; batch (windows a step); lr (of LET), lr_clips; alpha (of the start); scales (whether
    there is any LET); shifts (whether it shifts too; the published runs on Llama do not).
    """
    settings = task.settings(
        lr=5e-3, lr_clips=1e-2, alpha=0.5, scales=True, shifts=False, **LEARNERS["omniquant"].defaults
    )

    def learn_block(place: Place) -> tuple[dict[str, Tensor], list[dict]]:
        logarithms = starting_scales(place, settings.alpha) if settings.scales else {}
        shifts = starting_shifts(task) if settings.shifts else {}
        clips = starting_clips(place)
        for leaves in (logarithms, shifts, clips):
            leaves |= {name: leaf.to(place.inputs.device).requires_grad_() for name, leaf in leaves.items()}

        def parameters() -> dict[str, Tensor]:
            return _scales(logarithms, task) | shifts | clips

        groups = [
            {"params": [*logarithms.values(), *shifts.values()], "lr": settings.lr},
            {"params": list(clips.values()), "lr": settings.lr_clips},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        rows = descend(place, Scaling, parameters, optimizer, settings.epochs, settings.batch)
        return parameters(), rows

    return learn_blocks(task, Scaling, learn_block, own_inputs=True)


def starting_scales(place: Place, alpha: float) -> dict[str, Tensor]:
    """Logarithms of the scales: (d,) of norms, (k, m) of values, (k or 1, m / 2) of the RoPE pairs of keys."""
    sizes = place.task.dimensions
    scales = {name: scale.log() for name, scale in smoothing_scales(place, alpha).items()}
    if sizes.latent:
        return scales
    key_heads = 1 if sizes.normed_heads else sizes.kv_heads  # a norm that all heads share has one gain
    return scales | {
        "o.scale": torch.zeros(sizes.kv_heads, sizes.head_dim),
        "key.scale": torch.zeros(key_heads, pairs_of(sizes)),
    }


def _scales(logarithms: dict[str, Tensor], task: LearningRun) -> dict[str, Tensor]:
    scales = {name: leaf.exp() for name, leaf in logarithms.items()}
    if "key.scale" in scales:
        scales["key.scale"] = over_pairs(scales["key.scale"], task.dimensions)
    return scales


def starting_shifts(task: LearningRun) -> dict[str, Tensor]:
    """Zeros: of what the norms put out (d,), and of the values (k, m)."""
    sizes = task.dimensions
    shifts = {f"{group}.shift": torch.zeros(sizes.hidden) for group in fed_by_norms(sizes)}
    return shifts if sizes.latent else shifts | {"o.shift": torch.zeros(sizes.kv_heads, sizes.head_dim)}


def starting_clips(place: Place) -> dict[str, Tensor]:
    """Logits (r, 1) of weight clips, by name, if the task asks for them."""
    recipe = place.task.recipe
    if recipe.clip != "learned" or recipe.bits == 16:
        return {}
    rows = place.rows()
    return {f"{role}.clip_{end}": torch.full((*rows[role], 1), START) for role in rows for end in ENDS}
