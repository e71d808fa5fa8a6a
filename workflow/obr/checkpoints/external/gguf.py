"""GGUF files of llama.cpp: every tensor dequantised by the package gguf, under the names that transformers has."""

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from obr.checkpoints.external.layouts import Layout, Stored
from obr.errors import ObrError, first_line
from obr.models.tensor_files import TensorFiles

if TYPE_CHECKING:
    from gguf import GGUFReader

# Architecture of llama.cpp -> whether its rotary embedding takes neighbours instead of halves.
NEIGHBOURS = {"llama": True, "qwen2": False, "qwen3": False}
TURNED = re.compile(r"\.(q|k)_proj\.(weight|bias)$")  # their rows are stored in the order of that embedding


class GgufFiles(TensorFiles):
    """The tensors of a GGUF file, as `TensorFiles` has those of a folder; read as float32.

    names: that the model of the file has in transformers.

    Raises:
        ObrError: an architecture that is not read, or tensors that the model does not have.
    """

    def __init__(self, path: Path, names: list[str], config):
        import gguf

        self.directory, self.what, self.entry = Path(path).parent, str(path), Path(path).name
        self.path, self.config = Path(path), config
        kind = self.reader.fields["general.architecture"].contents()
        if kind not in NEIGHBOURS:
            raise ObrError(f"{path} is of architecture {kind!r}; GGUF files of {', '.join(NEIGHBOURS)} are read.")
        architecture = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
        of_file = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        stored = {tensor.name: tensor for tensor in self.reader.tensors}
        self.neighbours, self.tensors, self.headers, self.files = NEIGHBOURS[kind], {}, {}, {}
        self.places: dict = {}
        for name in names:
            tensor = stored.pop(of_file.get_name(name, try_suffixes=(".weight", ".bias")), None)
            if tensor is not None:
                self.tensors[name], self.files[name] = tensor, self.path
                self.headers[name] = [int(size) for size in reversed(tensor.shape)], "F32"
        if stored:
            raise ObrError(f"{path} has the tensor {min(stored)}, which {config.model_type} models do not have.")

    @cached_property
    def reader(self) -> "GGUFReader":
        """gguf's, of the file. Raises ObrError if it cannot be read."""
        import gguf

        try:
            return gguf.GGUFReader(self.path)
        except Exception as error:  # of numpy's views of a broken file
            raise ObrError(f"{self.path} is no whole GGUF file ({first_line(error)}); fetch it again.") from error

    def bytes_of(self, name: str) -> int:
        """Bytes of a tensor as it is stored."""
        return int(self.tensors[name].n_bytes)

    def read(self, names: dict[str, str], *to: torch.device | torch.dtype | str) -> dict[str, Tensor]:
        """As of `TensorFiles`."""
        found = {}
        for key, name in names.items():
            if name not in self.tensors:
                raise ObrError(f"{self.what} has no tensor for {name!r}; it is not a whole model.")
            tensor = self._dequantised(name)
            for place in to:
                tensor = tensor.to(place)
            found[key] = tensor
        return found

    def _dequantised(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        stored, shape = self.tensors[name], self.headers[name][0]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise ObrError(f"{self.what}: {name} is {stored.tensor_type.name}, which is not read.") from error
        tensor = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)
        if self.neighbours and (part := TURNED.search(name)):
            heads = self.config.num_attention_heads if part[1] == "q" else self.config.num_key_value_heads
            tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        return tensor

    def equal(self, one: str, other: str, rows: int = 1024) -> bool:
        """Whether two tensors have the same values once dequantised."""
        found = self.read({"one": one, "other": other})
        return torch.equal(found["one"], found["other"])


class Gguf(Layout):
    """The linear layers of a GGUF file: of each, the type of its blocks."""

    name, ends = "GGUF", ("weight",)
    files: GgufFiles

    def layers(self) -> dict[str, list[str]]:
        """{quantised layer: [name of its tensor]}; layers in floats are left out."""
        return {layer: [f"{layer}.weight"] for layer in self.shapes if self._type(layer)}

    def stored(self, layer: str) -> Stored:
        import gguf

        kind = self._type(layer)
        count, size = gguf.GGML_QUANT_SIZES[kind]
        return Stored(int(re.search(r"\d", kind.name)[0]), None, 8 * size / count)

    def weight(self, layer: str) -> Tensor:
        """The weight (r, n), dequantised, float32."""
        return self.files.read({"weight": f"{layer}.weight"})["weight"]

    def _type(self, layer: str):
        """Of a quantised layer's blocks; None for floats."""
        tensor = self.files.tensors.get(f"{layer}.weight")
        return None if tensor is None or tensor.tensor_type.name in ("F32", "F16", "BF16") else tensor.tensor_type
