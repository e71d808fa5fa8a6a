"""What has been done to a model in memory, so that steps which cannot follow each other are refused.

A model goes from plain to rotated to compressed. Each step changes it in place and marks it. The online parts of a
model (transforms, quantisers, packed weights) are found in its modules, so that a lost mark hides nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from obr import online
from obr.errors import ObrError
from obr.layout import Layout
from obr.model_check import UNFINISHED, check_finished
from obr.modules import KeyValueQuantizer, QuantLinear, quantizer_settings
from obr.packing import unpack
from obr.recipe import Recipe

AGAIN = "load the model again"


@contextmanager
def changing(model: nn.Module, step: str) -> Iterator[None]:
    """Mark the model as unfinished while a step changes it; the mark stays if the step fails.

    step: such as "obr.rotate". Raises ObrError if an earlier step has not finished.
    """
    check_finished(model)
    setattr(model, UNFINISHED, step)
    yield
    delattr(model, UNFINISHED)


def check_before_rotation(model: nn.Module) -> None:
    """Raise ObrError unless the model is one that `obr.rotate` can change: neither rotated nor compressed."""
    check_finished(model)
    _check_not_compressed(model, "rotate a model before it is compressed")
    if vars(model).get("obr_rotation") is not None:
        raise ObrError(f"The model is rotated already ({model.obr_rotation.kind}); {AGAIN} for another rotation.")
    for name, module in model.named_modules():
        if isinstance(module, tuple(online.ONLINE.values())):
            raise ObrError(f"The model has the online transform {name} already; {AGAIN} to rotate it.")


def check_before_compression(model: nn.Module) -> None:
    """Raise ObrError unless the model is one that `obr.compress` can change: not compressed or quantised."""
    check_finished(model)
    _check_not_compressed(model, f"{AGAIN} to compress it otherwise")


def _check_not_compressed(model: nn.Module, remedy: str) -> None:
    if vars(model).get("obr_recipe") is not None:
        raise ObrError(f"The model is compressed already ({model.obr_recipe.method}); {remedy}.")
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and (module.packed is not None or "weight" not in module._parameters):
            raise ObrError(f"{name} is compressed already; {remedy}.")
        if (isinstance(module, QuantLinear) and module.activations.bits < 16) or _quantises(module):
            raise ObrError(f"{name} quantises activations already; {remedy}.")


def _quantises(module: nn.Module) -> bool:
    kinds = ("queries", "keys", "values")
    return isinstance(module, KeyValueQuantizer) and any(getattr(module, kind).bits < 16 for kind in kinds)


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


def refuse_plain_saving(model: nn.Module) -> None:
    """Have `save_pretrained` and `push_to_hub` refuse a model with parts that a plain folder has no place for."""
    if any(isinstance(module, tuple(online.ONLINE.values())) for module in model.modules()) or any(
        (isinstance(module, QuantLinear) and (module.activations.bits < 16 or "weight" not in module._parameters))
        or _quantises(module)
        for module in model.modules()
    ):
        model.save_pretrained = model.push_to_hub = _refuse


def _refuse(*_args, **_kwargs) -> None:
    """In place of transformers' own: it would write the weights without what is computed for every token."""
    raise ObrError(
        "save_pretrained cannot keep this model's online transforms, quantisers or packed weights; use obr.save for "
        "a model from obr.compress, copy the folder of one from obr.load, or use obr export for other programs."
    )
