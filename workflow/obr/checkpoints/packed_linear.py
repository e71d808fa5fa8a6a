"""Models that compute with their packed weights: what the fake-quantised layers simulate."""

from pathlib import Path

import torch
from torch import Tensor, nn

from obr.checkpoints import format
from obr.checkpoints.external import blocks as external
from obr.checkpoints.external.folder import external_path
from obr.checkpoints.format import CheckpointBlocks
from obr.checkpoints.packed_kernels import check_layer, check_recipe, kernels_of
from obr.checkpoints.packing import unpack
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.models.architectures import Layout
from obr.models.layers import QuantLinear
from obr.models.state import refuse_plain_saving
from obr.runtime.allocator import return_freed_memory


class PackedLinear(QuantLinear):
    """A compressed QuantLinear whose codes of 2 to 4 bits stay packed: products of codes, then the scales.

    It computes on the device of the layer it is made of. Its output (..., r) is that layer's up to the rounding of
    floats. There is no weight to read or to change.

    Raises:
        ObrError: what the device's kernels have no form for: other bits than 2 to 4, activations in groups or of 9 to
            15 bits; on a CPU also scales for groups of columns and activations of 16 bits; no compiler, no Triton.
    """

    def __init__(self, linear: QuantLinear, name: str = "layer"):
        nn.Module.__init__(self)
        device = linear.weight.device
        check_layer(linear.packed and linear.packed.about, linear.activations, name, device.type)
        for part in ("shift", "transform", "range", "activations"):
            setattr(self, part, getattr(linear, part))
        self.observer, self.observes_quantised, self.packed = None, False, None
        self.register_parameter("bias", linear.bias)
        self.kernel = kernels_of(device.type)(unpack(linear.packed), device)

    @property
    def weight(self) -> Tensor:
        """Raises ObrError: no weight exists."""
        raise ObrError("The layer is packed, there is no weight to read; load the checkpoint without packed=True.")

    def forward(self, x: Tensor) -> Tensor:
        """(..., r) of x (..., n): shifted, transformed, quantised, then multiplied by the packed weight."""
        for step in (self.shift, self.transform):
            x = x if step is None else step(x)
        out = self.kernel(x.reshape(-1, x.shape[-1]), self.activations, self.range, self.bias)
        return out.view(*x.shape[:-1], self.kernel.rows)

    def extra_repr(self) -> str:
        kernel = self.kernel
        return (
            f"columns={kernel.columns}, rows={kernel.rows}, activations={self.activations.bits}, "
            f"layout={kernel.layout}, bits={kernel.bits_per_weight:.3f}"
        )


class PackedBlocks(CheckpointBlocks):
    """The blocks of a checkpoint, each with a PackedLinear in place of every linear layer of at most 4 bits.

    Others, such as 8-bit down_proj, stay as they are and compute the same.

    Raises:
        ObrError: a recipe or device that packed layers cannot compute as it asks.
    """

    def __init__(self, directory: Path, recipe: Recipe | None = None, dtype=None, device: str | None = None):
        super().__init__(directory, recipe, dtype, device)
        check_recipe(self.recipe, self.target.type)

    def load(self, index: int) -> nn.Module:
        """Block `index`, its linear layers packed."""
        block = super().load(index)
        _pack_linears(block, self.layout)
        return_freed_memory()
        return block


def load(
    directory: str | Path,
    recipe: "Recipe | dict | None" = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    packed: bool = False,
) -> nn.Module:
    """A compressed model, whole, as a transformers model: weights unpacked, quantisers and transforms in place.

    directory: a packed checkpoint; or the folder or GGUF file of a model that GPTQ, AWQ, AutoRound,
    compressed-tensors or llama.cpp quantised, whose weights are dequantised.
    recipe: overrides the checkpoint's settings for activations, keys and values; of another program's checkpoint its
    method is "external".
    packed: weights stay packed and are multiplied by the integers that activations are rounded to; the same model
        up to the rounding of floats, in less memory and time. On a CPU for activations of at most 8 bits and one
        scale a row; on a GPU, with Triton, for 16 bits and groups of columns, too.

    Raises:
        ObrError: the folder is not a whole checkpoint of a format that is read, or not one that `packed` can compute.

    Example:
        >>> model = obr.compress(obr.load_model("path/to/model"), None, {"method": "rtn"}, progress=False)
        >>> manifest = obr.save(model, "rounded", tokenizer)
        >>> obr.load("rounded").config.hidden_size == model.config.hidden_size
        True
    """
    if external_path(directory) is not None:
        if packed:
            raise ObrError(
                f"{directory} is another program's checkpoint, which has no packed form; pass packed=False."
            )
        return external.load(directory, recipe, dtype, device)
    if not packed:
        return format.load(directory, recipe, dtype, device)
    blocks = PackedBlocks(Path(directory), Recipe.parse(recipe) if recipe is not None else None, dtype, device)
    model = blocks.whole()
    model.obr_recipe = blocks.recipe
    refuse_plain_saving(model)
    return model


def _pack_linears(block: nn.Module, layout: Layout) -> None:
    for name in layout.in_block(block).linears:
        linear = block.get_submodule(name)
        if linear.packed.about["bits"] <= 4:
            block.set_submodule(name, PackedLinear(linear, name))
