"""What has been done to a model in memory, so that steps which cannot follow each other are refused.

A model goes from plain to rotated to compressed. Each step changes it in place and marks it. The online parts of a
model (transforms, quantisers, packed weights) are found in its modules, so that a lost mark hides nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from obr.errors import ObrError
from obr.models import online_transforms
from obr.models.architectures import layout_of
from obr.models.check.memory import UNFINISHED, check_finished
from obr.models.layers import KeyValueQuantizer, QuantLinear
from obr.models.split import Experts, FusedLinear

AGAIN = "load the model again"


@contextmanager
def changing(model: nn.Module, step: str) -> Iterator[None]:
    """Mark the model as unfinished while a step changes it; the mark stays if the step fails.

    step: such as "obr.rotate". Raises ObrError if an earlier step has not finished.
    """
    check_finished(model)
    setattr(model, UNFINISHED, step)
    try:
        yield
    except BaseException:
        model.save_pretrained = model.push_to_hub = _refuse_unfinished  # transformers would write it
        raise
    delattr(model, UNFINISHED)


def check_before_rotation(model: nn.Module) -> None:
    """Raise ObrError unless the model is one that `obr.rotate` can change: neither rotated nor compressed."""
    check_finished(model)
    _check_not_compressed(model, "rotate a model before it is compressed")
    if vars(model).get("obr_rotation") is not None:
        raise ObrError(f"The model is rotated already ({model.obr_rotation.kind}); {AGAIN} for another rotation.")
    for name, module in model.named_modules():
        if isinstance(module, tuple(online_transforms.ONLINE.values())):
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


def refuse_plain_saving(model: nn.Module) -> None:
    """Have `save_pretrained` and `push_to_hub` refuse a model with parts that a plain folder has no place for."""
    # Layers taken apart have names in memory that files of the family do not have.
    apart = (FusedLinear, Experts) if layout_of(model.config).stored else (FusedLinear,)
    kept_elsewhere = (*online_transforms.ONLINE.values(), *apart)
    if any(
        isinstance(module, kept_elsewhere)
        or (isinstance(module, QuantLinear) and (module.activations.bits < 16 or "weight" not in module._parameters))
        or _quantises(module)
        for module in model.modules()
    ):
        model.save_pretrained = model.push_to_hub = _refuse


def _refuse(*_args, **_kwargs) -> None:
    """In place of transformers' own: it would write the weights without what is computed for every token."""
    raise ObrError(
        "save_pretrained cannot keep this model's online transforms, quantisers, packed weights or layers taken "
        "apart; use obr.save for a model from obr.compress, copy the folder of one from obr.load, or use obr export "
        "for other programs."
    )


def _refuse_unfinished(*_args, **_kwargs) -> None:
    raise ObrError("A step has begun to change this model and did not finish; load the model again.")
