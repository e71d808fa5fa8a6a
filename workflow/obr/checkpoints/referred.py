"""Weights that a checkpoint refers to: those of the model folder that it was made from, where they are the same.

The checkpoint of a recipe `external` refers to the files of the program that made it, which are dequantised as they
are read.

The manifest's entry `weights` says where that folder lies, relative to the checkpoint's own, and which files it has:
{"folder": path, "files": {name: {"bytes": size, "sketch": sha256 of pieces, "sha256": of the whole}}}.
"""

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from obr.checkpoints.external.folder import external_path, open_external
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.models.architectures import Layout
from obr.models.split import follow
from obr.models.tensor_files import INDEX, TensorFiles, weight_files
from obr.runtime.files import sha256_of
from obr.runtime.provenance import model_hashes

ENTRY = "weights"
MADE = "made.json"  # beside another program's checkpoint: what its maker noted, such as seconds
PIECES, PIECE = 256, 4096  # of a file, evenly spread, that its sketch covers: other weights differ in all of them


def is_referred(recipe: Recipe) -> bool:
    """Whether a recipe leaves all linear layers as they are."""
    return recipe.method == "dense" and recipe.rotation == "none"


def reference(model: Path, directory: Path) -> dict:
    """The entry of a manifest in `directory` for the weights of a model folder or GGUF file.

    The sha256 of a file is the one that its download noted, or computed if there is none.
    """
    model, noted = Path(model), model_hashes(model) or {}
    if model.is_file():  # GGUF
        model, names = model.parent, [model.name]
    else:
        others = [INDEX] if external_path(model) is None else [INDEX, "config.json"]
        names = [*weight_files(model, str(model)), *(name for name in others if (model / name).is_file())]
    files = {
        name: {
            "bytes": (model / name).stat().st_size,
            "sketch": sketch_of(model / name),
            "sha256": noted.get(name) or sha256_of(model / name),
        }
        for name in names
    }
    folder = os.path.relpath(model.resolve(), Path(directory).resolve())
    return {"folder": Path(folder).as_posix(), "files": files}


def sketch_of(path: Path) -> str:
    """sha256 of a file's size and of pieces of it, the first and the last among them: read in milliseconds."""
    size, digest = Path(path).stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        for place in range(PIECES):
            file.seek(max(0, size - PIECE) * place // (PIECES - 1))
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def folder_of(directory: Path, manifest: dict) -> Path:
    """The model folder that a checkpoint refers to."""
    return Path(os.path.normpath(Path(directory) / manifest[ENTRY]["folder"]))


def bytes_of(manifest: dict) -> int:
    """Of the files that a checkpoint refers to."""
    files = manifest.get(ENTRY, {"files": {}})["files"]
    return sum(file["bytes"] for name, file in files.items() if name != "config.json")


def check_referred(directory: Path, manifest: dict, whole: bool = False) -> None:
    """Raise ObrError unless the model folder that a checkpoint refers to, if it does, is as it was.

    whole: compare the sha256 of every file; otherwise its sketch.
    """
    for problem in problems_of(directory, manifest, whole):
        raise ObrError(problem)


def problems_of(directory: Path, manifest: dict, whole: bool) -> Iterator[str]:
    """What is wrong with the files that a checkpoint refers to, a sentence each."""
    if ENTRY not in manifest:
        return
    try:
        folder, files = folder_of(directory, manifest), manifest[ENTRY]["files"]
        wanted = {name: file["sha256" if whole else "sketch"] for name, file in files.items()}
    except (KeyError, TypeError, AttributeError):
        yield f"{directory}/manifest.json has a malformed {ENTRY!r}; compress the model again."
        return
    if INDEX not in wanted and (folder / INDEX).is_file() and not any(name.endswith(".gguf") for name in wanted):
        yield (
            f"{directory} has its weights in {folder}, which now has {INDEX}, by which others would be read; remove "
            "that file, or compress again."
        )
    for name, digest in wanted.items():
        path = folder / name
        if not path.is_file():
            yield f"{directory} has its weights in {folder}, which has no {name}; put it back, or compress again."
        elif (sha256_of if whole else sketch_of)(path) != digest:
            yield (
                f"{directory} has its weights in {path}, which is not the file that it was made from; "
                "put that model back, or compress again."
            )


def read_tensors(
    directory: Path, manifest: dict, skeleton: nn.ModuleList, layout: Layout, index: int, dtype: torch.dtype
) -> tuple[dict, dict[str, Tensor]]:
    """(header, tensors) of block `index` as its own file would hold them.

    skeleton: the blocks without memory, their fused layers apart. dtype: of the checkpoint.
    """
    block, prefix = skeleton[index], f"{layout.blocks}.{index}."
    linears, external = layout.in_block(block).linears, manifest["recipe"].get("method") == "external"
    files = _external(directory, manifest) if external else TensorFiles(folder_of(directory, manifest))
    follow(files, layout, skeleton)
    dtype = torch.float32 if external else dtype  # in which codes are multiplied by scales
    exact = {name for name, _ in block.named_buffers()}
    read = files.read({name: prefix + name for name in exact})
    read |= files.read({name: prefix + name for name in block.state_dict() if name not in exact}, dtype)
    layers, tensors = {}, {}
    for name, tensor in read.items():
        layer, _, part = name.rpartition(".")
        if part == "weight" and layer in linears:
            layers[layer] = {"shape": list(tensor.shape), "bits": 16, "pattern": None, "masked": False}
            tensors[f"{layer}.values"] = tensor.flatten()
        else:
            tensors[name] = tensor
    return {"layers": layers, "transforms": {}}, tensors


def _external(directory: Path, manifest: dict) -> TensorFiles:
    """The tensors of another program's checkpoint, dequantised."""
    folder, names = folder_of(directory, manifest), manifest[ENTRY]["files"]
    path = next((folder / name for name in names if name.endswith(".gguf")), folder)
    return _opened(path, tuple((folder / name).stat().st_mtime_ns for name in names))


@lru_cache(maxsize=1)
def _opened(path: Path, _modified: tuple[int, ...]) -> TensorFiles:
    """Opened once for all blocks of a checkpoint."""
    return open_external(path).tensors
