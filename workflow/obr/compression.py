"""Compression of whole models: block by block, group by group, with sequential or cached Hessians."""

import time
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn
from tqdm import tqdm

from obr import data, fetch, hessian
from obr.checkpoint import LayerReport, Report, Writer, round_ends, round_rest, store, versions
from obr.config import check_widths
from obr.digest import digest
from obr.errors import ObrError
from obr.layout import Layout
from obr.model import Blocks, block_file, read_json, run_block
from obr.modules import QuantLinear
from obr.recipe import Recipe
from obr.restoration import Hessian, restore


def compress(model: nn.Module, tokens: Tensor | None, recipe: "Recipe | dict", *, progress: bool = True) -> nn.Module:
    """Compress a model in memory, in place, and return it; its report is `model.obr_report`.

    Rotate first (`obr.rotate`) if the recipe is to act on a rotated model. Activation, key and value settings
    of the recipe are switched on at the end.

    Args:
        model: a transformers causal LM of a known family.
        tokens: (b, s) calibration windows; None for methods that read no activations.
        recipe: a Recipe, or a dictionary of its fields such as {"method": "obr_gptq"}.

    Raises:
        ObrError: what the recipe asks does not fit the model, or a layer cannot be compressed.
    """
    from obr.modules import set_quantizers

    if isinstance(recipe, dict):
        recipe = Recipe.parse({"calibration": "given", **recipe})
    blocks = Blocks(model)
    storage = model.config.dtype if model.config.dtype in (torch.float16, torch.bfloat16) else torch.float16
    report = Report(recipe, storage, device=str(blocks.device))
    if tokens is not None:
        report.calibration = {"nsamples": len(tokens), "seqlen": tokens.shape[1], "tokens": tokens.numel()}
    report.rotation = _rotation_of(model)
    compress_blocks(blocks, tokens, None, report, progress=progress)
    for index in range(len(blocks)):
        set_quantizers(blocks.load(index), blocks.layout, recipe)
    model.obr_report, model.obr_recipe = report, recipe
    return model


def _rotation_of(model: nn.Module) -> dict | None:
    rotation = getattr(model, "obr_rotation", None)
    return rotation.about() if rotation else None


def compress_stage(
    model: Path,
    recipe: Recipe,
    out: Path,
    *,
    rotation: Path | None = None,
    tokens: Path | None = None,
    hessians: Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> dict:
    """The stage: a downloaded model to a packed checkpoint, streamed; returns the manifest.

    Args:
        rotation: the rotation's file, None for none. tokens: calibration windows, for sequential Hessians.
        hessians: folder of cached Hessians, used if the recipe says so.
    """
    _check_inputs(recipe, rotation, tokens, hessians)
    check_widths(read_json(model / "config.json"), {recipe.method: recipe.pattern}, model.name)
    blocks = hessian.open_blocks(model, rotation, dtype, device)
    report = Report(recipe, blocks.storage_dtype, device=str(blocks.target))
    report.source = read_json(model / "source.json") if (model / "source.json").exists() else None
    report.rotation = blocks.rotation.about() if rotation else None
    windows = None
    if recipe.needs_hessian and recipe.hessian == "sequential":
        windows, report.calibration = data.load_tokens(tokens)
    elif recipe.needs_hessian or hessians:
        report.calibration = read_json(hessians / "hessian.json")["calibration"]
    writer = Writer(out, blocks, report.dtype, _run_of(report, str(blocks.dtype), rotation, tokens or hessians))
    cached = hessians if windows is None else None
    compress_blocks(blocks, windows, cached, report, writer)
    return writer.finish(report, tokenizer_from=model)


def _check_inputs(recipe: Recipe, rotation: Path | None, tokens: Path | None, hessians: Path | None) -> None:
    """Raise ObrError unless the files are those that the recipe names, no more and no fewer rotations."""
    if (recipe.rotation != "none") != (rotation is not None):
        raise ObrError(
            f"The recipe's rotation is {recipe.rotation!r}, but {'a' if rotation else 'no'} rotation file is given; "
            "give --rotation for a rotated recipe, and only then."
        )
    needed, given = ("tokens", tokens) if recipe.hessian == "sequential" else ("hessians", hessians)
    if recipe.needs_hessian and given is None:
        raise ObrError(f"Method {recipe.method} with {recipe.hessian} Hessians reads --{needed}, which is not given.")


def _run_of(report: Report, dtype: str, rotation: Path | None, statistics: Path | None) -> dict:
    """What decides the blocks of a run: settings, inputs, code and versions, but not the number of threads."""
    entry = {k: v for k, v in report.recipe.to_dict().items() if k not in ("label", "activations", "keys", "values")}
    if statistics is not None and statistics.is_dir():
        statistics = statistics / "hessian.json"
    return {
        "recipe": entry,
        "model": (report.source or {}).get("sha256"),
        "rotation": fetch.sha256_of(rotation) if rotation else None,
        "calibration": fetch.sha256_of(statistics) if statistics else None,
        "code": digest("compression"),
        "device": report.device.split(":")[0],
        "dtype": dtype,
        "versions": versions(),
    }


@torch.no_grad()
def compress_blocks(
    blocks: Blocks,
    tokens: Tensor | None,
    cached: Path | None,
    report: Report,
    writer: Writer | None = None,
    progress: bool = True,
) -> None:
    """Compress every block and fill the report.

    tokens: (b, s): sequential, each group's Hessian is collected once those before it are compressed.
    cached: folder of Hessians of the dense model. With neither, only data-free methods work.
    writer: where finished blocks go, and where those of an interrupted run are found.
    """
    started = time.monotonic()
    round_ends(blocks.model, blocks.layout, report.dtype)
    sequential = tokens is not None and report.recipe.needs_hessian
    hidden, arguments = blocks.embed(tokens) if sequential else ([], [])
    for index in tqdm(range(len(blocks)), desc=report.recipe.method, unit="block", disable=not progress):
        rows = writer.finished(index) if writer else None
        if rows is None:
            block = blocks.load(index)
            round_rest(block, blocks.layout, report.dtype)
            rows = _compress_block(block, blocks, index, report, hidden, arguments, cached)
            if writer is not None:
                writer.block(index, block, rows)
        elif sequential:
            block = writer.load(index)
        report.layers += rows
        if sequential:
            hidden = list(run_block(block, hidden, arguments[index]))
    report.seconds = time.monotonic() - started


def _compress_block(
    block: nn.Module, blocks: Blocks, index: int, report: Report, hidden: list[Tensor], arguments, cached: Path | None
) -> list[LayerReport]:
    """Compress a block group by group; hidden (b times (1, s, d)) is empty unless Hessians are sequential."""
    matrices = hessian.load(cached / block_file(index), blocks.device) if cached else {}
    rows = []
    for group in blocks.layout.groups:
        if hidden:
            matrices, _ = hessian.collect(block, blocks.layout, hidden, arguments[index], [group], whole=False)
        rows += compress_group(block, blocks.layout, group, matrices.get(group), report, index)
    return rows


def compress_group(
    block: nn.Module, layout: Layout, group: str, matrix: Tensor | None, report: Report, index: int
) -> list[LayerReport]:
    """Compress the linear layers of a group, which share one Hessian and its factors."""
    rows = []
    factors = Hessian(matrix, report.recipe.damp, f"block {index} {group}") if matrix is not None else None
    for name in layout.groups[group]:
        started = time.monotonic()
        full_name = f"block {index} {name}"
        linear: QuantLinear = block.get_submodule(name)
        recipe = _recipe_of(report.recipe, layout, name)
        restored = restore(
            linear.weight, factors, recipe.method,
            bits=recipe.bits, sparsity=recipe.sparsity, pattern=recipe.pattern, mask=recipe.mask,
            alpha=recipe.alpha, damp=recipe.damp, clip=recipe.clip, name=full_name,
            seed=crc32(f"{recipe.seed} {full_name}".encode()),  # another random mask for every layer
        )  # fmt: skip
        store(linear, restored, report.dtype)
        rows.append(
            LayerReport(
                block=index, layer=name, rows=linear.weight.shape[0], columns=linear.weight.shape[1],
                bits=restored.bits, pattern=recipe.pattern or "", sparsity=restored.sparsity,
                zeros=float((restored.weight == 0).float().mean()), relative_error=restored.relative_error,
                damp=restored.damp, seconds=round(time.monotonic() - started, 4),
                packed_bytes=linear.packed.bytes, flags="; ".join(restored.flags),
            )
        )  # fmt: skip
    return rows


def _recipe_of(recipe: Recipe, layout: Layout, name: str) -> Recipe:
    if recipe.int8_down_proj and name in layout.groups["down"] and recipe.bits < 8:
        return replace(recipe, bits=8)
    return recipe
