"""Rotations: equivalent transforms of a model that make it easier to quantise.

Each kind is a module with `draw(dimensions, seed) -> Rotation`; KINDS lists them. A Rotation folds what can be
folded into a model's weights and attaches the rest as online transforms; at 16 bits the model computes what it
did before.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from obr.errors import BROKEN_FILE, ObrError
from obr.files import whole
from obr.hadamard import Kronecker
from obr.layout import Dimensions
from obr.rotations import quarot
from obr.rotations.fold import Rotation

# Kinds that are made from a seed alone: (Dimensions, seed) -> Rotation.
KINDS = {"quarot": quarot.draw}


def draw(kind: str, dimensions: Dimensions, seed: int = 0) -> Rotation:
    """A rotation of this kind for a model of these sizes. Raises ObrError for an unknown kind."""
    if kind not in KINDS:
        raise ObrError(f"Rotation {kind!r} is not known; choose one of {', '.join(KINDS)}, or none.")
    return KINDS[kind](dimensions, seed)


def save(rotation: Rotation, path: Path) -> None:
    """Write a rotation: the tensors of its transforms, and what they are in the metadata."""
    tensors, specs = {}, {}
    for name, transform in rotation.transforms.items():
        specs[name] = transform.spec()
        tensors |= {f"{name}.{k}": v.contiguous() for k, v in transform.state_dict().items()}
    header = {"kind": rotation.kind, "seed": rotation.seed, "transforms": specs}
    with whole(path) as partial:
        save_file(tensors, partial, metadata={"rotation": json.dumps(header)})


def load(path: Path, dimensions: Dimensions) -> Rotation:
    """Read a rotation and check that it fits the model.

    Raises:
        ObrError: the file is missing or not a rotation, or was made for other sizes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["rotation"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except BROKEN_FILE as error:
        raise ObrError(f"{path} is not a rotation of this project ({error}); delete and rebuild it.") from error
    transforms = {name: Kronecker.from_spec(spec, tensors, f"{name}.") for name, spec in header["transforms"].items()}
    rotation = Rotation(header["kind"], header["seed"], transforms)
    rotation.check(dimensions, str(path))
    return rotation


@torch.no_grad()
def rotate(model, kind: str, seed: int = 0):
    """Rotate a transformers model in place and return it; its logits stay what they were.

    Tied embeddings are untied, norms folded, linear layers become QuantLinear with online transforms where
    the kind has them. Folds are computed in float64.
    """
    from obr.layout import layout_of
    from obr.modules import ATTENTION, wrap_block

    layout = layout_of(model.config)
    rotation = draw(kind, Dimensions.of(model.config), seed)
    rotation.fold_ends(model, layout)
    for block in model.get_submodule(layout.blocks):
        wrap_block(block, layout)
        rotation.fold_block(block, layout)
    model.set_attn_implementation(ATTENTION)
    model.obr_rotation = rotation
    return model
