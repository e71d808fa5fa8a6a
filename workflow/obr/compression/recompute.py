"""Layers of a packed checkpoint recomputed from what its manifest names, and compared with those that it holds."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from obr.calibration import output_gradients
from obr.calibration.expert_inputs import is_of_expert
from obr.checkpoints.files import check_files, read_manifest
from obr.checkpoints.format import round_ends, round_rest, stored_block
from obr.checkpoints.packing import unpack
from obr.checkpoints.writer import Report
from obr.compression.blocks import compress_group
from obr.compression.hessian_source import HessianSource
from obr.config import paths
from obr.config.recipe import Recipe
from obr.data import token_windows
from obr.errors import ObrError
from obr.models.architectures import prefix_of
from obr.models.blocks import StreamedBlocks
from obr.models.layers import QuantLinear
from obr.rotations import apply
from obr.runtime import processor
from obr.runtime.progress import Progress
from obr.runtime.provenance import fingerprint

DIFFERENT = 0.002  # of a row's largest weight: less than a step of 8 bits, more than rounding to 16
TOLERATED = 0.01  # of a layer's weights: other processors and thread counts break ties of rounding otherwise


@dataclass(frozen=True)
class Places:
    """Where the inputs of a checkpoint lie; None: where the workflow would have put them."""

    model: Path | None = None
    rotation: Path | None = None
    tokens: Path | None = None
    hessians: Path | None = None
    gradients: Path | None = None


@dataclass(frozen=True)
class Repeated:
    """A recomputed layer. identical: to the last bit. differing: fraction of its weights that do. made_by, again_by:
    the processors, as `processor.about` has them; made_by is None if the manifest does not say."""

    block: int
    layer: str
    identical: bool
    differing: float
    made_by: dict | None = None
    again_by: dict | None = None


@torch.no_grad()
def repeat(directory: Path, count: int, places: Places = Places(), device: str | None = None) -> list[Repeated]:
    """Recompute `count` layers, the same ones at every call, and those that share their Hessian.

    Large products are taken in the dtype that the manifest names for the block, whatever this processor would choose.
    With sequential Hessians the calibration windows pass through the checkpoint's own blocks up to the last of them.

    Raises:
        ObrError: the manifest does not suffice, or an input is missing or not the one it names.
    """
    directory, manifest = Path(directory), read_manifest(Path(directory))
    check_files(directory, manifest)
    recipe = Recipe.parse(manifest["recipe"])
    made_from = manifest.get("inputs")
    if recipe.adopted:
        raise ObrError(f"{directory} holds layers that others compressed; verify it without --recompute.")
    if recipe.refine_steps:
        raise ObrError(
            f"{directory} was refined block by block after its layers were compressed; they cannot be made again one "
            "by one: verify it without --recompute."
        )
    if made_from is None:
        raise ObrError(
            f"{directory}/manifest.json does not say what its layers were made from (it was saved from memory); they "
            "cannot be made again."
        )
    places = _found(directory, recipe, places)
    _check(made_from, recipe, places)
    torch.set_num_threads(manifest.get("threads") or torch.get_num_threads())
    dtype = getattr(torch, made_from["dtype"].removeprefix("torch."))
    blocks = apply.open_blocks(places.model, places.rotation, dtype, device)
    if recipe.clip == "learned":
        apply.clip_weights(blocks)
    windows = token_windows.load_tokens(places.tokens)[0] if places.tokens else None
    report = Report(recipe, blocks.storage_dtype, allocation=manifest.get("allocation"))
    if places.gradients:
        report.output_gradients, _ = output_gradients.load(places.gradients, blocks.target)
    round_ends(blocks.model, blocks.layout, report.dtype)
    layers = [(index, name) for index in recipe.chosen(len(blocks)) for name in blocks.layout_at(index).linears]
    chosen = random.Random("obr verify").sample(layers, min(count, len(layers)))
    statistics = HessianSource(blocks, recipe, windows, places.hessians)
    makers = _makers(directory, manifest)
    try:
        return _repeated(manifest, directory, blocks, statistics, report, chosen, makers)
    finally:
        processor.require_products(None)


def _makers(directory: Path, manifest: dict) -> dict[int, dict]:
    """The processor of each block; none in older manifests. Raises ObrError if the entry is malformed."""
    try:
        makers = {index: maker for maker in manifest.get("processors", []) for index in maker["blocks"]}
        if all(processor.summary(maker) and maker["products"] in processor.PRODUCTS for maker in makers.values()):
            return makers
    except (KeyError, TypeError, AttributeError):
        pass
    raise ObrError(f"{directory}/manifest.json has malformed 'processors'; it was altered: compress again.")


def _found(directory: Path, recipe: Recipe, places: Places) -> Places:
    """Every input's place; the workflow keeps a checkpoint in <results>/compressed/<model>/<recipe>."""
    *_, model, _ = directory.resolve().parts
    results = directory.resolve().parents[2]
    cached = recipe.hessian == "cached"
    names = {"model": model, "rotation": recipe.rotation, "calibration": str(recipe.calibration)}
    usual = {"model": paths.folder(results, "model", **names)}
    if recipe.rotation != "none":
        usual["rotation"] = paths.path(results, "rotation", **names)
    if recipe.needs_hessian and cached:
        usual["hessians"] = paths.folder(results, "hessians", **names)
    elif recipe.needs_hessian:
        usual["tokens"] = paths.path(results, "calibration", **names)
    if recipe.needs_gradients:
        usual["gradients"] = paths.path(results, "gradients", **names)
    found = {name: getattr(places, name) or path for name, path in usual.items()}
    for name, path in found.items():
        if not path.exists():
            raise ObrError(f"{path} does not exist; say with --{name} where the checkpoint's {name} lies.")
    return Places(**found)


def _check(made_from: dict, recipe: Recipe, places: Places) -> None:
    """Raise ObrError unless the inputs are those of the manifest, by their hashes; the code may be newer."""
    calibration = places.hessians / "hessian.json" if places.hessians else places.tokens
    files = {"rotation": places.rotation, "calibration": calibration, "gradients": places.gradients}
    here = fingerprint("compression.stage", places.model, files, device="cpu", dtype="", recipe=recipe.decisive())
    made_from = {**made_from, "recipe": Recipe.parse(made_from["recipe"]).decisive()}  # with fields of later versions
    for name in ("model", "rotation", "calibration", "gradients", "recipe"):
        if name in made_from and made_from[name] != here[name]:
            raise ObrError(f"The {name} given is not the one that the checkpoint was made from; give that one.")


def _repeated(
    manifest: dict,
    directory: Path,
    blocks: StreamedBlocks,
    statistics: HessianSource,
    report: Report,
    chosen: list[tuple[int, str]],
    makers: dict[int, dict],
) -> list[Repeated]:
    """makers: the processor of each block. One parameter for each part of a recomputation."""
    found, wanted = [], {(index, blocks.layout_at(index).group_of(name)) for index, name in chosen}
    last = max(index for index, _ in wanted)
    with Progress("recomputing", last + 1) as shown:
        for index in range(last + 1) if statistics.hidden is not None else sorted({i for i, _ in wanted}):
            stored = statistics.resumed(index, stored_block(blocks, index, directory, manifest))
            if any(index == i for i, _ in wanted):
                processor.require_products(makers[index]["products"] if index in makers else None)
                again_by = processor.description(blocks.target.type)
                block = statistics.prepared(index, blocks.load(index))
                layout = blocks.layout_at(index)
                round_rest(block, layout, report.dtype)
                statistics.begin(block, index)
                for group, names in layout.groups.items():
                    later = (index, f"{prefix_of(group)}down")  # collected with its expert's first, in some scopes
                    if (index, group) in wanted or (is_of_expert(group) and later in wanted):
                        collected = statistics.collected(block, index, group)
                    if (index, group) in wanted:
                        compress_group(block, layout, group, collected, report, index)
                    for name in names:
                        here, there = block.get_submodule(name), stored.get_submodule(name)
                        if (index, name) in chosen:
                            found.append(Repeated(index, name, *_compared(here, there), makers.get(index), again_by))
                        here.weight.data = there.weight.data  # what comes after has read the stored ones
            if index < last:
                statistics.advance(index, stored)
            shown.block()
    return found


def _compared(here: QuantLinear, there: QuantLinear) -> tuple[bool, float]:
    """(whether the stored forms are equal to the last bit, fraction of weights that differ)."""
    ours, theirs = here.packed, there.packed
    same = ours.about == theirs.about and ours.tensors.keys() == theirs.tensors.keys()
    if same and all(torch.equal(ours.tensors[part], theirs.tensors[part]) for part in ours.tensors):
        return True, 0.0
    return False, differing(unpack(ours).weight, unpack(theirs).weight)


def differing(one: Tensor, other: Tensor) -> float:
    """Fraction of the weights (r, n) that differ by more than DIFFERENT times their row's largest."""
    largest = other.abs().amax(1, keepdim=True)
    return float(((one - other).abs() > DIFFERENT * largest).float().mean())


def summary(layer: Repeated) -> str:
    """Such as "block 3 mlp.up_proj, made again: identical"; where weights differ and processors do, these too."""
    outcome = "identical" if layer.identical else f"{100 * layer.differing:.3f} % of its weights differ"
    if (
        not layer.identical
        and layer.made_by
        and layer.made_by != layer.again_by | {"blocks": layer.made_by["blocks"]}
    ):
        outcome += f" (made by {processor.summary(layer.made_by)}, again by {processor.summary(layer.again_by)})"
    return f"block {layer.block} {layer.layer}, made again: {outcome}"
