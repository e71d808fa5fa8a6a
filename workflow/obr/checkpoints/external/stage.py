"""A checkpoint of another program taken over as a packed one, which refers to its files for all blocks."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from obr.checkpoints.external.blocks import ExternalBlocks
from obr.checkpoints.referred import MADE
from obr.checkpoints.writer import LayerReport, Report, Writer
from obr.config.pattern import Pattern
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.models.architectures import Dimensions
from obr.models.blocks import StreamedBlocks
from obr.runtime.files import read_json
from obr.runtime.progress import Progress
from obr.runtime.provenance import fingerprint

FEWER = 0.02  # by which the share of zeros may lie below the recipe's sparsity
SAME = ("model_type", "vocab_size", "tie_word_embeddings")


@torch.no_grad()
def import_external(model: Path, released: Path, recipe: Recipe, out: Path) -> dict:
    """The stage: take over a checkpoint that another program quantised; returns the manifest.

    Every layer is dequantised once, counted, and compared with the recipe. The manifest has the checkpoint's own bits
    a weight, bytes and zeros. `seconds` are those that its maker noted in made.json beside it, if there is one.

    Args:
        model: the folder of the base model, whose tokenizer is used.
        released: what `download_released` wrote.

    Raises:
        ObrError: a format that is not read, another model than the base, or weights that the recipe misstates.
    """
    about = read_json(Path(released) / "source.json")
    blocks = ExternalBlocks(Path(released) / about["folder"], recipe, torch.float32, "cpu")
    _check_base(blocks, model)
    _check_recipe(recipe, blocks)
    report = Report(recipe, blocks.storage_dtype, source=about, device="cpu", seconds=None)
    run = fingerprint(
        "checkpoints.external.stage", model, {}, device="cpu", dtype=str(blocks.storage_dtype),
        recipe=recipe.decisive(), external=_sizes(blocks),
    )  # fmt: skip
    writer = Writer(out, blocks, blocks.storage_dtype, run, weights=blocks.path)
    with Progress("external", len(blocks)) as shown:
        for index in range(len(blocks)):
            rows = list(_rows(blocks, index, recipe))
            writer.block(index, blocks.load(index), rows)
            report.layers += rows
            shown.block()
    _check_zeros(report, blocks)
    report.external = {"format": blocks.files.layout.name, "bits_per_weight": _theory(blocks)}
    made = blocks.path.parent / MADE if blocks.path.is_file() else blocks.path / MADE
    if made.is_file():
        report.external["made"] = read_json(made)
        report.seconds = report.external["made"].get("seconds")
    return writer.finish(report, tokenizer_from=model)


def _sizes(blocks: ExternalBlocks) -> dict:
    """What tells one checkpoint from another, without reading it."""
    paths = {*blocks.files.files.values()}
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)}


def _check_base(blocks: ExternalBlocks, model: Path) -> None:
    """Raise ObrError unless the base model has the checkpoint's family, sizes and vocabulary."""
    base = StreamedBlocks(model, None, torch.float32, "cpu").config
    found = {key: getattr(blocks.config, key) for key in SAME} | vars(Dimensions.of(blocks.config))
    wanted = {key: getattr(base, key) for key in SAME} | vars(Dimensions.of(base))
    for key, value in wanted.items():
        if found[key] != value:
            raise ObrError(f"{blocks.path} has {key} {found[key]}, the base model {model} has {value}; name its own.")


def _check_recipe(recipe: Recipe, blocks: ExternalBlocks) -> None:
    """Raise ObrError unless the recipe says of bits and groups what most of the checkpoint's weights have."""
    own = blocks.own_recipe()
    if (recipe.bits, recipe.group) != (own.bits, own.group):
        said, found = ({"bits": r.bits, "group": r.group} for r in (recipe, own))
        raise ObrError(f"The recipe says {said} of {blocks.path}, which has {found}; correct the recipe.")
    if recipe.rotation != "none" or recipe.blocks is not None:
        raise ObrError(
            f"A recipe of method external takes {blocks.path} as it is, whole; drop its rotation and blocks."
        )


def _rows(blocks: ExternalBlocks, index: int, recipe: Recipe) -> Iterator[LayerReport]:
    """The layers of a block as layers.csv has them."""
    block, files = blocks.load(index), blocks.files
    for name in blocks.layout.in_block(block).linears:
        full, weight = f"{blocks.layout.blocks}.{index}.{name}", block.get_submodule(name).weight
        zeros = float((weight == 0).float().mean())
        stored = files.layout.stored(full) if full in files.layers else None
        if recipe.pattern:
            _check_pattern(weight, Pattern.parse(recipe.pattern), full)
        yield LayerReport(
            block=index, layer=name, rows=weight.shape[0], columns=weight.shape[1],
            bits=stored.bits if stored else 16, pattern=recipe.pattern or "",
            sparsity=zeros if recipe.sparsity else 0.0, zeros=zeros,
            relative_error=math.nan, damp=0.0, seconds=0.0, flags="",
            packed_bytes=files.layout.bytes_of(full) if stored else files.stored.bytes_of(f"{full}.weight"),
        )  # fmt: skip


def _check_pattern(weight: torch.Tensor, pattern: Pattern, where: str) -> None:
    pattern.check_width(weight.shape[1], where)
    kept = (weight != 0).view(weight.shape[0], -1, pattern.units[1], 2 if pattern.paired else 1).any(3).sum(2)
    if int(kept.max()) > pattern.units[0]:
        raise ObrError(
            f"{where} keeps more weights in a group than the recipe's pattern {pattern}; correct the recipe."
        )


def _check_zeros(report: Report, blocks: ExternalBlocks) -> None:
    weights = sum(row.rows * row.columns for row in report.layers)
    zeros = sum(row.zeros * row.rows * row.columns for row in report.layers) / weights
    if zeros < report.recipe.sparsity - FEWER:
        raise ObrError(
            f"{blocks.path} has {100 * zeros:.1f} % zeros, the recipe's sparsity is {report.recipe.sparsity}; "
            "correct the recipe."
        )


def _theory(blocks: ExternalBlocks) -> float:
    """Bits a weight of the blocks' linear layers, scales of whole rows left out; 16 for layers of floats."""
    bits = weights = 0.0
    for layer, (rows, columns) in blocks.files.layout.shapes.items():
        if layer.startswith(f"{blocks.layout.blocks}."):
            known = layer in blocks.files.layers
            bits += rows * columns * (blocks.files.layout.stored(layer).theory if known else 16.0)
            weights += rows * columns
    return bits / weights
