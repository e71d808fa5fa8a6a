"""The stage compress: a model folder in, a packed checkpoint out."""

from pathlib import Path

import torch

from obr.calibration import output_gradients
from obr.checkpoints.referred import is_referred
from obr.checkpoints.writer import Report, Writer
from obr.compression.blocks import compress_blocks
from obr.compression.hessian_source import check_experts
from obr.config.model_sizes import read_config
from obr.config.recipe import Recipe
from obr.config.workflow import check_widths
from obr.data import token_windows
from obr.errors import ObrError
from obr.models import dtypes
from obr.models.architectures import with_defaults
from obr.models.hidden_states import MemoryBudget
from obr.rotations import apply
from obr.runtime.files import read_json
from obr.runtime.provenance import check_measured_on, fingerprint


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
    megabytes: float = MemoryBudget.megabytes,
) -> dict:
    """The stage: a downloaded model to a packed checkpoint, streamed; returns the manifest.

    One parameter per flag of `obr compress`. An interrupted run goes on with the block it was at. The checkpoint of a
    dense recipe without a rotation refers to the blocks in `model`.

    Args:
        rotation: the rotation's file, None for none. tokens: calibration windows, for sequential Hessians.
        hessians: folder of cached Hessians, used if the recipe says so.
        gradient_file, allocation_file: of the stages gradients and allocate, if the recipe needs them.
        dtype: of the computation, before the recipe's own; None for that, and without one the device's default.
        megabytes: of memory for the hidden states of the calibration, see `MemoryBudget`.

    Raises:
        ObrError: files that do not fit the recipe or its dtype, or the blocks of an unfinished run of another one.
    """
    _check_inputs(recipe, rotation, tokens, hessians)
    _check_layerwise(recipe, gradient_file, allocation_file)
    patterns = {option.label: option.pattern for option in recipe.options} or {recipe.method: recipe.pattern}
    check_widths(with_defaults(read_config(model)), patterns, model.name)
    recipe, dtype = dtypes.resolve_dtype(recipe, dtype)
    blocks = apply.open_blocks(model, rotation, dtype, device)
    check_experts(blocks, recipe)
    report = Report(recipe, blocks.storage_dtype, blocks.dtype, device=str(blocks.target))
    report.source = read_json(model / "source.json") if (model / "source.json").exists() else None
    if recipe.clip == "learned":
        apply.clip_weights(blocks)
    report.rotation = blocks.rotation.about() if rotation else None
    windows = None
    if recipe.needs_hessian and recipe.hessian == "sequential":
        windows, report.calibration = token_windows.load_tokens(tokens)
    elif recipe.needs_hessian or hessians:
        noted = read_json(hessians / "hessian.json")
        dtypes.check_shared(recipe, noted.get("dtype"), f"The Hessians in {hessians}")
        check_measured_on(noted, f"The Hessians in {hessians}", model, rotation)
        report.calibration = noted["calibration"]
    cached = hessians if windows is None else None
    files = {"rotation": rotation, "calibration": tokens if cached is None else cached / "hessian.json"}
    files |= _read_layerwise(report, gradient_file, allocation_file, blocks.target)
    computed = {"device": str(blocks.target), "dtype": str(blocks.dtype)}
    run = fingerprint("compression.stage", model, files, **computed, recipe=recipe.decisive())
    writer = Writer(out, blocks, report.dtype, run, model if is_referred(recipe) else None)
    compress_blocks(blocks, windows, cached, report, writer, MemoryBudget(megabytes, writer.unfinished.folder))
    return writer.finish(report, tokenizer_from=model)


def _read_layerwise(
    report: Report, gradient_file: Path | None, allocation_file: Path | None, device: torch.device
) -> dict[str, Path]:
    """Put the output gradients and the allocation that the recipe needs into the report; returns their files."""
    recipe, files = report.recipe, {}
    if recipe.needs_gradients:
        files["gradients"] = gradient_file
        report.output_gradients, notes = output_gradients.load(gradient_file, device)
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
