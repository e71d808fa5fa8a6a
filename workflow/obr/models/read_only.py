"""Measuring a model in memory without changing it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from obr.errors import ObrError
from obr.models.blocks import CALL, Blocks
from obr.models.check.memory import check_model, quantised_by
from obr.models.layers import ATTENTION


class ReadOnlyBlocks(Blocks):
    """The decoder blocks of a model in memory as they are, for measuring inside `unchanged(model)`.

    A model that transformers holds in another program's format is run on one token first: some formats are
    dequantised by the model's first call, and its blocks are then called without it.

    Raises:
        ObrError: `check.memory.check_model` refuses the model, or its attention leaves out what it quantises.
    """

    def __init__(self, model: nn.Module):
        check_model(model, measured=True)
        self._hold(model)
        if quantised_by(model):
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), **CALL)
        check_attention(model)

    def load(self, index: int) -> nn.Module:
        """The model's own block `index`, not a copy."""
        return self.model.get_submodule(self.layout.blocks)[index]


def check_attention(model: nn.Module) -> None:
    """Raise ObrError if a block's attention leaves out the quantiser or transform that the block has.

    A block has a configuration of its own, which may name another attention than the model's.
    """
    for module in model.modules():
        quantiser = getattr(module, "key_value_quantizer", None)
        if quantiser is None or not quantiser.active:
            continue
        used = getattr(module, "config", model.config)._attn_implementation
        if used != ATTENTION:
            raise ObrError(
                f"The model quantises or transforms queries, keys or values, which attention {used!r} leaves out; "
                f"call model.set_attn_implementation({ATTENTION!r})."
            )


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards it is what it was, to the last bit."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    # A rotary embedding with a dynamic base rewrites its frequencies for each length.
    state = [
        (module, dict(module._buffers), {k: v for k, v in vars(module).items() if isinstance(v, (int, float))})
        for module in modules
        if module._buffers and not module._parameters
    ]
    model.eval()
    try:
        yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for module, buffers, numbers in state:
            module._buffers.clear()
            module._buffers.update(buffers)
            vars(module).update({key: value for key, value in numbers.items() if key != "training"})
