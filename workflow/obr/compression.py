"""Compression of whole models: block by block, group by group, with sequential or cached Hessians."""

import copy
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn

from obr import allocation, data, dtypes, gradients, hessian, processor, sensitivity, target
from obr.activations import Room
from obr.checkpoint import LayerReport, Report, Writer, round_ends, round_rest, store
from obr.config import check_widths
from obr.curvature import Hessian
from obr.errors import ObrError
from obr.files import read_json
from obr.layout import Layout
from obr.model import Blocks, advance, block_file
from obr.model_config import read_config
from obr.model_state import changing, check_before_compression, refuse_plain_saving
from obr.modules import QuantLinear, quantizer_settings, set_quantizers
from obr.progress import Progress
from obr.provenance import fingerprint
from obr.recipe import Recipe
from obr.restoration import Restored, relative_error, restore_together
from obr.target import Collected


def compress(model: nn.Module, tokens: Tensor | None, recipe: "Recipe | dict", *, progress: bool = True) -> nn.Module:
    """Compress a model in memory, in place, and return it; its report is `model.obr_report`.

    Rotate first (`obr.rotate`) if the recipe is to act on a rotated model. Activation, key and value settings
    of the recipe are switched on at the end.

    Args:
        model: a transformers causal LM of a known family, without adapters, hooks or other additions. It is put into
            evaluation mode.
        tokens: (b, s) calibration windows; None for methods that read no activations.
        recipe: a Recipe, or a dictionary of its fields such as {"method": "obr_gptq"}. What it needs of output
            gradients and allocation is measured first, from the same windows.

    Raises:
        ObrError: `model_check` refuses the model, what the recipe asks does not fit it, or a layer cannot be
            compressed.
    """
    if isinstance(recipe, dict):
        recipe = Recipe.parse({"calibration": "given", **recipe})
    check_before_compression(model)
    blocks = Blocks(model)
    computed_in = model.get_submodule(blocks.layout.embed).weight.dtype
    if recipe.dtype not in (None, dtypes.name_of(computed_in)):
        raise ObrError(
            f"The recipe's dtype is {recipe.dtype}, but the model is in {dtypes.name_of(computed_in)}; load it with "
            f"dtype=torch.{recipe.dtype}, or leave dtype out."
        )
    report = Report(recipe, _storage_dtype(model), computed_in, device=str(blocks.device))
    if tokens is not None:
        report.calibration = {"nsamples": len(tokens), "seqlen": tokens.shape[1], "tokens": tokens.numel()}
    rotation = getattr(model, "obr_rotation", None)
    if recipe.clip == "learned" and not (rotation and rotation.clip):
        raise ObrError("clip 'learned' needs weights that obr.rotate has shrunk: rotate with clip=True.")
    report.rotation = rotation.about() if rotation else None
    if recipe.needs_hessian and tokens is None:
        raise ObrError(f"Method {recipe.method} reads calibration windows; give tokens (b, s).")
    chosen = recipe.chosen(len(blocks))
    quantizer_settings(blocks.load(chosen[0]), blocks.layout, recipe)  # what does not fit is refused before a change
    _measure(blocks, tokens, report, progress)
    with changing(model, "obr.compress"):
        compress_blocks(blocks, tokens, None, report, progress=progress)
        for index in chosen:
            set_quantizers(blocks.load(index), blocks.layout, recipe)
        model.obr_report, model.obr_recipe = report, recipe
    refuse_plain_saving(model)
    return model


def _storage_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which a checkpoint keeps what is not quantised: that of the files which obr.load_model has read,
    for other models their own, and float16 for those in float32."""
    if (stored := getattr(model, "obr_storage_dtype", None)) is not None:
        return stored
    return model.config.dtype if model.config.dtype in (torch.float16, torch.bfloat16) else torch.float16


def _measure(blocks: Blocks, tokens: Tensor | None, report: Report, progress: bool) -> None:
    """Put the output gradients and the allocation that the recipe asks for into the report."""
    recipe = report.recipe
    if not recipe.needs_gradients and recipe.allocation is None:
        return
    if tokens is None:
        raise ObrError("The recipe needs output gradients; give calibration tokens.")
    windows = tokens[: gradients.WINDOWS, : gradients.LENGTH]
    report.slopes, _ = gradients.squared_gradients(blocks, windows, progress=progress)
    if recipe.allocation is not None:
        chosen = recipe.chosen(len(blocks))
        matrices = ((i, own) for i, own in hessian.dense_hessians(blocks, tokens, progress=progress) if i in chosen)
        layers = sensitivity.measured_losses(
            blocks, matrices, report.slopes, recipe.options, tokens, progress=progress
        )
        report.allocation = allocation.allocate(recipe.allocation, layers).to_dict()


def compress_stage(
    model: Path,
    recipe: Recipe,
    out: Path,
    *,
    rotation: Path | None = None,
    tokens: Path | None = None,
    hessians: Path | None = None,
    gradient_file: Path | None = None,
    allocation_file: Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    megabytes: float = Room.megabytes,
) -> dict:
    """The stage: a downloaded model to a packed checkpoint, streamed; returns the manifest.

    An interrupted run goes on with the block it was at.

    Args:
        rotation: the rotation's file, None for none. tokens: calibration windows, for sequential Hessians.
        hessians: folder of cached Hessians, used if the recipe says so.
        gradient_file, allocation_file: of the stages gradients and allocate, if the recipe needs them.
        dtype: of the computation, before the recipe's own; None for that, and without one the device's default.
        megabytes: of memory for the hidden states of the calibration, see `Room`.

    Raises:
        ObrError: files that do not fit the recipe or its dtype, or the blocks of an unfinished run of another one.
    """
    _check_inputs(recipe, rotation, tokens, hessians)
    _check_layerwise(recipe, gradient_file, allocation_file)
    patterns = {option.label: option.pattern for option in recipe.options} or {recipe.method: recipe.pattern}
    check_widths(read_config(model), patterns, model.name)
    recipe, dtype = dtypes.settled(recipe, dtype)
    blocks = hessian.open_blocks(model, rotation, dtype, device)
    report = Report(recipe, blocks.storage_dtype, blocks.dtype, device=str(blocks.target))
    report.source = read_json(model / "source.json") if (model / "source.json").exists() else None
    if recipe.clip == "learned":
        hessian.clip_weights(blocks)
    report.rotation = blocks.rotation.about() if rotation else None
    windows = None
    if recipe.needs_hessian and recipe.hessian == "sequential":
        windows, report.calibration = data.load_tokens(tokens)
    elif recipe.needs_hessian or hessians:
        noted = read_json(hessians / "hessian.json")
        dtypes.check_shared(recipe, noted.get("dtype"), f"The Hessians in {hessians}")
        report.calibration = noted["calibration"]
    cached = hessians if windows is None else None
    files = {"rotation": rotation, "calibration": tokens if cached is None else cached / "hessian.json"}
    files |= _read_layerwise(report, gradient_file, allocation_file, blocks.target)
    run = fingerprint(
        "compression", model, files, device=str(blocks.target), dtype=str(blocks.dtype), recipe=recipe.decisive()
    )
    writer = Writer(out, blocks, report.dtype, run)
    compress_blocks(blocks, windows, cached, report, writer, Room(megabytes, writer.unfinished.folder))
    return writer.finish(report, tokenizer_from=model)


def _read_layerwise(
    report: Report, gradient_file: Path | None, allocation_file: Path | None, device: torch.device
) -> dict[str, Path]:
    """Put the output gradients and the allocation that the recipe needs into the report; returns their files."""
    recipe, files = report.recipe, {}
    if recipe.needs_gradients:
        files["gradients"] = gradient_file
        report.slopes, notes = gradients.load(gradient_file, device)
        dtypes.check_shared(recipe, notes.get("dtype"), str(gradient_file))
    if recipe.allocation is not None:
        files["allocation"] = allocation_file
        report.allocation, asked = read_json(allocation_file), recipe.allocation
        dtypes.check_shared(recipe, report.allocation.get("dtype"), str(allocation_file))
        if (report.allocation.get("bits"), report.allocation.get("scope", "model")) != (asked.bits, asked.scope):
            raise ObrError(
                f"{allocation_file} is for another budget than the recipe's {asked.bits} bits a {asked.scope}."
            )
    return files


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


def _check_layerwise(recipe: Recipe, gradient_file: Path | None, allocation_file: Path | None) -> None:
    """Raise ObrError unless the output gradients and the allocation that the recipe needs are given."""
    if recipe.needs_gradients and gradient_file is None:
        raise ObrError("The recipe's row_weights are gradient, which reads --gradients; it is not given.")
    if (recipe.allocation is not None) != (allocation_file is not None):
        lacking = (
            "reads --allocation, which is not given" if recipe.allocation else "has none, but a file of one is given"
        )
        raise ObrError(f"Of allocations the recipe {lacking}.")


@torch.no_grad()
def compress_blocks(
    blocks: Blocks,
    tokens: Tensor | None,
    cached: Path | None,
    report: Report,
    writer: Writer | None = None,
    room: Room | None = None,
    progress: bool = True,
) -> None:
    """Compress every block and fill the report.

    tokens: (b, s): sequential, each group's Hessian is collected once those before it are compressed.
    cached: folder of Hessians of the dense model. With neither, only data-free methods work.
    writer: where finished blocks go, and where those of an interrupted run are found.
    room: for the hidden states.
    """
    started, here = time.monotonic(), processor.about(torch.device(report.device).type)
    round_ends(blocks.model, blocks.layout, report.dtype)
    if writer is not None and writer.unfinished.finished(len(blocks)) == len(blocks):
        tokens = None  # only the last moves of an interrupted run are missing
    statistics = Statistics(blocks, report.recipe, tokens, cached, room)
    with Progress(report.recipe.method, len(blocks), progress) as shown:
        for index in range(len(blocks)):
            finished = writer.finished(index) if writer else None
            if finished is None:
                begun = time.monotonic()
                block = statistics.prepared(index, blocks.load(index))
                rows = _compress_block(block, index, blocks.layout, statistics, report, shown)
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


class Statistics:
    """Where the Hessians of a compression come from: passes through the blocks done so far, or files.

    tokens: (b, s) for passes. cached: folder of Hessians of the dense model. room: for the hidden states. A recipe
    with asymmetry has the dense blocks run beside the compressed ones, on hidden states of their own; held-out
    windows pass through the compressed blocks alone.
    """

    def __init__(
        self, blocks: Blocks, recipe: Recipe, tokens: Tensor | None, cached: Path | None, room: Room | None = None
    ):
        self.blocks, self.recipe, self.cached, self.chosen = blocks, recipe, cached, recipe.chosen(len(blocks))
        self.quantised = recipe if recipe.hessian_inputs == "quantised" else None
        self.hidden, self.arguments = None, None
        self.dense, self.dense_hidden, self.held_out = None, None, None
        if tokens is not None and recipe.needs_hessian:
            room, count = room or Room(), len(tokens) - recipe.held_out
            if count < 1:
                raise ObrError(
                    f"held_out is {recipe.held_out}, but there are {len(tokens)} calibration windows; hold out fewer."
                )
            room = replace(room, megabytes=room.megabytes / (1 + bool(recipe.asymmetry) + bool(recipe.held_out)))
            if recipe.asymmetry:
                self.dense_hidden, _ = blocks.embed(tokens[:count], room)
            if recipe.held_out:
                self.held_out, _ = blocks.embed(tokens[count:], room)
            self.hidden, self.arguments = blocks.embed(tokens[:count], room)

    def prepared(self, index: int, block: nn.Module) -> nn.Module:
        """A block that is to be compressed, its activations quantised if that is what the Hessians are to see."""
        if self.dense_hidden is not None and index <= self.chosen[-1]:
            self.dense = copy.deepcopy(block)
        return self._quantised(index, block)

    def resumed(self, index: int, block: nn.Module) -> nn.Module:
        """The same for a block that is compressed already."""
        if self.dense_hidden is not None:
            self.dense = self.blocks.load(index)
        return self._quantised(index, block)

    def _quantised(self, index: int, block: nn.Module) -> nn.Module:
        if self.quantised is not None and index in self.chosen:
            set_quantizers(block, self.blocks.layout, self.quantised)
        return block

    def collected(self, block: nn.Module, index: int, group: str) -> Collected | None:
        """Of a group's inputs; None where there are neither tokens nor files."""
        if self.hidden is not None:
            layout, arguments = self.blocks.layout, self.arguments[index]
            if self.dense_hidden is not None:
                found = target.collect(block, self.dense, layout, self.hidden, self.dense_hidden, arguments, group)
            else:
                found = Collected(hessian.collect(block, layout, self.hidden, arguments, [group], whole=False)[group])
            if self.held_out is not None:
                held_out = hessian.collect(block, layout, self.held_out, arguments, [group], whole=False)
                found.held_out = held_out[group].hessian
            return found
        if self.cached is not None:
            path, harmonic = self.cached / block_file(index), self.recipe.needs_harmonic
            return Collected(hessian.load(path, self.blocks.device, [group], harmonic)[group])
        return None

    def advances(self, index: int) -> bool:
        """Whether a later block needs what this one puts out."""
        return self.hidden is not None and index < self.chosen[-1]

    def advance(self, index: int, block: nn.Module | None) -> None:
        """Pass the hidden states through a compressed block, if a later one needs them."""
        if self.advances(index):
            advance(block, self.hidden, self.arguments[index])
            if self.dense_hidden is not None:
                advance(self.dense, self.dense_hidden, self.arguments[index])
            if self.held_out is not None:
                advance(block, self.held_out, self.arguments[index])
        self.dense = None


def _compress_block(
    block: nn.Module, index: int, layout: Layout, statistics: Statistics, report: Report, shown: Progress
) -> list[LayerReport]:
    """Compress a block group by group; one that the recipe leaves out is stored as it is."""
    round_rest(block, layout, report.dtype)
    if index not in statistics.chosen:
        left = replace(report, recipe=report.recipe.left_out, allocation=None)
        return [row for group in layout.groups for row in compress_group(block, layout, group, None, left, index)]
    rows = []
    for number, group in enumerate(layout.groups, start=1):
        shown.layer(f"group {number}/{len(layout.groups)}, Hessian of {group}")
        collected = statistics.collected(block, index, group)
        shown.layer(f"group {number}/{len(layout.groups)}, {group}")
        rows += compress_group(block, layout, group, collected, report, index)
    return rows


def compress_group(
    block: nn.Module, layout: Layout, group: str, collected: Collected | None, report: Report, index: int
) -> list[LayerReport]:
    """Compress the linear layers of a group, which share one Hessian and, if treated alike, its solves.

    The report's seconds are the group's, shared out by size.
    """
    started = time.monotonic()
    factors = None
    if collected is not None:
        moments, name = collected.moments, f"block {index} {group}"
        factors = Hessian(moments.hessian, report.recipe.damp, name, moments.harmonic)
    linears: dict[str, QuantLinear] = {name: block.get_submodule(name) for name in layout.groups[group]}
    wanted = {name: linear.weight for name, linear in linears.items()}
    if collected is not None and collected.drift is not None:
        share = report.recipe.asymmetry
        wanted = {name: target.shifted(weight, collected.drift, factors, share) for name, weight in wanted.items()}
    restored: dict[str, Restored] = {}
    for recipe, names in _treated_alike(report, layout, group, index).items():
        weights = _row_weights(report, index, names) if recipe.needs_gradients else None
        restored |= _restore(recipe, {name: wanted[name] for name in names}, factors, weights, index)
    unseen = None
    if collected is not None and collected.held_out is not None:
        unseen = Hessian(collected.held_out, name=f"block {index} {group}, held out")
    held_out = {name: relative_error(wanted[name].float(), restored[name].weight, unseen) for name in linears}
    for name, linear in linears.items():
        store(linear, restored[name], report.dtype)
    seconds = time.monotonic() - started
    weights = sum(linear.weight.numel() for linear in linears.values())
    return [
        _row(index, name, linear, restored[name], seconds * linear.weight.numel() / weights, held_out[name])
        for name, linear in linears.items()
    ]


def _row_weights(report: Report, index: int, names: list[str]) -> dict[str, Tensor]:
    """(r,) of each layer's rows, their mean 1. Raises ObrError if gradients are missing."""
    slopes = {name: (report.slopes or {}).get(f"{index}.{name}") for name in names}
    for name, gradient in slopes.items():
        if gradient is None:
            raise ObrError(f"{_full(index, name)} has no output gradients; they are of another model.")
    return {name: gradients.row_weights(gradient) for name, gradient in slopes.items()}


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
        {full[name]: weight for name, weight in wanted.items()}, factors, recipe.method,
        bits=recipe.bits, sparsity=recipe.sparsity, pattern=recipe.pattern, mask=recipe.mask, alpha=recipe.alpha,
        scope=recipe.scope, sweeps=recipe.sweeps, group=recipe.group, refit=recipe.refit, damp=recipe.damp,
        clip="minmax" if recipe.clip == "learned" else recipe.clip,  # learned bounds are in the weights already
        # another random mask for every layer
        seed={name: crc32(f"{recipe.seed} {name}".encode()) for name in full.values()},
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
    if recipe.int8_down_proj and group == "down" and recipe.bits < 8:
        recipe = replace(recipe, bits=8)
    if recipe.allocation is None:
        return {recipe: list(names)}
    chosen, found = allocation.chosen_options(report.allocation, "The allocation"), defaultdict(list)
    for name in names:
        if (option := chosen.get((index, name))) not in recipe.options:
            raise ObrError(f"The allocation has no choice of the recipe's for {_full(index, name)}; allocate again.")
        found[recipe.of_layer(option)].append(name)
    return found
