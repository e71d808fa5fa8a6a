"""The tensors of a model folder: which file holds each of them, in what shape and dtype, and reading them by name.

`model.safetensors.index.json` decides: a tensor lies in the file that its `weight_map` names. Without an index the
tensors are those of `model.safetensors`. No other file is ever read, whatever lies beside them.
"""

import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from obr.errors import BROKEN_FILE, ObrError, first_line

if TYPE_CHECKING:
    import torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# How the header of a safetensors file names the dtypes in which weights may be stored, and torch's names of them.
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
HEADER_DTYPES = STORED | {"F64": "float64"}

# Files beside the weights that change what these mean, and the remedy.
ADAPTER = "merge the adapter first (peft: `merge_and_unload`) and save the merged model"
QUANTISED = "choose the full-precision original"
MEANINGFUL_FILES = {
    "adapter_config.json": ADAPTER, "adapter_model.safetensors": ADAPTER, "adapter_model.bin": ADAPTER,
    "quantize_config.json": QUANTISED, "quantization_config.json": QUANTISED, "quant_config.json": QUANTISED,
    "hf_quant_config.json": QUANTISED,
}  # fmt: skip


def check_names(names: set[str], what: str) -> None:
    """Raise ObrError at a file beside the weights that changes what they mean. names: of a model's files."""
    for name in sorted(names & set(MEANINGFUL_FILES)):
        raise ObrError(f"{what} has the file {name} beside its weights: {MEANINGFUL_FILES[name]}.")


def weight_map(folder: Path, what: str) -> dict[str, str] | None:
    """{tensor: file name} of the folder's index; None without an index. what: the model's name in messages.

    Raises:
        ObrError: the index is no such mapping, or it names a file outside its folder or one that is no safetensors.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        return None
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not mapping or not all(isinstance(name, str) for pair in mapping.items() for name in pair):
            raise ValueError("weight_map is no mapping of tensors to files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ObrError(f"{INDEX} of {what} does not list the weights: fetch the model again.") from error
    for name in sorted(set(mapping.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ObrError(
                f"{INDEX} of {what} names {name!r}, which is no safetensors file in the model's own folder: "
                "correct the index, or choose another model."
            )
    return mapping


def weight_files(folder: Path, what: str) -> list[str]:
    """Names of the files that hold the weights: those that the index names, or `model.safetensors` alone."""
    mapping = weight_map(folder, what)
    return [SINGLE] if mapping is None else sorted(set(mapping.values()))


class TensorFiles:
    """The tensors of a model folder, of which headers are read at once and contents one at a time by name.

    files: {tensor: path}. headers: {tensor: (shape, dtype as the header spells it)}. entry: the file by which
    transformers finds the same tensors. places: {tensor: (name in its file, the part of it that it is, or None)} of
    those that `rename` or `split` has given another name.

    Args:
        directory: the folder. what: its name in messages.
        names: of the files to read, instead of those that hold a model's weights.

    Raises:
        ObrError: a file is missing or cut short; the index and the files contradict each other.
    """

    def __init__(self, directory: Path, what: str | None = None, names: list[str] | None = None):
        self.directory, self.what = Path(directory), what or str(directory)
        mapping = weight_map(self.directory, self.what) if names is None else None
        if names is None and mapping is None and not (self.directory / SINGLE).is_file():
            raise ObrError(
                f"{self.what} has neither {INDEX} nor {SINGLE}: fetch the model again, or convert its weights "
                "to safetensors."
            )
        self.entry = SINGLE if mapping is None else INDEX
        self.files: dict[str, Path] = {}
        self.headers: dict[str, tuple[list[int], str]] = {}
        self.places: dict[str, tuple[str, tuple | None]] = {}
        for name in names or ([SINGLE] if mapping is None else sorted(set(mapping.values()))):
            for tensor, header in self._headers(self.directory / name):
                if mapping is not None and mapping.get(tensor) != name:
                    self._contradicts(tensor, name, mapping)
                self.files[tensor], self.headers[tensor] = self.directory / name, header
        if lacking := sorted(set(mapping or ()) - set(self.files)):
            raise ObrError(
                f"{INDEX} of {self.what} says that {lacking[0]} is in {mapping[lacking[0]]}, which has no such "
                f"tensor ({len(lacking)} in all): fetch index and weights from the same revision."
            )

    def _contradicts(self, tensor: str, file: str, mapping: dict[str, str]) -> None:
        other = mapping.get(tensor)
        place = "is not in the index" if other is None else f"is in {other} by the index"
        raise ObrError(
            f"{file} of {self.what} holds {tensor}, which {place}: fetch index and weights from the same revision."
        )

    def _headers(self, path: Path) -> Iterator[tuple[str, tuple[list[int], str]]]:
        with self._open(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                view = file.get_slice(name)
                yield name, (view.get_shape(), view.get_dtype())

    def _open(self, path: Path):
        try:
            return safe_open(path, framework="pt")
        except BROKEN_FILE as error:
            why = first_line(error)
            raise ObrError(f"{path.name} of {self.what} is missing or cut short ({why}): fetch it again.") from error

    def rename(self, stored: str, name: str) -> None:
        """Call a tensor otherwise than its file does. Raises ObrError if there is one of that name."""
        self._check_free(stored, name)
        self.files[name], self.headers[name] = self.files.pop(stored), self.headers.pop(stored)
        self.places[name] = (self.places.pop(stored, (stored, None))[0], None)

    def split(self, stored: str, parts: dict[str, tuple]) -> None:
        """Put parts in the place of a tensor. parts: {name: (number of a matrix, rows)}, or (rows,) of a tensor that
        is a matrix or vector itself; rows as a slice. Raises ObrError if there is a tensor of a part's name."""
        for name in parts:
            self._check_free(stored, name)
        path, (shape, dtype), (own, _) = (
            self.files.pop(stored), self.headers.pop(stored), self.places.pop(stored, (stored, None))
        )  # fmt: skip
        for name, place in parts.items():
            axis = len(place) - 1
            rows = len(range(*place[-1].indices(shape[axis])))
            self.files[name], self.headers[name] = path, ([rows, *shape[axis + 1 :]], dtype)
            self.places[name] = (own, place)

    def _check_free(self, stored: str, name: str) -> None:
        if name != stored and name in self.files:
            raise ObrError(
                f"{self.what} has both {stored} and {name}, of which one would be left out: save the model again."
            )

    def read(self, names: dict[str, str], *to: "torch.device | torch.dtype | str") -> dict[str, "torch.Tensor"]:
        """{key: tensor} for {key: name of a tensor}; to: device and dtype, or one of them.

        A tensor moves as it is stored, and is converted where it arrives. A file is opened for every tensor: what has
        been read stays mapped, and counts as resident, as long as the file is open.

        Raises:
            ObrError: a tensor is not there.
        """
        tensors = {}
        for key, name in names.items():
            if name not in self.files:
                raise ObrError(f"{self.what} has no tensor {name!r}; it is not a whole model.")
            stored, part = self.places.get(name, (name, None))
            with self._open(self.files[name]) as file:
                tensor = file.get_tensor(stored) if part is None else file.get_slice(stored)[part]
                for place in to:
                    tensor = tensor.to(place)
                tensors[key] = tensor
        return tensors

    def bytes_of(self, name: str) -> int:
        """Of a tensor in its file."""
        shape, dtype = self.headers[name]
        return prod(shape) * int(re.search(r"\d+|$", dtype)[0] or 8) // 8

    def equal(self, one: str, other: str, rows: int = 1024) -> bool:
        """Whether two stored matrices hold the same numbers; `rows` of each are in memory at a time."""
        shape = self.headers[one][0]
        if shape != self.headers[other][0]:
            return False
        with self._open(self.files[one]) as first, self._open(self.files[other]) as second:
            views = first.get_slice(one), second.get_slice(other)
            for start in range(0, shape[0], rows):
                a, b = (view[start : start + rows].double() for view in views)
                if not bool((a == b).all()):
                    return False
        return True
