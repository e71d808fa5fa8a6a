"""Compression of whole models: block by block, group by group, with sequential or cached Hessians."""

import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn

from obr.calibration import asymmetric, output_gradients
from obr.calibration.expert_inputs import shared_flags
from obr.calibration.moments import GroupStatistics
from obr.checkpoints.format import round_ends, round_rest
from obr.checkpoints.writer import LayerReport, Report, Writer, store
from obr.compression import refine
from obr.compression.hessian_source import HessianSource
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.methods.layer_hessian import Hessian
from obr.methods.restore import Restored, relative_error, restore_together
from obr.mixed_precision import allocate
from obr.models.architectures import Layout, kind_of
from obr.models.blocks import Blocks
from obr.models.hidden_states import MemoryBudget
from obr.models.layers import QuantLinear
from obr.runtime import processor
from obr.runtime.progress import Progress


@torch.no_grad()
def compress_blocks(
    blocks: Blocks,
    tokens: Tensor | None,
    cached: Path | None,
    report: Report,
    writer: Writer | None = None,
    room: MemoryBudget | None = None,
    progress: bool = True,
) -> None:
    """Compress every block and fill the report.

    Seven parameters: two sources of Hessians, two places for results.

    tokens: (b, s): sequential, each group's Hessian is collected once those before it are compressed.
    cached: folder of Hessians of the dense model. With neither, only data-free methods work.
    writer: where finished blocks go, and where those of an interrupted run are found.
    room: for the hidden states.
    """
    started, here = time.monotonic(), processor.description(torch.device(report.device).type)
    round_ends(blocks.model, blocks.layout, report.dtype)
    if writer is not None and writer.unfinished.finished(len(blocks)) == len(blocks):
        tokens = None  # only the last moves of an interrupted run are missing
    statistics = HessianSource(blocks, report.recipe, tokens, cached, room)
    with Progress(report.recipe.method, len(blocks), progress) as shown:
        for index in range(len(blocks)):
            finished = writer.finished(index) if writer else None
            if finished is None:
                begun = time.monotonic()
                block = statistics.prepared(index, blocks.load(index))
                layout = blocks.layout_at(index)
                rows = _compress_block(block, index, layout, statistics, report, shown)
                if report.recipe.refine_steps and index in statistics.chosen:
                    shown.layer("refinement")
                    rows = _refine_block(block, index, layout, statistics, report, rows)
                report.made_by(here, index)
                if writer is not None:
                    writer.block(index, block, rows, time.monotonic() - begun, here)
            else:
                rows, seconds, elsewhere = finished
                report.made_by(elsewhere, index)
                report.seconds += seconds
                block = statistics.resumed(index, writer.load(index)) if statistics.advances(index) else None
            report.layers += rows
            statistics.advance(index, block)
            block = None  # before the next is loaded
            shown.block() if finished is None else shown.resume()
    report.seconds += time.monotonic() - started


def _compress_block(
    block: nn.Module, index: int, layout: Layout, statistics: HessianSource, report: Report, shown: Progress
) -> list[LayerReport]:
    """Compress a block group by group; one that the recipe leaves out is stored as it is."""
    round_rest(block, layout, report.dtype)
    if index not in statistics.chosen:
        left = replace(report, recipe=report.recipe.left_out, allocation=None)
        return [row for group in layout.groups for row in compress_group(block, layout, group, None, left, index)]
    shown.layer("Hessians of the block")
    statistics.begin(block, index)
    rows = []
    for number, group in enumerate(layout.groups, start=1):
        shown.layer(f"group {number}/{len(layout.groups)}, Hessian of {group}")
        collected = statistics.collected(block, index, group)
        shown.layer(f"group {number}/{len(layout.groups)}, {group}")
        rows += compress_group(block, layout, group, collected, report, index)
    return rows


def _refine_block(
    block: nn.Module,
    index: int,
    layout: Layout,
    statistics: HessianSource,
    report: Report,
    rows: list[LayerReport],
) -> list[LayerReport]:
    """Train a compressed block on the calibration windows; returns its report."""
    started = time.monotonic()
    calibrated, held_out = statistics.windows_of_both()
    trained = refine.TrainedBlock(block, statistics.dense, layout, statistics.arguments[index])
    found = refine.refine_block(trained, calibrated, held_out, report.recipe, index)
    trained.store(report.dtype)
    return refine.refined_rows(rows, block, found, time.monotonic() - started)


def compress_group(
    block: nn.Module, layout: Layout, group: str, collected: GroupStatistics | None, report: Report, index: int
) -> list[LayerReport]:
    """Compress the linear layers of a group, which share one Hessian and, if treated alike, its solves.

    The report's seconds are the group's, shared out by size.
    """
    started = time.monotonic()
    factors = None
    if collected is not None:
        moments, name = collected.moments, f"block {index} {group}"
        factors = Hessian(moments.hessian, report.recipe.damp, name, moments.harmonic)
        factors.flags += shared_flags(moments)
    linears: dict[str, QuantLinear] = {name: block.get_submodule(name) for name in layout.groups[group]}
    wanted = {name: linear.weight for name, linear in linears.items()}
    shares: dict[str, dict[str, float]] = {}
    if collected is not None and collected.drift is not None:
        for name, weight in wanted.items():
            wanted[name], shares[name] = asymmetric.target_weight(weight, collected, factors, report.recipe)
    restored: dict[str, Restored] = {}
    for recipe, names in _treated_alike(report, layout, group, index).items():
        weights = _row_weights(report, index, names) if recipe.needs_gradients else None
        restored |= _restore(recipe, {name: wanted[name] for name in names}, factors, weights, index)
    unseen = None
    if collected is not None and collected.held_out is not None:
        unseen = Hessian(collected.held_out.moments.hessian, name=f"block {index} {group}, held out")
    held_out = {name: relative_error(wanted[name].float(), restored[name].weight, unseen) for name in linears}
    if report.recipe.target_shrinkage != "none":
        for name in linears:
            restored[name].flags.extend(f"{step} {share:.2f}" for step, share in shares.get(name, {}).items())
    for name, linear in linears.items():
        store(linear, restored[name], report.dtype)
    seconds = time.monotonic() - started
    weights = sum(linear.weight.numel() for linear in linears.values())
    tokens = collected.moments.tokens if collected is not None else None
    rows = [
        _row(index, name, linear, restored[name], seconds * linear.weight.numel() / weights, held_out[name])
        for name, linear in linears.items()
    ]
    return [replace(row, tokens=tokens) for row in rows]


def _row_weights(report: Report, index: int, names: list[str]) -> dict[str, Tensor]:
    """(r,) of each layer's rows, their mean 1. Raises ObrError if gradients are missing."""
    slopes = {name: (report.output_gradients or {}).get(f"{index}.{name}") for name in names}
    for name, gradient in slopes.items():
        if gradient is None:
            raise ObrError(f"{_full(index, name)} has no output gradients; they are of another model.")
    return {name: output_gradients.row_weights(gradient) for name, gradient in slopes.items()}


def _restore(
    recipe: Recipe,
    wanted: dict[str, Tensor],
    factors: Hessian | None,
    row_weights: dict[str, Tensor] | None,
    index: int,
) -> dict[str, Restored]:
    """Layers of one input, by name, all treated alike; wanted: (r, n) each."""
    full = {name: _full(index, name) for name in wanted}
    found = restore_together(
        {full[name]: weight for name, weight in wanted.items()}, factors, recipe,
        # another random mask for every layer
        seeds={name: crc32(f"{recipe.seed} {name}".encode()) for name in full.values()},
        row_weights={full[name]: weights for name, weights in row_weights.items()} if row_weights else None,
    )  # fmt: skip
    return {name: found[full[name]] for name in wanted}


def _full(index: int, name: str) -> str:
    return f"block {index} {name}"


def _row(
    index: int, name: str, linear: QuantLinear, restored: Restored, seconds: float, held_out_error: float
) -> LayerReport:
    return LayerReport(
        block=index, layer=name, rows=linear.weight.shape[0], columns=linear.weight.shape[1],
        bits=restored.bits, pattern=str(restored.pattern or ""), sparsity=restored.sparsity,
        zeros=float((restored.weight == 0).float().mean()), relative_error=restored.relative_error,
        damp=restored.damp, seconds=round(seconds, 4),
        packed_bytes=linear.packed.bytes, flags="; ".join(restored.flags), held_out_error=held_out_error,
    )  # fmt: skip


def _treated_alike(report: Report, layout: Layout, group: str, index: int) -> dict[Recipe, list[str]]:
    """The layers of a group by the recipe that each has."""
    names, recipe = layout.groups[group], report.recipe
    if recipe.int8_down_proj and kind_of(group) == "down" and recipe.bits < 8:
        recipe = replace(recipe, bits=8)
    if recipe.allocation is None:
        return {recipe: list(names)}
    chosen, found = allocate.chosen_options(report.allocation, "The allocation"), defaultdict(list)
    for name in names:
        if (option := chosen.get((index, name))) not in recipe.options:
            raise ObrError(f"The allocation has no choice of the recipe's for {_full(index, name)}; allocate again.")
        found[recipe.of_layer(option)].append(name)
    return found
