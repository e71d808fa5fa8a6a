"""Checkpoints as OBR's authors released them, verified and made into packed checkpoints.

A released checkpoint is the state dict of a transformed model whose linear layers hold fake-quantised 16-bit weights.
The paper's front ends write three layouts: QuaRot's, SpinQuant's (module `wrapped`) and FlatQuant's (`flatquant`).
The layout of a file is determined from the names and shapes of its tensors. Buffers of quantisers are ignored by
name; other tensors that are missing or unexpected are refused.
"""

import re
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from obr.checkpoints.external.stage import import_external
from obr.checkpoints.format import save_block
from obr.checkpoints.released.flatquant import FlatQuant
from obr.checkpoints.released.reader import Reader
from obr.checkpoints.released.state import StateDict
from obr.checkpoints.released.verified import Verified
from obr.checkpoints.released.wrapped import QuaRot, SpinQuant
from obr.checkpoints.writer import LayerReport, Report, Writer, store
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.methods.restore import Restored
from obr.models.blocks import StreamedBlocks
from obr.runtime.files import read_json
from obr.runtime.progress import Progress
from obr.runtime.provenance import fingerprint

READERS = {reader.kind: reader for reader in (QuaRot, SpinQuant, FlatQuant)}
FLAT = re.compile(r"\.(ln|o|kcache|vcache|up_gate|down)_trans\.(?P<part>.*)")
WRAPPER = re.compile(r"\.module\.weight$|\.had_K$|\.(quantizer|out_quantizer|k_quantizer)\.(maxq|scale|zero)$")
# Least cosine between a released layer and the base model's, folded, over the root of the share of kept weights.
# At 50 % the bound is 0.42. On SmolLM2-135M at 4 bits OBR leaves 0.89 or more with Wanda's masks, 0.44 or more with
# random ones; transforms that are transposed or swapped leave 0.25 at most.
ALIKE = 0.6


def reader_of(state: StateDict, blocks: StreamedBlocks) -> Reader:
    """The reader for the layout of a file.

    FlatQuant's layout has transforms as matrices. QuaRot's norms have one element. SpinQuant's norms have the model's
    width, and its layers are wrapped.

    Raises:
        ObrError: a file of no layout that is known, or one that does not fit the base model.
    """
    return READERS[_layout(state, blocks)](state, blocks)


def _layout(state: StateDict, blocks: StreamedBlocks) -> str:
    flat = {name: match["part"] for name in state.headers if (match := FLAT.search(name))}
    if any(part.startswith("matrix") for part in flat.values()):
        return "flatquant"
    if flat:
        raise ObrError(
            f"{state.folder} holds FlatQuant's transforms as they are learned, such as {min(flat)!r}; save the state "
            "dict after reparameterize_model."
        )
    layout = blocks.layout
    names = {f"{layout.final_norm}.weight"} | {
        f"{layout.blocks}.{i}.{norm}.weight" for i in range(len(blocks)) for norm in layout.norms.values()
    }
    wide = {name: torch.Size(state.shape(name)).numel() > 1 for name in sorted(names) if name in state}
    if wide and not all(wide.values()):
        return "quarot"
    if wide and any(WRAPPER.search(name) for name in state.headers):
        return "spinquant"
    raise ObrError(
        f"{state.folder} is in none of the layouts of QuaRot, SpinQuant and FlatQuant: it has no transforms, wrapped "
        f"layers or norms of one element, but {min(state.headers)!r}; give a checkpoint that one of them has saved."
    )


@torch.no_grad()
def import_released(model: Path, released: Path, recipe: Recipe, out: Path) -> dict:
    """The stage: verify a released checkpoint and write it as a packed one; returns the manifest.

    A recipe of method `external` takes over another program's checkpoint, see `external.stage`. The weights are kept
    as they are, in the dtype of the file. `released` in the manifest has the layout and what was verified. An
    interrupted run continues with its first unfinished block.

    Args:
        model: the folder of the base model: configuration, tokenizer, and layers to compare with.
        released: what `download_released` wrote.

    Raises:
        ObrError: missing or unexpected tensors, other shapes, weights that are not what the recipe says, or the
            blocks of an unfinished run of another one.
    """
    if recipe.method == "external":
        return import_external(model, released, recipe, out)
    about = read_json(Path(released) / "source.json")
    state = StateDict(Path(released) / about["folder"])
    blocks = StreamedBlocks(model, None, torch.float32, "cpu")
    reader = reader_of(state, blocks)
    _check_recipe(recipe, reader, state)
    reader.fill_ends()
    report = Report(recipe, reader.dtype, rotation=reader.about(), source=about, device="cpu")
    run = fingerprint(
        "checkpoints.released.stage", model, {}, device="cpu", dtype=str(reader.dtype), recipe=recipe.decisive(),
        released=about.get("sha256") or state.stamps(),
    )  # fmt: skip
    writer, verified = Writer(out, blocks, reader.dtype, run), Verified()
    with Progress("released", len(blocks)) as shown:
        for index in range(len(blocks)):
            finished = writer.unfinished.note(index)
            note = finished or _import_block(reader, index, recipe, writer)
            shown.resume() if finished else shown.block()
            report.layers += [LayerReport.of(row) for row in note["layers"]]
            report.seconds += note["seconds"]
            verified.join(Verified.of(note["verified"]))
    report.released = {"layout": reader.kind} | vars(verified)
    return writer.finish(report, tokenizer_from=model)


def _check_recipe(recipe: Recipe, reader: Reader, state: StateDict) -> None:
    """Raise ObrError if the recipe contradicts the file's layout, or takes a part of the checkpoint."""
    if recipe.rotation in READERS and recipe.rotation != reader.kind:
        raise ObrError(
            f"{state.folder} is in the layout of {reader.kind}, but the recipe's rotation is {recipe.rotation}; "
            "correct one of them."
        )
    if recipe.blocks is not None:
        raise ObrError(
            f"The recipe's blocks are {recipe.blocks!r}, but a released checkpoint is taken whole; drop them."
        )


def _import_block(reader: Reader, index: int, recipe: Recipe, writer: Writer) -> dict:
    """Verify and write a block; returns the note on it."""
    started, verified, rows = time.monotonic(), Verified(), []
    layout, block = reader.layout, reader.block(index)
    alike = reader.likeness(index, block)
    for name in layout.linears:
        eight = recipe.int8_down_proj and name in layout.groups["down"] and recipe.bits < 8
        own = replace(recipe, bits=8) if eight else recipe
        where = f"block {index} {name}"
        verified.add(block.get_submodule(name).weight.data, own, where, reader.dtype)
        if name in alike:
            _check_likeness(alike[name], own, where)
            verified.resembles(alike[name])
        rows.append(_import_layer(block, name, index, own, reader.dtype))
    note = {"layers": [row.noted() for row in rows], "verified": vars(verified)}
    note["seconds"] = time.monotonic() - started
    writer.unfinished.keep(index, lambda path: save_block(block, layout, path, reader.dtype), note)
    return note


def _check_likeness(cosine: float, recipe: Recipe, where: str) -> None:
    least = ALIKE * (1 - recipe.sparsity) ** 0.5
    if not cosine > least:
        raise ObrError(
            f"{where} resembles the base model's layer, folded by the file's own transforms, by a cosine of "
            f"{cosine:.3f}, not more than {least:.3f}; its transforms or weights are transposed or of another model."
        )


def _import_layer(block: nn.Module, name: str, index: int, recipe: Recipe, dtype: torch.dtype) -> LayerReport:
    """Store a layer as it is."""
    linear = block.get_submodule(name)
    weight = linear.weight.data
    mask = weight != 0
    store(linear, Restored(weight, None, None, mask, float("nan"), 16, None), dtype)
    return LayerReport(
        block=index, layer=name, rows=weight.shape[0], columns=weight.shape[1], bits=recipe.bits,
        pattern=recipe.pattern or "", sparsity=recipe.sparsity, zeros=float((~mask).float().mean()),
        relative_error=float("nan"), damp=0.0, seconds=0.0, packed_bytes=linear.packed.bytes, flags="",
    )  # fmt: skip


def summary(manifest: dict) -> str:
    """What was verified, for the log."""
    if "external" in manifest:
        bits = manifest["bits_per_weight"]
        return (
            f"{manifest['external']['format']}, {bits['theoretical']:.2f} bits a weight, {bits['file']:.2f} in the "
            f"file, {100 * manifest['zeros']:.2f} % zeros, {manifest['file_bytes'] / 1e6:,.1f} MB."
        )
    found, recipe = manifest["released"], manifest["recipe"]
    alike = found["likeness"]
    compared = (
        f"; layers resemble the base model's, folded, by a cosine of {alike:.3f} or more" if alike is not None else ""
    )
    return (
        f"layout of {found['layout']}, {found['rows']:,} rows: at most {found['levels']} values in a row of "
        f"{2 ** recipe['bits']} allowed, {100 * found['least_zeros']:.2f} to {100 * found['most_zeros']:.2f} % "
        f"zeros, {found['off_grid']:,} rows off a grid of one step{compared}."
    )
