"""Rotations as other projects publish them, read into this project's kinds.

Names and shapes are those of the authors' own files. A reader takes every tensor that it finds or refuses the
file: nothing is left random or at its default because a name was spelled otherwise. Files are pickles; they are
opened as data, and one that would run code is refused.
"""

import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from obr.errors import ObrError, first_line
from obr.models.architectures import GROUP_OF, Dimensions
from obr.rotations.base import Rotation
from obr.rotations.flatquant import FlatQuant
from obr.rotations.ostquant import OSTQuant
from obr.rotations.scaling import Scaling, smoothing_scale
from obr.rotations.spinquant import SpinQuant, fixed_transforms

LAYER = r"model\.layers\.(\d+)\."
# The names that all these projects' Llamas, and so their files, give the layers.
LINEARS = {
    role: f"self_attn.{role}_proj" if group in ("qkv", "o") else f"mlp.{role}_proj"
    for role, group in GROUP_OF.items()
}
ROLES = {path: role for role, path in LINEARS.items()}
DUAL_ERROR = 1e-2  # largest |PᵀQ - I| of a stored matrix and its stored inverse transpose


def read(name: str, path: Path, dimensions: Dimensions, model: Path, entry: Mapping | None = None) -> Rotation:
    """The rotation in a published file, checked against the model's sizes.

    Args:
        name: of the format, a key of READERS. model: the model's folder. entry: of the config, with what the
        format leaves open: `alpha` (smoothquant), `online_query_key` (ostquant).

    Raises:
        ObrError: a file that is no such file, runs code, or belongs to another model.
    """
    rotation = READERS[name](_File(path, name, dimensions, model, dict(entry or {})))
    rotation.options["format"] = name
    rotation.check(str(path))
    return rotation


class _File:
    """A file's contents, and what is needed to understand them."""

    def __init__(self, path: Path, name: str, dimensions: Dimensions, model: Path, entry: dict):
        self.path, self.dimensions, self.model, self.entry = path, dimensions, model, entry
        self.what = f"{path} as a file of {name}"
        self.contents = _contents(path)

    def tensors(self, contents: object) -> dict[str, Tensor]:
        """`contents`, if it is a dictionary of floating-point tensors by name."""
        if not isinstance(contents, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) and v.is_floating_point() for k, v in contents.items()
        ):
            raise ObrError(f"{self.what} is no dictionary of tensors by name; it is a file of another format.")
        return {name: tensor.detach() for name, tensor in contents.items()}

    def layers(self) -> dict[int, dict[str, Tensor]]:
        """The contents, if they are {layer number: {name: tensor}}."""
        if not isinstance(self.contents, dict) or not all(isinstance(key, int) for key in self.contents):
            raise ObrError(f"{self.what} has no dictionary by layer number in it; it is a file of another format.")
        return {index: self.tensors(layer) for index, layer in self.contents.items()}

    def renamed(self, tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
        """Tensors under new names; names: regular expression -> replacement. All must match one."""
        found = {}
        for old, tensor in tensors.items():
            match = next((m for pattern in names if (m := re.fullmatch(pattern, old))), None)
            if match is None:
                raise ObrError(f"{self.what} has the unexpected key {old!r}; it is of another format or version.")
            found[match.expand(names[match.re.pattern])] = tensor
        return found

    def by_head(self, tensor: Tensor, name: str) -> Tensor:
        """A vector of all KV heads' channels as (k, m)."""
        k, m = self.dimensions.kv_heads, self.dimensions.head_dim
        if tensor.numel() != k * m:
            raise ObrError(
                f"{self.what}: {name} has {tensor.numel()} channels, the model has {k} KV heads of {m}; "
                "it was made for another model, or for one whose heads are not grouped."
            )
        return tensor.reshape(k, m)


def _contents(path: Path):
    """What torch.save wrote, tensors on the CPU and no code run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)|reduce for unrecognized function (\S+)", str(error))
        if wanted is None:
            raise ObrError(f"{path} is not a file that torch.save wrote; fetch it again.") from error
        raise ObrError(
            f"{path} is refused: it is not data alone but asks for {wanted[1] or wanted[2]}, which could run code "
            "when it is opened; if you trust it, save its tensors again as a plain dictionary."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, struct.error) as error:
        raise ObrError(
            f"{path} is not a file that torch.save wrote ({first_line(error)}); fetch it again."
        ) from error


def _spinquant(file: _File) -> SpinQuant:
    """`R.bin`: {"R1": (d, d), "model.layers.{i}.self_attn.R2": (m, m)}."""
    names = {"R1": "R1", LAYER + r"self_attn\.R2": r"blocks.\1.R2"}
    parameters = file.renamed(file.tensors(file.contents), names)
    return SpinQuant(file.dimensions, parameters, fixed_transforms(file.dimensions))


def _ostquant(file: _File) -> OSTQuant:
    """`model.bin`: R_res.weight (d, d) and, of each layer's R_S_modules, S_*.weight and R_ov.weight.{j} (m, m)."""
    module = LAYER + r"R_S_modules\."
    names = {
        r"R_res\.weight": "R_res",
        module + r"(S_up_down|S_qk|S_ov|S_norm_qkv|S_norm_upgate)\.weight": r"blocks.\1.\2",
        module + r"R_ov\.weight\.(\d+)": r"blocks.\1.R_ov.\2",
    }
    parameters = file.renamed(file.tensors(file.contents), names)
    heads = range(file.dimensions.kv_heads)
    for name in list(parameters):
        stem, _, last = name.rpartition(".")
        if last in ("S_qk", "S_ov"):
            parameters[name] = file.by_head(parameters[name], name)
        elif stem.endswith("R_ov") and last == "0":
            group = [f"{stem}.{j}" for j in heads]
            if not all(one in parameters and parameters[one].shape == parameters[name].shape for one in group):
                raise ObrError(f"{file.what}: {stem} has no equal matrices for {len(heads)} KV heads; see its model.")
            parameters[stem] = torch.stack([parameters.pop(one) for one in group])
    transforms = fixed_transforms(file.dimensions)
    if not file.entry.get("online_query_key"):
        del transforms["query_key"]
    return OSTQuant(file.dimensions, parameters, transforms)


def flatquant_names() -> dict[str, str]:
    """{name of a tensor below a layer in FlatQuant's files: name of a block's parameter here}.

    A stored inverse transpose is called as its matrix, with ".dual".
    """
    groups = {"self_attn.ln_trans": "qkv", "mlp.up_gate_trans": "up_gate", "mlp.down_trans": "down"}
    heads = {"self_attn.o_trans": "o.heads", "self_attn.kcache_trans": "keys", "self_attn.vcache_trans": "value"}
    names = {}
    for module, group in groups.items():
        for side in ("left", "right"):
            names[f"{module}.matrix_{side}"] = f"{group}.{side}"
            names[f"{module}.matrix_{side}_inv"] = f"{group}.{side}.dual"
        names[f"{module}.diag_scale"] = f"{group}.scale"
    for module, name in heads.items():
        names |= {f"{module}.matrix": name, f"{module}.matrix_inv_t": f"{name}.dual"}
    for end, bound in (("low", "min"), ("high", "max")):
        for role, path in LINEARS.items():
            names[f"{path}.clip_factor_w_{bound}"] = f"{role}.clip_{end}"
            names[f"{path}.act_quantizer.clip_factor_a_{bound}"] = f"{role}.range_{end}"
        for role in ("keys", "values"):
            names[f"self_attn.{role[0]}_cache_quantizer.clip_factor_a_{bound}"] = f"{role}.range_{end}"
    return names


def _flatquant(file: _File) -> FlatQuant:
    """`flat_matrices.pth`: {layer: {name: tensor}}; stored inverses are inverse transposes, and must fit."""
    names = {re.escape(old): new for old, new in flatquant_names().items()}
    parameters = {}
    for index, layer in file.layers().items():
        tensors = file.renamed(layer, names)
        for name in [name for name in tensors if name.endswith(".dual")]:
            check_dual(
                tensors.get(name.removesuffix(".dual")), tensors.pop(name), f"{file.what}: layer {index} {name}"
            )
        parameters |= {f"blocks.{index}.{name}": tensor for name, tensor in tensors.items()}
    return FlatQuant(file.dimensions, parameters)


def check_dual(matrix: Tensor | None, dual: Tensor, what: str) -> None:
    """Raise ObrError unless `dual` (n, n) is the inverse transpose of `matrix`, to DUAL_ERROR."""
    error = torch.inf
    if matrix is not None and matrix.ndim == 2 and matrix.shape == dual.shape:
        error = float((matrix.double().mT @ dual.double() - torch.eye(len(dual), dtype=torch.float64)).abs().max())
    if not error < DUAL_ERROR:
        raise ObrError(f"{what} is not the inverse transpose of its matrix (off by {error:.1e}); the file is broken.")


def _smoothquant(file: _File) -> Scaling:
    """`act_scales/<model>.pt`: {layer: (n,)}, largest |input| of each channel of each linear layer.

    The scales follow from these and the model's weights (`smoothing_scale`) with the entry's alpha, 0.5 unless
    given. Layers that no norm feeds are in the file and not used.
    """
    from obr.models.tensor_files import TensorFiles

    known = {f"model.layers.{i}.{path}" for i in range(file.dimensions.blocks) for path in ROLES} | {"lm_head"}
    tensors, files = file.tensors(file.contents), TensorFiles(file.model)
    if unexpected := sorted(set(tensors) - known):
        raise ObrError(f"{file.what} has the unexpected key {unexpected[0]!r}; it was made for another model.")
    parameters, alpha = {}, float(file.entry.get("alpha", 0.5))
    for index in range(file.dimensions.blocks):
        for group, roles in (("qkv", ("q", "k", "v")), ("up_gate", ("up", "gate"))):
            layers = [f"model.layers.{index}.{LINEARS[role]}" for role in roles]
            if layers[0] not in tensors:
                raise ObrError(f"{file.what} lacks {layers[0]!r}; it was made for another model.")
            weights = files.read({layer: f"{layer}.weight" for layer in layers})
            largest = tensors[layers[0]]
            if largest.shape != (file.dimensions.hidden,):
                raise ObrError(
                    f"{file.what}: {layers[0]} has shape {tuple(largest.shape)}, the model {file.dimensions.hidden} "
                    "channels; it was made for another model."
                )
            scale = smoothing_scale(largest, list(weights.values()), alpha)
            parameters[f"blocks.{index}.{group}.scale"] = scale
    return Scaling(file.dimensions, parameters, options={"alpha": alpha})


def _awq(file: _File) -> Scaling:
    """AWQ's search: {"scale": [(before, (layers), (n,))], "clip": [(layer, (r, groups, 1))]}."""
    if not isinstance(file.contents, dict) or set(file.contents) != {"scale", "clip"}:
        raise ObrError(f"{file.what} has no lists 'scale' and 'clip'; it is a file of another format.")
    before = {
        r"input_layernorm": "qkv", r"post_attention_layernorm": "up_gate",
        r"self_attn\.v_proj": "o", r"mlp\.up_proj": "down",
    }  # fmt: skip
    scales = {name: scale for name, _, scale in file.contents["scale"]}
    names = {LAYER + old: rf"blocks.\1.{group}.scale" for old, group in before.items()}
    parameters = file.renamed(file.tensors(scales), names)
    for name in parameters:
        if name.endswith(".o.scale"):
            parameters[name] = file.by_head(parameters[name], name)
    names = {LAYER + re.escape(path): rf"blocks.\1.{role}.limit" for path, role in ROLES.items()}
    limits = file.renamed(file.tensors(dict(file.contents["clip"])), names)
    return Scaling(file.dimensions, parameters | {name: limit.flatten(1) for name, limit in limits.items()})


def _omniquant(file: _File) -> Scaling:
    """`omni_parameters.pth`: {layer: {*_smooth_scale, *_smooth_shift, <linear>.weight_quantizer.*bound_factor}}."""
    names = {"qkt_smooth_scale": "key.scale"}
    for old, group in (("qkv", "qkv"), ("fc1", "up_gate"), ("out", "o")):
        names |= {f"{old}_smooth_{part}": f"{group}.{part}" for part in ("scale", "shift")}
    for role, path in LINEARS.items():
        for old, end in (("low", "low"), ("up", "high")):
            names[re.escape(f"{path}.weight_quantizer.{old}bound_factor")] = f"{role}.clip_{end}"
    rows, parameters = file.dimensions.rows(), {}
    for index, layer in file.layers().items():
        for name, tensor in file.renamed(layer, names).items():
            role, _, part = name.partition(".")
            if name in ("key.scale", "o.scale", "o.shift"):
                tensor = file.by_head(tensor, f"layer {index} {name}")
            elif part.startswith("clip"):
                if tensor.numel() % rows[role]:
                    raise ObrError(f"{file.what}: layer {index} {name} has no whole groups in {rows[role]} rows.")
                tensor = tensor.reshape(rows[role], -1)
            parameters[f"blocks.{index}.{name}"] = tensor
    return Scaling(file.dimensions, parameters)


READERS = {
    "spinquant": _spinquant,
    "flatquant": _flatquant,
    "ostquant": _ostquant,
    "smoothquant": _smoothquant,
    "awq": _awq,
    "omniquant": _omniquant,
}
