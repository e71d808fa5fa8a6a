"""`obr.compress`: a model in memory, compressed in place."""

import torch
from torch import Tensor, nn

from obr.calibration import collect_hessians, output_gradients
from obr.checkpoints.writer import Report
from obr.compression.blocks import compress_blocks
from obr.compression.hessian_source import check_experts
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.mixed_precision import allocate, sensitivity
from obr.models import dtypes
from obr.models.blocks import Blocks, check_windows
from obr.models.layers import quantizer_settings, set_quantizers
from obr.models.state import changing, check_before_compression, refuse_plain_saving


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
        ObrError: `obr.models.check` refuses the model, what the recipe asks does not fit it, or a layer cannot be
            compressed.

    Example:
        >>> tokens = obr.calibration_tokens(tokenizer, text, nsamples=4, seqlen=64)
        >>> recipe = {"method": "obr_gptq", "bits": 4, "sparsity": 0.5}
        >>> model = obr.compress(obr.load_model("path/to/model"), tokens, recipe, progress=False)
        >>> round(model.obr_report.layers[0].sparsity, 2)
        0.5
    """
    if isinstance(recipe, dict):
        recipe = Recipe.parse({"calibration": "given", **recipe})
    check_before_compression(model)
    if tokens is not None:
        check_windows(tokens)
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
    check_experts(blocks, recipe)
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
    dtype = model.get_input_embeddings().weight.dtype  # not the configuration's, which a cast leaves as it was
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def _measure(blocks: Blocks, tokens: Tensor | None, report: Report, progress: bool) -> None:
    """Put the output gradients and the allocation that the recipe asks for into the report."""
    recipe = report.recipe
    if not recipe.needs_gradients and recipe.allocation is None:
        return
    if tokens is None:
        raise ObrError("The recipe needs output gradients; give calibration tokens.")
    windows = tokens[: output_gradients.WINDOWS, : output_gradients.LENGTH]
    report.output_gradients, _ = output_gradients.squared_gradients(blocks, windows, progress=progress)
    if recipe.allocation is not None:
        chosen = recipe.chosen(len(blocks))
        matrices = (
            (i, own) for i, own in collect_hessians.dense_hessians(blocks, tokens, progress=progress) if i in chosen
        )
        layers = sensitivity.measured_losses(
            blocks, matrices, report.output_gradients, recipe.options, tokens, progress=progress
        )
        report.allocation = allocate.allocate(recipe.allocation, layers).to_dict()
