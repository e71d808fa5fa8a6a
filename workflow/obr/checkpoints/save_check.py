"""Whether a model in memory still is what `obr.compress` made of it, so that what is saved is what it computes."""

import torch
from torch import nn

from obr.checkpoints.packing import unpack
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.models.architectures import Layout
from obr.models.check.memory import check_finished
from obr.models.layers import quantizer_settings


def check_before_saving(model: nn.Module) -> None:
    """Raise ObrError unless the model is what `obr.compress` has made of it, complete.

    Raises:
        ObrError: no compression in memory, or one that did not finish.
    """
    check_finished(model)
    if vars(model).get("obr_report") is not None:
        return
    if vars(model).get("obr_recipe") is not None:
        raise ObrError("The model was read from a checkpoint; copy that folder instead of saving the model again.")
    raise ObrError("The model is not compressed; run obr.compress before obr.save.")


def check_block_as_compressed(
    block: nn.Module, layout: Layout, recipe: Recipe, quantised: bool, dtype: torch.dtype, where: str
) -> None:
    """Raise ObrError unless a compressed block computes what its file will hold.

    recipe: of the compression. quantised: whether the recipe's quantisers are on in this block. dtype: in which norms
    and biases are stored. where: name of the block in messages.
    """
    layout = layout.in_block(block)
    for name in layout.linears:
        linear = block.get_submodule(name)
        if linear.packed is None:
            raise ObrError(f"{where}.{name} is not compressed; run obr.compress before obr.save.")
        if not torch.equal(unpack(linear.packed).weight.to(linear.weight), linear.weight):
            raise ObrError(f"The weights of {where}.{name} have changed since obr.compress; compress a model again.")
    packed = {f"{name}.weight" for name in layout.linears}
    for name, parameter in block.named_parameters():
        if name not in packed:
            check_stored(parameter, dtype, f"{where}.{name}")
    _check_quantisers(block, layout, recipe if quantised else Recipe(method="dense"), where)


def check_stored(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise ObrError if storing a tensor in `dtype` would change it: compression has rounded it to this dtype."""
    if not torch.equal(tensor.to(dtype).to(tensor), tensor):
        stored = str(dtype).removeprefix("torch.")
        raise ObrError(
            f"{name} has changed since obr.compress: {stored}, in which it is stored, does not hold its values; "
            "compress a model again."
        )


def _check_quantisers(block: nn.Module, layout: Layout, recipe: Recipe, where: str) -> None:
    """Raise ObrError unless the quantisers of a block are those that the recipe sets."""
    for path, wanted in quantizer_settings(block, layout, recipe).items():
        module, _, name = path.rpartition(".")
        if getattr(block.get_submodule(module), name) != wanted:
            raise ObrError(
                f"The quantiser {where}.{path} is not the one that the recipe of obr.compress sets; compress a model "
                "again with the recipe that is meant."
            )
