"""Ways out of the packed checkpoint: the same codes and scales in layouts that other programs read.

A layout takes weights, dense: zeros are kept as codes of 0 and cost what others cost. What it has no place for is
refused, so that a file that is written computes what was evaluated.
"""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

from obr.checkpoints.files import check_contents, read_manifest
from obr.config.quantizer import QuantizerSettings
from obr.config.recipe import QUANTIZERS, Recipe
from obr.errors import ObrError
from obr.export.source import ExportSource

# Format -> the module whose `write(source, out)` writes it and says what it wrote.
FORMATS = {"compressed-tensors": "compressed_tensors", "gguf": "gguf"}


def export(checkpoint: str | Path, form: str, out: str | Path, weights_only: bool = False) -> str:
    """Write a packed checkpoint in another layout; returns a sentence on what was written.

    form: "compressed-tensors", a folder for transformers and vLLM, or "gguf", a file for llama.cpp.
    weights_only: leave out that activations and KV cache are quantised, which is refused otherwise. Activations of 8
    bits with one scale a token need not be left out of "compressed-tensors".

    Raises:
        ObrError: an unknown format, or a checkpoint that it cannot carry; the sentence says what of it.
    """
    if form not in FORMATS:
        raise ObrError(f"Export format {form!r} is unknown; choose from {', '.join(FORMATS)}.")
    manifest = read_manifest(Path(checkpoint))
    check_contents(Path(checkpoint), manifest)
    recipe = Recipe.parse(manifest["recipe"])
    if recipe.group is not None:
        raise ObrError(
            f"The recipe has scales for groups of {recipe.group} columns, but {form} is written with one a row; "
            "compress with group: null."
        )
    quantised = [what for what in QUANTIZERS if (settings := getattr(recipe, what)) and settings.bits < 16]
    inputs = None if weights_only or form != "compressed-tensors" else _per_token(recipe)
    if quantised and not weights_only and not (inputs and quantised == ["activations"]):
        raise ObrError(
            f"The recipe quantises {' and '.join(quantised)} ({recipe.setting}), which {form} cannot say as it is "
            "done here; with --weights-only the weights alone are exported."
        )
    plain = replace(recipe, **dict.fromkeys(QUANTIZERS, QuantizerSettings()) | {"o_inputs": None})
    source = ExportSource(Path(checkpoint), plain, form, inputs)
    return import_module(f"obr.export.{FORMATS[form]}").write(source, Path(out))


def _per_token(recipe: Recipe) -> QuantizerSettings | None:
    """The quantiser of activations, if other programs have it: 8 bits, one scale a token, the whole range."""
    settings = recipe.activations
    plain = settings.bits == 8 and settings.group_size is None and settings.clip_ratio == 1.0
    return settings if plain and recipe.bits < 16 and recipe.o_inputs is None else None
