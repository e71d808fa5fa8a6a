"""The layouts of compressed-tensors: packed integers, plain integers and floats of 8 bits, sparse ones by bitmask.

A weight is (code - zero point) * scale, with a scale for the tensor, a row, a group of columns, or a block.
"""

import re
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from obr.checkpoints.external.layouts import FLOATS, Layout, Stored, spread
from obr.checkpoints.external.words import unpack_words, words_for
from obr.config.quantizer import SIXTEEN_BITS, QuantizerSettings
from obr.errors import ObrError

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
SPARSE = ("dense", "sparse-bitmask", "sparse-24-bitmask")
FORMS = ("weight_packed", "compressed", "weight")  # ends of the tensors that hold a layer's codes, one of them each
BY_COLUMN_GROUP = ("group", "dynamic", True)  # actorder: columns of a group do not follow each other
CODES = ("I8", "F8_E4M3")


class CompressedTensors(Layout):
    """A layer is `weight_packed`, or `weight` with a scale, or its kept values (`compressed`) and a bitmask."""

    name = "compressed-tensors"
    ends = (
        "weight_packed", "weight_scale", "compressed", "bitmask", "weight_zero_point", "weight_shape", "weight_g_idx",
        "row_offsets", "shape", "weight", "input_scale", "output_scale",
    )  # fmt: skip
    dtypes: ClassVar = {
        "weight_packed": ("I32",), "weight": CODES, "compressed": (*FLOATS, *CODES), "bitmask": ("U8",),
        "weight_scale": FLOATS, "weight_zero_point": ("I32", *CODES),
    }  # fmt: skip

    def __init__(self, files, settings, shapes):
        super().__init__(files, settings, shapes)
        sparsity = settings.get("sparsity_config") or {}
        groups = (settings.get("config_groups") or {}).values()
        forms = {settings.get("format") or "dense", *(group.get("format") for group in groups)} - {None}
        for kind, found, known in (
            ("format", forms, FORMATS),
            ("sparse format", {sparsity.get("format") or "dense"}, SPARSE),
        ):
            if odd := sorted(found - set(known)):
                raise ObrError(f"{files.what} has compressed-tensors' {kind} {odd[0]}; read are {', '.join(known)}.")
        if settings.get("transform_config"):
            raise ObrError(f"{files.what} has transforms at run time (transform_config), which are not read.")
        self.groups, self.ignored = list(groups), settings.get("ignore") or []
        self.may_be_plain = not self.groups
        self.activations, self.left_out = _activations(self.groups, settings.get("kv_cache_scheme"))

    def markers(self) -> tuple[str, ...]:
        return self.ends[:3]

    def layers(self) -> dict[str, list[str]]:
        """As of `Layout`; the settings must say of the same layers that they are quantised."""
        found = super().layers()
        for layer, names in found.items():
            if len(forms := [end for end in FORMS if f"{layer}.{end}" in names]) != 1:
                raise self.unfit(layer, f"its codes are stored as {' and '.join(forms) or 'nothing'}")
            if f"{layer}.compressed" not in names and f"{layer}.weight_scale" not in names:
                raise self.unfit(layer, "no weight_scale")
            for end, key in (("input_scale", "input_activations"), ("output_scale", "output_activations")):
                if f"{layer}.{end}" in names and not any(group.get(key) for group in self.groups):
                    raise self.unfit(layer, f"{end}, though no group of quantization_config has {key}")
        for layer in self.shapes:
            ignored = any(_closeness(target, name) for target in self.ignored for name in self._names(layer))
            if layer in found and ignored:
                raise self.unfit(layer, "it is quantised, though quantization_config ignores it")
            if layer not in found and f"{layer}.weight" in self.files.headers and not ignored and self._group(layer):
                raise self.unfit(layer, "it is not quantised, though a group of quantization_config names it")
        return found

    def _names(self, layer: str) -> set[str]:
        """A layer's name, and the one that the files have."""
        ends = (end for end in self.ends if f"{layer}.{end}" in self.files.headers)
        places = ((self.files.places.get(f"{layer}.{end}", (f"{layer}.{end}", None))[0], end) for end in ends)
        return {layer, *(name.removesuffix(f".{end}") for name, end in places)}

    def stored(self, layer: str) -> Stored:
        weights, (rows, columns) = self._scheme(layer), self.shapes[layer]
        scales = self.files.headers.get(f"{layer}.weight_scale", ([1], ""))[0]
        grouped = len(scales) == 2 and scales[1] > 1
        group = weights.get("group_size") if weights and weights.get("strategy") == "group" else None
        if grouped and group is None and weights.get("strategy") != "block":
            raise self.unfit(layer, f"scales {scales}, but no group_size")
        ends = ("weight_packed", "weight", "compressed", "bitmask")
        ends += ("weight_scale", "weight_zero_point") if grouped else ()
        bits = int(weights["num_bits"]) if weights else 16
        return Stored(bits, group if grouped else None, 8 * self.bytes_of(layer, ends) / (rows * columns))

    def weight(self, layer: str) -> Tensor:
        rows, columns = self.shapes[layer]
        scheme = self._scheme(layer) or {}
        scale, zero, order = self.read(layer, "weight_scale", "weight_zero_point", "weight_g_idx")
        codes = self._codes(layer, scheme)
        if list(codes.shape) != [rows, columns]:
            raise self.unfit(layer, f"{tuple(codes.shape)} codes for {rows} x {columns} weights")
        if scale is None:
            return codes.float()
        if zero is None and scheme.get("symmetric") is False:
            raise self.unfit(layer, "no zero points, though quantization_config says symmetric: false")
        if zero is not None and zero.dtype == torch.int32:  # packed along the rows
            zero = unpack_words(zero.T, scheme["num_bits"], rows).T.float() - 2 ** (scheme["num_bits"] - 1)
        weight = codes.float()
        if zero is not None and scheme.get("symmetric") is not False and bool(zero.float().any()):
            raise self.unfit(layer, "zero points, though quantization_config says symmetric: true")
        if zero is not None:
            weight = weight - self._spread(layer, zero, scheme, order)
        return weight * self._spread(layer, scale, scheme, order)

    def _codes(self, layer: str, scheme: dict) -> Tensor:
        """(r, n), as stored: integers, or floats of 8 or 16 bits."""
        packed, plain, kept, mask, stated, offsets, shape = self.read(
            layer, "weight_packed", "weight", "compressed", "bitmask", "weight_shape", "row_offsets", "shape"
        )
        if plain is not None:
            return plain
        rows, columns = self.shapes[layer]
        if kept is not None:
            if mask is None:
                raise self.unfit(layer, "no bitmask")
            if shape is not None and shape.tolist() != [rows, columns]:
                raise self.unfit(layer, f"shape {shape.tolist()}, by config.json {[rows, columns]}")
            return _placed(kept, mask, rows, columns, offsets)
        if stated is not None and stated.tolist() != [rows, columns]:
            raise self.unfit(layer, f"weight_shape {stated.tolist()}, by config.json {[rows, columns]}")
        bits, words = scheme["num_bits"], packed.shape[1]
        if packed.dtype != torch.int32 or words not in (words_for(columns, bits), words_for(columns, bits, True)):
            raise self.unfit(layer, f"{words} words of {packed.dtype} for {columns} columns of {bits} bits")
        codes = unpack_words(packed, bits, columns, whole=words != words_for(columns, bits))
        return codes.to(torch.int16) - 2 ** (bits - 1)

    def _spread(self, layer: str, scale: Tensor, scheme: dict, order: Tensor | None) -> Tensor:
        """A scale or zero point of any strategy as what broadcasts to the weight (r, n)."""
        rows, columns = self.shapes[layer]
        scale = scale.float()
        if scale.numel() == 1:
            return scale.reshape(1, 1)
        scale = scale.reshape(len(scale), -1)
        order = self.order_of(layer, order, scale.shape[1], scheme.get("actorder") in BY_COLUMN_GROUP)
        if scheme.get("strategy") == "block":
            tall, wide = scheme["block_structure"]
            if list(scale.shape) != [-(-rows // tall), -(-columns // wide)]:
                raise self.unfit(layer, f"{tuple(scale.shape)} scales for blocks of {tall} x {wide} weights")
            return scale.repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        if len(scale) != rows or (scale.shape[1] > 1 and scale.shape[1] != -(-columns // scheme["group_size"])):
            raise self.unfit(layer, f"{tuple(scale.shape)} scales for {rows} x {columns} weights")
        return spread(scale, rows, columns, scheme.get("group_size"), order)

    def _scheme(self, layer: str) -> dict | None:
        """The settings of a layer's weights; None where it is pruned alone.

        Raises:
            ObrError: no group of the configuration names the layer, or weights of a type that is not read.
        """
        group = self._group(layer)
        if group is None:
            if f"{layer}.compressed" in self.files.headers:
                return None
            raise self.unfit(layer, "no group of quantization_config names it")
        weights = group.get("weights") or {}
        integers = weights.get("type", "int") == "int" and weights.get("num_bits") in range(2, 9)
        floats = weights.get("type") == "float" and weights.get("num_bits") == 8
        if not (integers or floats):
            kind = f"{weights.get('type')} of {weights.get('num_bits')} bits"
            raise ObrError(f"{self.files.what}: weights of {layer} are {kind}, which are not read.")
        return weights

    def _group(self, layer: str) -> dict | None:
        """The group of the settings that names a layer most closely."""
        closest = {}
        for group in self.groups:
            for target in group.get("targets") or []:
                closest.setdefault(max(_closeness(target, name) for name in self._names(layer)), group)
        closest.pop(0, None)
        return closest[max(closest)] if closest else None


def _closeness(target: str, layer: str) -> int:
    """How closely a target names a linear layer: 3 by its name, 2 by a regular expression behind "re:", 1 by the
    class, 0 not at all."""
    if target.startswith("re:"):
        return 2 if re.match(target[3:], layer) else 0
    return {layer: 3, "Linear": 1}.get(target, 0)


def _placed(kept: Tensor, mask: Tensor, rows: int, columns: int, offsets: Tensor | None) -> Tensor:
    """(r, n): kept values, row by row, at the places of a bitmask (r, n / 8), zeros elsewhere.

    offsets: (r,) the number of values in front of each row, where the file says it.
    """
    places = np.unpackbits(mask.numpy(), axis=1, count=columns, bitorder="little").astype(bool)
    if int(places.sum()) != kept.numel() or len(places) != rows:
        raise ObrError(f"A bitmask has {int(places.sum())} places for {kept.numel()} values; fetch the model again.")
    counts = places.sum(1)
    if offsets is not None and offsets.flatten().tolist() != (counts.cumsum() - counts).tolist():
        raise ObrError("A bitmask has other rows than row_offsets says; fetch the model again.")
    eight = kept.element_size() == 1
    found = torch.zeros(rows, columns, dtype=torch.int8 if eight else kept.dtype)
    found[torch.from_numpy(places)] = kept.flatten().view(torch.int8) if eight else kept.flatten()
    return found.view(kept.dtype)


def _activations(groups: list[dict], cache: dict | None) -> tuple[QuantizerSettings, str | None]:
    """How inputs are quantised: settings of this package, or a sentence's part on what it does not simulate."""
    found = {_spelled(group.get("input_activations")): group.get("input_activations") for group in groups}
    if cache:
        return SIXTEEN_BITS, f"the KV cache ({_spelled(cache)})"
    if any(group.get("output_activations") for group in groups):
        return SIXTEEN_BITS, "outputs of layers"
    if len(found) > 1:
        return SIXTEEN_BITS, f"inputs of some layers ({', '.join(map(str, found))})"
    (about,) = found.values() or [None]
    if not about:
        return SIXTEEN_BITS, None
    if about.get("type", "int") == "int" and about.get("strategy") == "token" and about.get("dynamic") is True:
        return QuantizerSettings(bits=int(about["num_bits"]), symmetric=bool(about.get("symmetric", True))), None
    return SIXTEEN_BITS, f"inputs of layers ({_spelled(about)})"


def _spelled(about: dict | None) -> str | None:
    if not about:
        return None
    when = "dynamic" if about.get("dynamic") else "static"
    return f"{about.get('type', 'int')} of {about.get('num_bits')} bits, {when}, per {about.get('strategy')}"
