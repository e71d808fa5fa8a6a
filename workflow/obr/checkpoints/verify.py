"""Whether a packed checkpoint is what its manifest says: its files, its layers, its sums."""

import csv
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from obr.checkpoints import referred
from obr.checkpoints.files import read_manifest, weight_bytes
from obr.checkpoints.format import CheckpointBlocks
from obr.checkpoints.packing import Packed, unpack
from obr.checkpoints.released.verified import Verified
from obr.checkpoints.writer import LayerReport
from obr.config.methods import METHODS
from obr.config.pattern import Pattern
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.methods.masks import check_mask
from obr.methods.restore import Restored
from obr.mixed_precision.allocate import chosen_options
from obr.models.architectures import Layout
from obr.models.side_files import files_of
from obr.runtime.files import sha256_of

NUMBER = (int, float)
# What a manifest must have, and of which type.
NEEDED = {
    "format": int, "recipe": dict, "blocks": int, "dtype": str, "bits_per_weight": dict, "file_bytes": int,
    "linear_weights": int, "linear_bytes": int, "sparsity": NUMBER, "zeros": NUMBER,
    "relative_error": (*NUMBER, type(None)), "flagged_layers": int, "calibration": (dict, type(None)),
    "rotation": (dict, type(None)), "source": (dict, type(None)), "seconds": (*NUMBER, type(None)),
    "device": str, "threads": int, "inputs": (dict, type(None)), "versions": dict, "files": dict,
}  # fmt: skip
THRESHOLDED = 0.01  # by which a layer's sparsity may miss, where thresholds are taken over parts of a layer


@dataclass
class Totals:
    """Sums over the layers, as the manifest has them."""

    weights: int = 0
    bytes: int = 0
    pruned: int = 0
    zeros: int = 0


def verify_checkpoint(directory: Path) -> list[str]:
    """What is wrong with a checkpoint, a sentence each; nothing is wrong if there is none.

    Checked: the manifest's completeness; the sha256 of every file, and that there are no others; that every block
    can be loaded into the model of config.json; of every layer bits, groups, pattern, mask, scales, levels, finite
    values; the rows of layers.csv; the manifest's sums. What cannot be read ends the search.
    """
    directory = Path(directory)
    try:
        manifest = read_manifest(directory)
        problems = [*_lacking(directory, manifest)]
        if problems:
            return problems
        problems += _files(directory, manifest)
        return problems if problems else list(_contents(directory, manifest))
    except ObrError as error:
        return [str(error)]


def _lacking(directory: Path, manifest: dict) -> Iterator[str]:
    for key, kind in NEEDED.items():
        if key not in manifest:
            yield f"{directory}/manifest.json has no {key!r}; an older version wrote it: compress again."
        elif not isinstance(manifest[key], kind) or isinstance(manifest[key], bool):
            yield f"{directory}/manifest.json has {key!r} of type {type(manifest[key]).__name__}; it was altered."


def _files(directory: Path, manifest: dict) -> Iterator[str]:
    """By name, then by hash; the manifest cannot hold its own."""
    beside = {"manifest.json", "README.md"}  # a model card comes later
    present = {name for name in files_of(directory) if name[0] != "."} - beside
    for name, sha256 in manifest["files"].items():
        if name not in present:
            yield f"{directory} lacks {name}, which its manifest lists; compress it again, or fetch the file."
        elif sha256_of(directory / name) != sha256:
            yield f"{directory}/{name} is not the file that was written (its sha256 differs); compress it again."
    for name in sorted(present - set(manifest["files"])):
        yield f"{directory}/{name} is not in the manifest; delete it, or ask who put it there."
    yield from referred.problems_of(directory, manifest, whole=True)


def _contents(directory: Path, manifest: dict) -> Iterator[str]:
    """What the files hold, block by block, against recipe, layers.csv and manifest."""
    blocks = CheckpointBlocks(directory, dtype=torch.float32, device="cpu")
    rows, totals = _rows(directory / "layers.csv"), Totals()
    for name, parameter in blocks.model.named_parameters():
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            yield f"{directory}: {name} has NaN or infinite values; compress it again."
    for index in range(len(blocks)):
        try:
            block = blocks.load(index)
        except ObrError as error:
            yield str(error)
            rows = {key: row for key, row in rows.items() if key[0] != index}
            totals = None
            continue
        layout = blocks.layout_at(index)
        expected = _expected(blocks.recipe, manifest, index, layout)
        yield from _block(block, layout, index, expected, rows, totals)
    if rows:
        (index, name), *_ = rows
        yield f"{directory}/layers.csv has a line for block {index} {name}, which no file holds; it was altered."
    if totals is not None:
        yield from _sums(directory, manifest, totals)


def _expected(recipe: Recipe, manifest: dict, index: int, layout: Layout) -> dict[str, Recipe]:
    """The recipe of each layer of a block. Raises ObrError if an allocation has none for it."""
    if index not in recipe.chosen(manifest["blocks"]):
        return dict.fromkeys(layout.linears, recipe.left_out)
    if recipe.allocation is None:
        return dict.fromkeys(layout.linears, recipe)
    chosen = chosen_options(manifest.get("allocation", {}), "manifest.json")
    try:
        return {name: recipe.of_layer(chosen[index, name]) for name in layout.linears}
    except KeyError as error:
        raise ObrError(f"manifest.json has no choice for layer {error}; it was altered.") from error


def _rows(path: Path) -> dict[tuple[int, str], LayerReport]:
    """layers.csv by block and layer."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reports = [LayerReport.read(row) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ObrError(f"{path} is not a table of layers ({error}); compress the model again.") from error
    return {(report.block, report.layer): report for report in reports}


def _block(
    block: nn.Module, layout: Layout, index: int, recipes: dict[str, Recipe], rows: dict, totals: Totals
) -> Iterator[str]:
    for name, parameter in block.named_parameters():
        if not bool(parameter.isfinite().all()):
            yield f"block {index}: {name} has NaN or infinite values; compress the model again."
    for name in layout.linears:
        packed: Packed = block.get_submodule(name).packed
        restored, where, recipe = unpack(packed), f"block {index} {name}", recipes[name]
        eight = recipe.int8_down_proj and name in layout.of_kind("down") and recipe.bits < 8
        try:
            _check_layer(packed, restored, replace(recipe, bits=8) if eight else recipe, where)
        except ObrError as error:
            yield str(error)
        report = rows.pop((index, name), None)
        differing = _differing(report, packed, restored, recipe) if report else None
        if report is None:
            yield f"{where} has no line in layers.csv; it was altered."
        elif differing:
            yield f"layers.csv says {differing[0]} {differing[1]} of {where}, the file has {differing[2]}."
        if totals is not None:
            totals.weights += restored.mask.numel()
            totals.bytes += packed.bytes
            totals.pruned += int((~restored.mask).sum())
            totals.zeros += int((restored.weight == 0).sum())


def _check_layer(packed: Packed, restored: Restored, recipe: Recipe, where: str) -> None:
    """Raise ObrError unless a layer has the bits, pattern, sparsity and levels of its recipe."""
    if recipe.method == "external":  # another program's file, whose hash is checked
        return None
    if recipe.method == "released":  # kept as its authors wrote it, at 16 bits
        return Verified().add(restored.weight, recipe, where)
    if (bits := packed.about["bits"]) != recipe.bits:
        raise ObrError(f"{where} is stored at {bits} bits, the recipe says {recipe.bits}.")
    if (group := packed.about.get("group")) != recipe.group:
        raise ObrError(f"{where} has scales for groups of {group} columns, the recipe says {recipe.group}.")
    pattern = Pattern.parse(recipe.pattern) if recipe.pattern else None
    if packed.about["pattern"] != (str(pattern) if pattern else None):
        raise ObrError(f"{where} has pattern {packed.about['pattern']}, the recipe says {pattern}.")
    if METHODS[recipe.method].rows_differ and pattern is None:
        if abs(restored.sparsity - recipe.sparsity) > THRESHOLDED:
            raise ObrError(f"{where} has sparsity {restored.sparsity:.4f}, the recipe says {recipe.sparsity}.")
    else:
        check_mask(restored.mask, recipe.sparsity, pattern, where, recipe.scope)
    if recipe.bits < 16:
        if not bool((restored.scale > 0).all()):
            raise ObrError(f"{where} has scales that are not positive; compress the model again.")
        levels = max(_levels(part) for part in restored.weight.split(recipe.group or restored.weight.shape[1], 1))
        if levels > 2**recipe.bits:
            raise ObrError(f"{where} has {levels} levels in a row, {recipe.bits} bits allow {2**recipe.bits}.")


def _levels(weight: Tensor) -> int:
    """The most different values in a row of `weight (r, n)`."""
    ordered = weight.sort(dim=1).values
    return int(((ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1).max())


def _differing(report: LayerReport, packed: Packed, restored: Restored, recipe: Recipe) -> tuple | None:
    """(column, what layers.csv says, what is there) where they differ."""
    found = {
        "rows": restored.weight.shape[0], "columns": restored.weight.shape[1],
        "zeros": float((restored.weight == 0).float().mean()),
    }  # fmt: skip
    if recipe.method != "external":
        found["packed_bytes"] = packed.bytes
    if not recipe.adopted:  # those are reported as their authors made them, not as they are stored
        found |= {"bits": restored.bits, "pattern": str(restored.pattern or ""), "sparsity": restored.sparsity}
    stated = asdict(report)
    return next(((key, stated[key], value) for key, value in found.items() if not _same(stated[key], value)), None)


def _same(stated, found) -> bool:
    if isinstance(found, float):
        return math.isclose(stated, found, rel_tol=1e-6, abs_tol=1e-6)
    return stated == found


def _sums(directory: Path, manifest: dict, totals: Totals) -> Iterator[str]:
    if not totals.weights:
        return
    found = {
        "linear_weights": totals.weights,
        "linear_bytes": totals.bytes,
        "zeros": totals.zeros / totals.weights,
        "file_bytes": weight_bytes(directory, manifest),
    }
    method = manifest["recipe"].get("method")
    if method not in ("released", "external"):
        found["sparsity"] = totals.pruned / totals.weights
    if method == "external":  # stored as another program has it
        del found["linear_bytes"]
    for key, value in found.items():
        if not _same(manifest[key], value):
            yield f"{directory}/manifest.json says {key} {manifest[key]}, the files have {value}; it was altered."
    stated = manifest["bits_per_weight"].get("file")
    size = 8 * (manifest["linear_bytes"] if method == "external" else totals.bytes) / totals.weights
    if not isinstance(stated, NUMBER) or not _same(stated, size):
        yield f"{directory}/manifest.json says {stated} bits a weight in the file, there are {size:.4f}; altered."
