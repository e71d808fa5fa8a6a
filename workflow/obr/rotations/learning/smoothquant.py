"""SmoothQuant (Xiao et al., arXiv 2211.10438): scales from the largest inputs and weights; nothing is iterated."""

from torch import Tensor

from obr.models.architectures import Dimensions
from obr.rotations.base import Rotation
from obr.rotations.learning.blockwise import Place, largest_inputs, learn_blocks
from obr.rotations.learning.run import LearningRun
from obr.rotations.scaling import Scaling, smoothing_scale


def fed_by_norms(dimensions: Dimensions) -> tuple[str, str]:
    """The kinds of groups that read what a block's norms put out."""
    return dimensions.entry, "up_gate"


def learn(task: LearningRun) -> tuple[Rotation, list[dict]]:
    """s = max|X|^alpha / max|W|^(1 - alpha) of what norms put out; the curve has blocks' errors before and after.

    Own settings: alpha; the paper has 0.5, and more for models with larger outliers.
    """
    settings = task.settings(alpha=0.5)

    def learn_block(place: Place) -> tuple[dict[str, Tensor], list[dict]]:
        scales = smoothing_scales(place, settings.alpha)
        plain, smoothed = (Scaling(task.dimensions, place.parameters(p)) for p in ({}, scales))
        return scales, [place.look(plain, 0), place.look(smoothed, 1)]

    return learn_blocks(task, Scaling, learn_block)


def smoothing_scales(place: Place, alpha: float) -> dict[str, Tensor]:
    """{group.scale: (d,)} of what the block's norms feed; experts count, the router's 16-bit weights do not."""
    largest = largest_inputs(place, fed_by_norms(place.task.dimensions))
    return {
        f"{group}.scale": smoothing_scale(largest[group], list(place.weights(group).values()), alpha)
        for group in largest
    }
