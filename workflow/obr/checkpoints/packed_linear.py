"""Models that compute with their packed weights, on the CPU: what the fake-quantised layers simulate."""

from pathlib import Path

from torch import Tensor, nn

from obr.checkpoints import format
from obr.checkpoints.format import CheckpointBlocks
from obr.checkpoints.packing import unpack
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.kernels.int4 import packed_weight
from obr.models.architectures import Layout
from obr.models.layers import QuantLinear
from obr.models.state import refuse_plain_saving
from obr.runtime.allocator import return_freed_memory


class PackedLinear(QuantLinear):
    """A compressed QuantLinear whose 4-bit codes stay packed: integer products, then the scales.

    Its output (..., r) is that of the layer it is made of up to the rounding of floats. There is no weight to read
    or to change.

    Raises:
        ObrError: what the kernels have no form for: other bits than 2 to 4, scales for groups of columns,
            activations in groups or of more than 8 bits; no compiler.
    """

    def __init__(self, linear: QuantLinear, name: str = "layer"):
        nn.Module.__init__(self)
        _check(linear, name)
        for part in ("shift", "transform", "range", "activations"):
            setattr(self, part, getattr(linear, part))
        self.observer, self.observes_quantised, self.packed = None, False, None
        self.register_parameter("bias", linear.bias)
        restored = unpack(linear.packed)
        self.kernel = packed_weight.Weight.pack(restored.codes, restored.scale, restored.mask, restored.pattern)

    @property
    def weight(self):
        raise ObrError("The layer is packed, there is no weight to read; load the checkpoint without packed=True.")

    def forward(self, x: Tensor) -> Tensor:
        for step in (self.shift, self.transform):
            x = x if step is None else step(x)
        tokens = packed_weight.quantize(x.reshape(-1, x.shape[-1]), self.activations, self.range)
        return self.kernel.multiply(tokens, self.bias).view(*x.shape[:-1], self.kernel.rows).to(x.dtype)

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
        if device not in (None, "cpu"):
            raise ObrError(f"Packed layers compute on the CPU, not on {device}; pass device='cpu', or packed=False.")
        super().__init__(directory, recipe, dtype, "cpu")
        _check_recipe(self.recipe)

    def load(self, index: int) -> nn.Module:
        block = super().load(index)
        _pack_linears(block, self.layout)
        return_freed_memory()
        return block


def load(
    directory: str | Path,
    recipe: "Recipe | dict | None" = None,
    dtype=None,
    device: str | None = None,
    packed: bool = False,
):
    """A compressed model, whole, as a transformers model: weights unpacked, quantisers and transforms in place.

    recipe: overrides the checkpoint's settings for activations, keys and values.
    packed: weights stay packed and are multiplied, on the CPU, by the integers that activations are rounded to;
        the same model up to the rounding of floats, in less memory and time. For activations of at most 8 bits.

    Raises:
        ObrError: the folder is not a whole checkpoint of this format, or not one that `packed` can compute.

    Example:
        >>> model = obr.compress(obr.load_model("path/to/model"), None, {"method": "rtn"}, progress=False)
        >>> manifest = obr.save(model, "rounded", tokenizer)
        >>> obr.load("rounded").config.hidden_size == model.config.hidden_size
        True
    """
    if not packed:
        return format.load(directory, recipe, dtype, device)
    blocks = PackedBlocks(Path(directory), Recipe.parse(recipe) if recipe is not None else None, dtype, device)
    model = blocks.whole()
    model.obr_recipe = blocks.recipe
    refuse_plain_saving(model)
    return model


def _pack_linears(block: nn.Module, layout: Layout) -> None:
    for name in layout.linears:
        linear = block.get_submodule(name)
        if linear.packed.about["bits"] <= 4:
            block.set_submodule(name, PackedLinear(linear, name))


def _check_recipe(recipe: Recipe) -> None:
    if recipe.method == "released":
        raise ObrError(
            "Released weights are stored at 16 bits, which no packed kernel multiplies; pass packed=False."
        )
    if recipe.bits > 4:
        raise ObrError(f"Weights of {recipe.bits} bits have no packed kernel; compress with 2 to 4, or packed=False.")
    if recipe.activations.bits > 8:
        raise ObrError(
            f"The recipe keeps activations at {recipe.activations.bits} bits, packed kernels multiply by 8 at most; "
            "to change what the model computes, pass a recipe whose activations have 8 bits, else packed=False."
        )


def _check(linear: QuantLinear, name: str) -> None:
    settings = linear.activations
    if linear.packed is None:
        raise ObrError(f"{name} is not compressed; run obr.compress first.")
    if linear.packed.about["bits"] > 4:
        raise ObrError(f"{name} has weights of {linear.packed.about['bits']} bits; load it with packed=False.")
    if group := linear.packed.about.get("group"):
        raise ObrError(f"{name} has scales for groups of {group} columns; load it with packed=False.")
    if settings.bits > 8 or settings.group_size is not None:
        raise ObrError(
            f"{name} reads activations of {settings.bits} bits, group_size {settings.group_size}; packed kernels "
            "take 2 to 8 bits and one scale a token, so load it with packed=False."
        )
