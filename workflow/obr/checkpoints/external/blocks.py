"""Models that other programs quantised, as this package runs them: block by block, or whole."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from obr.checkpoints.external.folder import Dequantised, external_path, open_external
from obr.config.recipe import QUANTIZERS, Recipe
from obr.errors import ObrError
from obr.models import dtypes
from obr.models.blocks import StreamedBlocks
from obr.models.check.folder import Checked
from obr.models.layers import set_quantizers
from obr.models.state import refuse_plain_saving

METHOD = "external"


class ExternalBlocks(StreamedBlocks):
    """The blocks of a checkpoint of another program, dequantised each time they are asked for.

    Args:
        path: folder, or GGUF file.
        recipe: whose settings for activations, queries, keys and values apply; by default the checkpoint's own.
        dtype: of the computation; None for the recipe's, and without one the device's default.

    Raises:
        ObrError: what `folder.open_external` refuses, or activations that this package does not simulate.
    """

    files: Dequantised

    def __init__(self, path: Path, recipe: Recipe | None = None, dtype=None, device: str | None = None):
        found = external_path(path)
        if found is None:
            raise ObrError(f"{path} is no checkpoint that another program quantised; give its folder or GGUF file.")
        self.path = found
        if dtype is None and recipe is not None and recipe.dtype:
            dtype = getattr(torch, recipe.dtype)
        super().__init__(found, None, dtype, device)
        vars(self.config).pop("quantization_config", None)  # nothing that the model still needs
        layout = self.files.layout
        if recipe is None and (left_out := layout.left_out or self._unlike()):
            raise ObrError(
                f"{found} quantises {left_out}, which is not simulated; to evaluate its weights alone, give "
                "the recipe method=external."
            )
        own = replace(self.own_recipe(), activations=layout.activations)
        if recipe is not None:
            own = replace(own, **{key: getattr(recipe, key) for key in (*QUANTIZERS, "dtype", "label")})
        self.recipe, _ = dtypes.resolve_dtype(own, dtype)

    def _checked(self) -> Checked:
        return open_external(self.path)

    def _unlike(self) -> str | None:
        """Which layers' inputs are quantised, if not exactly those of the blocks; None where none or all are."""
        if self.files.layout.activations.bits == 16:
            return None
        quantised, prefix = set(self.files.layers), f"{self.layout.blocks}."
        own = {layer for layer in self.files.layout.shapes if layer.startswith(prefix)}
        if odd := sorted(quantised ^ own):
            return f"inputs of {odd[0]}" if odd[0] in quantised else f"inputs of layers, without those of {odd[0]}"
        return None

    def own_recipe(self) -> Recipe:
        """What the checkpoint says of its weights: the bits and groups that most of them have."""
        counts: dict[tuple, int] = {}
        prefix = f"{self.layout.blocks}."
        for layer in self.files.layers:
            if layer.startswith(prefix):
                how, (rows, columns) = self.files.layout.stored(layer), self.files.layout.shapes[layer]
                key = how.bits, how.group
                counts[key] = counts.get(key, 0) + rows * columns
        bits, group = max(counts, key=lambda key: counts[key]) if counts else (16, None)
        return Recipe.parse({"method": METHOD, "bits": bits, "group": group if bits < 16 else None})

    def load(self, index: int) -> nn.Module:
        """Block `index`, dequantised, with the quantisers of the recipe."""
        block = super().load(index)
        set_quantizers(block, self.layout, self.recipe)
        return block


def load(
    path: str | Path,
    recipe: "Recipe | dict | None" = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> nn.Module:
    """A checkpoint of another program as a transformers model, its weights dequantised in float32.

    recipe: of method "external", for activations, queries, keys and values.

    Raises:
        ObrError: as `ExternalBlocks`.
    """
    blocks = ExternalBlocks(Path(path), None if recipe is None else Recipe.parse(recipe), dtype, device)
    model = blocks.whole()
    model.obr_recipe, model.obr_storage_dtype = blocks.recipe, torch.float32
    refuse_plain_saving(model)
    return model
