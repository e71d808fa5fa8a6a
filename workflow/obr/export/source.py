"""What is exported: a packed checkpoint, its blocks read one at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from obr.checkpoints.format import CheckpointBlocks
from obr.config.quantizer import QuantizerSettings
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.models import online_transforms


class ExportSource:
    """A checkpoint whose blocks are read one at a time, and refused if `form` cannot carry them.

    blocks: of the checkpoint, in float32. form: for messages. inputs: how the inputs of layers are quantised, if the
    format says so.
    """

    def __init__(self, checkpoint: Path, recipe: Recipe, form: str, inputs: QuantizerSettings | None = None):
        self.folder, self.form, self.inputs = checkpoint, form, inputs
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
        for name, spec in online_transforms.specs(block).items():
            if spec.get("type") != "range":  # of activations, which are left out
                raise ObrError(
                    f"{where}.{name} is computed at run time for every token, for which {self.form} has no place; "
                    "compress with a rotation that folds into the weights, or none."
                )
        empty = self.blocks.model.get_submodule(self.layout.blocks)[index]
        for name in self.layout.in_block(block).linears:
            if block.get_submodule(name).bias is not None and empty.get_submodule(name).bias is None:
                raise ObrError(
                    f"{where}.{name} has a bias that {self.config.model_type} models have no place for, so "
                    f"{self.form} has none either; compress without shifts."
                )
