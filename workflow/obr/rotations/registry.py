"""Rotations: equivalent transforms of a model that make it easier to quantise.

Each kind is a class that holds parameters and says what they do to a block; `obr.config.rotations` lists them.
What can be folded goes into a model's weights, the rest becomes online transforms; at 16 bits the model computes
what it did before. All kinds are drawn, saved, loaded and applied by the functions here.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from obr.config.rotations import DRAWN, ROTATIONS
from obr.errors import BROKEN_FILE, ObrError, first_line
from obr.models.architectures import Dimensions
from obr.models.hadamard import Kronecker
from obr.rotations import flatquant, ostquant, quarot, scaling, spinquant
from obr.rotations.base import Rotation
from obr.rotations.quarot import QuaRot
from obr.rotations.unrotated import Unrotated, instead_of
from obr.runtime.files import atomic_write


def _defines(module: ModuleType, kind: str) -> bool:
    """Whether the class of a kind is defined in a module."""
    return getattr(vars(module).get(ROTATIONS[kind].class_name), "__module__", None) == module.__name__


MODULES = (quarot, spinquant, flatquant, ostquant, scaling)
KINDS: dict[str, type[Rotation]] = {
    name: next(vars(module)[ROTATIONS[name].class_name] for module in MODULES if _defines(module, name))
    for name in DRAWN
}


def draw(kind: str, dimensions: Dimensions, seed: int = 0, **options: Any) -> Rotation:
    """A rotation of this kind with random valid parameters; one that changes nothing where the family takes none.

    options: of the kind quarot, `block` and `fused`; None and False count as not given.

    Raises:
        ObrError: an unknown kind, or options that it does not have or cannot have.
    """
    options = {name: value for name, value in options.items() if value is not None and value is not False}
    if options and kind != QuaRot.kind:
        given = ", ".join(f"{name}: {value}" for name, value in options.items())
        raise ObrError(f"Rotation {kind!r} has no option for {given}; use kind quarot, or leave it out.")
    drawn = _kind(kind)
    return instead_of(kind, dimensions) or drawn.draw(dimensions, seed, **options)


def _kind(kind: str) -> type[Rotation]:
    if kind == Unrotated.kind:
        return Unrotated
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
    with atomic_write(path) as partial:
        owned = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}  # none shared
        save_file(owned, partial, metadata={"rotation": json.dumps(header)})


def load(path: Path, dimensions: Dimensions) -> Rotation:
    """Read a rotation and check that it fits the model. One of a kind that the family does not take is left out.

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
    if kind is not Unrotated and (none := instead_of(rotation.kind, dimensions)) is not None:
        return none
    rotation.check(str(path))
    return rotation
