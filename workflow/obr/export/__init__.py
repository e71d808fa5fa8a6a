"""Ways out of the packed checkpoint: the same codes and scales in layouts that other programs read.

A layout takes weights, dense: zeros are kept as codes of 0 and cost what others cost. What it has no place for is
refused, so that a file that is written computes what was evaluated.
"""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from obr import online
from obr.checkpoint import CheckpointBlocks
from obr.checkpoint_files import read_manifest
from obr.errors import ObrError
from obr.recipe import QUANTIZERS, QuantizerSettings, Recipe

# Format -> the module whose `write(source, out)` writes it and says what it wrote.
FORMATS = {"compressed-tensors": "compressed", "gguf": "gguf_file"}


def export(checkpoint: str | Path, form: str, out: str | Path, weights_only: bool = False) -> str:
    """Write a packed checkpoint in another layout; returns a sentence on what was written.

    form: "compressed-tensors", a folder for transformers and vLLM, or "gguf", a file for llama.cpp.
    weights_only: leave out that activations and KV cache are quantised, which is refused otherwise.

    Raises:
        ObrError: an unknown format, or a checkpoint that it cannot carry; the sentence says what of it.
    """
    if form not in FORMATS:
        raise ObrError(f"Export format {form!r} is unknown; choose from {', '.join(FORMATS)}.")
    recipe = Recipe.parse(read_manifest(Path(checkpoint))["recipe"])
    if recipe.group is not None:
        raise ObrError(
            f"The recipe has scales for groups of {recipe.group} columns, but {form} is written with one a row; "
            "compress with group: null."
        )
    quantised = [what for what in QUANTIZERS if (settings := getattr(recipe, what)) and settings.bits < 16]
    if quantised and not weights_only:
        raise ObrError(
            f"The recipe quantises {' and '.join(quantised)} ({recipe.setting}), which {form} cannot say as it is "
            "done here; with --weights-only the weights alone are exported."
        )
    plain = replace(recipe, **dict.fromkeys(QUANTIZERS, QuantizerSettings()) | {"o_inputs": None})
    return import_module(f"obr.export.{FORMATS[form]}").write(Source(Path(checkpoint), plain, form), Path(out))


class Source:
    """A checkpoint whose blocks are read one at a time, and refused if `form` cannot carry them.

    blocks: of the checkpoint, in float32. form: for messages.
    """

    def __init__(self, checkpoint: Path, recipe: Recipe, form: str):
        self.folder, self.form = checkpoint, form
        self.blocks = CheckpointBlocks(checkpoint, recipe, torch.float32, "cpu")
        self.layout, self.config = self.blocks.layout, self.blocks.config

    def __iter__(self) -> Iterator[tuple[int, nn.Module]]:
        """(number, block), unpacked; every QuantLinear has its `packed` form."""
        for index in range(len(self.blocks)):
            block = self.blocks.load(index)
            self._check(block, index)
            yield index, block

    def _check(self, block: nn.Module, index: int) -> None:
        where = f"{self.layout.blocks}.{index}"
        for name, spec in online.specs(block).items():
            if spec.get("type") != "range":  # of activations, which are left out
                raise ObrError(
                    f"{where}.{name} is computed anew for every token, for which {self.form} has no place; compress "
                    "with a rotation that folds into the weights, or none."
                )
        empty = self.blocks.model.get_submodule(self.layout.blocks)[index]
        for name in self.layout.linears:
            if block.get_submodule(name).bias is not None and empty.get_submodule(name).bias is None:
                raise ObrError(
                    f"{where}.{name} has a bias that {self.config.model_type} models have no place for, so "
                    f"{self.form} has none either; compress without shifts."
                )
