"""Rotations applied to models: in memory, or to blocks as they are read."""

from pathlib import Path
from typing import TYPE_CHECKING

from obr.errors import ObrError
from obr.models.architectures import Dimensions
from obr.models.blocks import StreamedBlocks
from obr.models.loading import config_of
from obr.rotations import registry, unrotated
from obr.rotations.base import Rotation
from obr.rotations.registry import draw

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def rotate(model: "PreTrainedModel", kind: "str | Rotation", seed: int = 0, clip: bool = False) -> "PreTrainedModel":
    """Rotate a transformers model in place and return it; its logits stay what they were.

    A model whose family does not take the kind stays as it is; stderr and `model.obr_rotation.about()` say why.

    Tied embeddings are untied and norms folded where the residual stream is rotated, linear layers become
    QuantLinear with online transforms where the kind has them. Folds are computed in float64.

    Args:
        kind: a name of KINDS, drawn from `seed`, or a rotation that `load` has read.
        clip: also shrink weights to the ranges that the rotation has learned for them, for `clip: learned`;
        this does change the logits.

    Raises:
        ObrError: `obr.models.check` refuses the model, it is rotated or compressed already, or the rotation does
            not fit.

    Example:
        >>> model = obr.rotate(obr.load_model("path/to/model"), "quarot", seed=0)
        >>> type(model.model.layers[0].mlp.down_proj).__name__
        'QuantLinear'
    """
    from obr.models.check.memory import check_model, is_tied
    from obr.models.layers import ATTENTION, wrap_block
    from obr.models.state import changing, check_before_rotation, refuse_plain_saving

    layout = check_model(model)
    check_before_rotation(model)
    if not is_tied(model, layout):
        model.config.tie_word_embeddings = False
    rotation = draw(kind, Dimensions.of(model.config), seed) if isinstance(kind, str) else kind
    rotation = unrotated.instead_of(rotation.kind, Dimensions.of(model.config)) or rotation
    rotation.to(model.get_submodule(layout.embed).weight.device).clip = clip and rotation.kind != "none"
    with changing(model, "obr.rotate"):
        rotation.fold_ends(model, layout)
        for index, block in enumerate(model.get_submodule(layout.blocks)):
            wrap_block(block, layout)
            rotation.fold_block(block, index, layout)
        model.set_attn_implementation(ATTENTION)
        model.obr_rotation = rotation
    refuse_plain_saving(model)
    return model


def open_blocks(
    model: Path, rotation: Path | None, dtype: "torch.dtype | None" = None, device: str | None = None
) -> StreamedBlocks:
    """A downloaded model, rotated by the file `rotation` unless it is None."""
    loaded = registry.load(rotation, Dimensions.of(config_of(model))) if rotation else None
    return StreamedBlocks(model, loaded, dtype, device)


def clip_weights(blocks: StreamedBlocks) -> None:
    """Have weights shrunk, as blocks are loaded, to the ranges that the rotation has learned for them.

    Raises:
        ObrError: there is no rotation, or it has learned none.
    """
    if blocks.rotation is None or not blocks.rotation.has_clips():
        raise ObrError("clip 'learned' needs a rotation with learned weight clipping; use mse or minmax.")
    blocks.rotation.clip = True
