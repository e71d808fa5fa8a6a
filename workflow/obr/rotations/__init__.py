"""Rotations: equivalent transforms of a model that make it easier to quantise.

Each kind is a class that holds parameters and says what they do to a block; KINDS lists them. What can be
folded goes into a model's weights, the rest becomes online transforms; at 16 bits the model computes what it
did before. All kinds are drawn, saved, loaded and applied by the functions here.
"""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from obr.errors import BROKEN_FILE, ObrError, first_line
from obr.files import whole
from obr.hadamard import Kronecker
from obr.layout import Dimensions
from obr.rotations.flatquant import FlatQuant
from obr.rotations.ostquant import OSTQuant
from obr.rotations.quarot import QuaRot
from obr.rotations.rotation import Rotation
from obr.rotations.scaling import Scaling
from obr.rotations.spinquant import SpinQuant

KINDS: dict[str, type[Rotation]] = {kind.kind: kind for kind in (QuaRot, SpinQuant, FlatQuant, OSTQuant, Scaling)}


def draw(kind: str, dimensions: Dimensions, seed: int = 0, **options) -> Rotation:
    """A rotation of this kind with random valid parameters.

    options: of the kind quarot, `block` and `fused`; None and False count as not given.

    Raises:
        ObrError: an unknown kind, or options that it does not have or cannot have.
    """
    options = {name: value for name, value in options.items() if value is not None and value is not False}
    if options and kind != QuaRot.kind:
        given = ", ".join(f"{name}: {value}" for name, value in options.items())
        raise ObrError(f"Rotation {kind!r} has no option for {given}; use kind quarot, or leave it out.")
    return _kind(kind).draw(dimensions, seed, **options)


def _kind(kind: str) -> type[Rotation]:
    if kind not in KINDS:
        raise ObrError(f"Rotation {kind!r} is not known; choose one of {', '.join(KINDS)}, or none.")
    return KINDS[kind]


def save(rotation: Rotation, path: Path) -> None:
    """Write a rotation: its parameters and the tensors of its transforms, and what they are in the metadata."""
    tensors, specs = dict(rotation.parameters), {}
    for name, transform in rotation.transforms.items():
        specs[name] = transform.spec()
        tensors |= {f"{name}.{k}": v for k, v in transform.state_dict().items()}
    header = {"kind": rotation.kind, "seed": rotation.seed, "transforms": specs, "options": rotation.options}
    with whole(path) as partial:
        owned = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}  # none shared
        save_file(owned, partial, metadata={"rotation": json.dumps(header)})


def load(path: Path, dimensions: Dimensions) -> Rotation:
    """Read a rotation and check that it fits the model.

    Raises:
        ObrError: the file is missing or not a rotation, or was made for other sizes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["rotation"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        kind, seed, specs = _kind(header["kind"]), header["seed"], header["transforms"]
        transforms = {name: Kronecker.from_spec(spec, tensors, f"{name}.") for name, spec in specs.items()}
    except (*BROKEN_FILE, AttributeError, IndexError) as error:
        why = first_line(error)
        raise ObrError(f"{path} is not a rotation of this project ({why}); delete and rebuild it.") from error
    own = {f"{name}.{part}" for name, transform in transforms.items() for part in transform.state_dict()}
    parameters = {name: tensor for name, tensor in tensors.items() if name not in own}
    rotation = kind(dimensions, parameters, transforms, seed, header.get("options"))
    rotation.check(str(path))
    return rotation


def rotate(model, kind: "str | Rotation", seed: int = 0, clip: bool = False):
    """Rotate a transformers model in place and return it; its logits stay what they were.

    Tied embeddings are untied and norms folded where the residual stream is rotated, linear layers become
    QuantLinear with online transforms where the kind has them. Folds are computed in float64.

    Args:
        kind: a name of KINDS, drawn from `seed`, or a rotation that `load` has read.
        clip: also shrink weights to the ranges that the rotation has learned for them, for `clip: learned`;
        this does change the logits.

    Raises:
        ObrError: `model_check` refuses the model, it is rotated or compressed already, or the rotation does not fit.
    """
    from obr.model_check import check_model, is_tied
    from obr.model_state import changing, check_before_rotation, refuse_plain_saving
    from obr.modules import ATTENTION, wrap_block

    layout = check_model(model)
    check_before_rotation(model)
    if not is_tied(model, layout):
        model.config.tie_word_embeddings = False
    rotation = draw(kind, Dimensions.of(model.config), seed) if isinstance(kind, str) else kind
    rotation.to(model.get_submodule(layout.embed).weight.device).clip = clip
    with changing(model, "obr.rotate"):
        rotation.fold_ends(model, layout)
        for index, block in enumerate(model.get_submodule(layout.blocks)):
            wrap_block(block, layout)
            rotation.fold_block(block, index, layout)
        model.set_attn_implementation(ATTENTION)
        model.obr_rotation = rotation
    refuse_plain_saving(model)
    return model
