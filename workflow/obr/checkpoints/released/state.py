"""The tensors of a downloaded checkpoint by name, from one file or from shards."""

import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from obr.errors import BROKEN_FILE, ObrError, first_line
from obr.models.tensor_files import HEADER_DTYPES
from obr.runtime.files import read_json

# A single file, or its shards; safetensors are preferred to pickles.
SINGLE = ("model.safetensors", "pytorch_model.bin")
SHARD = re.compile(r"(?P<stem>model|pytorch_model)-(?P<number>\d+)-of-(?P<count>\d+)\.(?P<end>safetensors|bin)")
READABLE = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Header:
    """File, shape and type of a tensor. dtype: None if it is not floating-point."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None


class StateDict:
    """The tensors of a folder, by name. Only headers are read until a tensor is asked for.

    folder: with model.safetensors, pytorch_model.bin, or the shards of one of the two. An index names the shards;
    without one the numbers in their names must be complete.

    Raises:
        ObrError: no such file, a missing shard, an index that the shards contradict, one name in two shards, or a
            file that is no state dict of plain tensors.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.paths, listed = _files(self.folder)
        self.headers: dict[str, Header] = {}
        self.pickled: dict[str, Tensor] = {}
        for path in self.paths:
            found = _headers(path) if path.suffix == ".safetensors" else self._unpickled(path)
            if twice := sorted(found.keys() & self.headers):
                raise ObrError(
                    f"{folder}: {twice[0]} is in {self.headers[twice[0]].path.name} and in {path.name}; "
                    "delete the file that is out of date."
                )
            self.headers |= found
        if not self.headers:
            raise ObrError(f"{self.paths[0]} holds no tensors; download it again.")
        for name, path in listed.items():
            if name not in self.headers or self.headers[name].path != path:
                raise ObrError(f"{folder}: the index lists {name} in {path.name}, which does not hold it.")

    def _unpickled(self, path: Path) -> dict[str, Header]:
        tensors = _pickle(path)
        self.pickled |= tensors
        known = {name: t.dtype if t.is_floating_point() else None for name, t in tensors.items()}
        return {name: Header(path, tuple(t.shape), known[name]) for name, t in tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor of that name, which is there."""
        return self.headers[name].shape

    def dtype(self, names: Iterable[str]) -> torch.dtype:
        """The narrowest floating-point type that holds all of these tensors without rounding.

        Raises:
            ObrError: one is of no type that a released weight may have.
        """
        found = None
        for name in names:
            own = self.headers[name].dtype
            if own not in READABLE:
                kind = str(own or "integers").removeprefix("torch.")
                raise ObrError(
                    f"{self.folder}: {name} holds {kind}, not float16, bfloat16 or float32; only fake-quantised "
                    "checkpoints are read."
                )
            found = own if found is None else torch.promote_types(found, own)
        return found or torch.float32

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored. Raises ObrError if it has NaN or infinite values or is not floating-point."""
        self.dtype([name])
        if name in self.pickled:
            tensor = self.pickled[name]
        else:
            with _open(self.headers[name].path) as file:
                tensor = file.get_tensor(name)
        if not bool(tensor.isfinite().all()):
            raise ObrError(f"{self.folder}: {name} has NaN or infinite values; download it again.")
        return tensor

    def stamps(self) -> dict[str, list[int]]:
        """{file name: [bytes, time of the last change in ns]} of the files that are read."""
        return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in self.paths}


def _files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """(the files to read, {tensor: its file} as an index lists them)."""
    for name in SINGLE:
        single, index = folder / name, folder / f"{name}.index.json"
        if single.is_file():
            return [single], {}
        if index.is_file():
            return _listed(index)
        stem, _, end = name.partition(".")
        matches = [m for path in folder.glob(f"{stem}-*.{end}") if (m := SHARD.fullmatch(path.name))]
        if matches:
            return _numbered(folder, matches), {}
    raise ObrError(
        f"{folder} holds neither pytorch_model.bin nor model.safetensors, nor shards of one; download it again."
    )


def _listed(index: Path) -> tuple[list[Path], dict[str, Path]]:
    """The shards that an index names."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise ObrError(f"{index} has no weight_map from names to files; download it again.")
    outside = next((file for file in listed.values() if Path(file).name != file), None)
    if outside:
        raise ObrError(f"{index} names the file {outside!r}, which is not beside it; correct the index.")
    paths = [index.parent / file for file in sorted(set(listed.values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ObrError(f"{index.parent} lacks {missing[0]}, which {index.name} names; download it again.")
    return paths, {name: index.parent / file for name, file in listed.items()}


def _numbered(folder: Path, matches: list[re.Match]) -> list[Path]:
    """Shards without an index, if they are complete."""
    counts = {int(match["count"]) for match in matches}
    numbers = sorted(int(match["number"]) for match in matches)
    if len(counts) != 1 or numbers != list(range(1, max(counts) + 1)):
        there = ", ".join(sorted(match[0] for match in matches))
        raise ObrError(f"{folder} has shards without an index that are not complete ({there}); download them again.")
    return sorted(folder / match[0] for match in matches)


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except BROKEN_FILE as error:
        raise ObrError(f"{path} is not a whole safetensors file ({first_line(error)}); download it again.") from error


def _headers(path: Path) -> dict[str, Header]:
    """Of every tensor of a safetensors file."""
    found = {}
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118  not a mapping
            view = file.get_slice(name)
            kind = HEADER_DTYPES.get(view.get_dtype())
            found[name] = Header(path, tuple(view.get_shape()), kind and getattr(torch, kind))
    return found


def _pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote, mapped into memory where its format allows it. No code is run."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ObrError(
            f"{path} holds more than plain tensors, or is broken ({first_line(error)}); it is not opened."
        ) from error
    found = (
        found.get("model", found) if isinstance(found, dict) else found
    )  # QuaRot's own scripts wrap the state dict
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ObrError(f"{path} is not a state dict; a released checkpoint is one.")
    return dict(found)
