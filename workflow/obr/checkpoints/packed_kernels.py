"""Which kernels multiply packed layers on which device, and what they have no form for."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor, nn

from obr.config.quantizer import QuantizerSettings
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.kernels.gpu import layout, product
from obr.kernels.int4 import packed_weight
from obr.methods.restore import Restored

if TYPE_CHECKING:
    from obr.models.online_transforms import Range

SAME_SIZE = {torch.float32: torch.int32, torch.float16: torch.int16}
SHOWN = ("rows", "columns", "layout", "bits_per_weight", "bytes")


class Kernel(Protocol):
    """A packed weight (rows, columns) with its product.

    weight_only: whether activations of 16 bits and groups of columns can be multiplied.
    """

    weight_only: ClassVar[bool]
    rows: int
    columns: int
    layout: str
    bits_per_weight: float
    bytes: int

    def __call__(self, x: Tensor, settings: QuantizerSettings, bounds: "Range | None", bias: Tensor | None) -> Tensor:
        """The layer's output (t, r) for inputs x (t, n), rounded as `settings` say."""
        ...


class CpuKernel:
    """4-bit weights by activations of at most 8 bits, in C++."""

    weight_only = False

    def __init__(self, restored: Restored, device):
        self.weight = packed_weight.Weight.pack(restored.codes, restored.scale, restored.mask, restored.pattern)
        for part in SHOWN:
            setattr(self, part, getattr(self.weight, part))

    def __call__(self, x: Tensor, settings: QuantizerSettings, bounds: "Range | None", bias: Tensor | None) -> Tensor:
        return self.weight.multiply(packed_weight.quantize(x, settings, bounds), bias).to(x.dtype)


class GpuKernel(nn.Module):
    """Weights of 2 to 4 bits by activations of at most 8 bits or of 16, in Triton.

    Its tensors are buffers, which move with the model and are known to the streams that read blocks ahead. Scales lie
    in them as whole numbers, so that no change of a model's dtype rounds them.
    """

    weight_only = True

    def __init__(self, restored: Restored, device):
        super().__init__()
        product.programs()  # without Triton this fails here, not at the first token
        weight = layout.Weight.pack(
            restored.codes.to(device), restored.scale, restored.mask.to(device), restored.pattern, restored.bits,
            restored.group,
        )  # fmt: skip
        for part in SHOWN:
            setattr(self, part, getattr(weight, part))
        self.about = {name: getattr(weight, name) for name in ("layout", "bits", "rows", "columns", "group")}
        for part in layout.PARTS:
            tensor = getattr(weight, part)
            if tensor.is_floating_point():
                tensor = tensor.view(SAME_SIZE[tensor.dtype])
            self.register_buffer(part, tensor, persistent=False)

    @property
    def weight(self) -> layout.Weight:
        """The packed weight, as the kernel reads it."""
        scale = self.scale.view(torch.float32 if self.about["group"] is None else torch.float16)
        return layout.Weight(**self.about, codes=self.codes, starts=self.starts, masks=self.masks, scale=scale)

    def forward(self, x: Tensor, settings: QuantizerSettings, bounds: "Range | None", bias: Tensor | None) -> Tensor:
        """(t, r) of x (t, n). bounds: of the quantiser, where they are learned."""
        tokens = x if settings.bits == 16 else product.quantize(x, settings, bounds)
        return product.multiply(self.weight, tokens, bias, x.dtype)


# A device's type -> its kernels.
KERNELS: dict[str, Callable[..., Kernel]] = {"cpu": CpuKernel, "cuda": GpuKernel}


def kernels_of(device_type: str) -> Callable[..., Kernel]:
    """The kernels of a type of device. Raises ObrError if it has none."""
    if device_type not in KERNELS:
        raise ObrError(
            f"Packed layers compute on {' and '.join(KERNELS)}, not on {device_type}; name one, or pass packed=False."
        )
    return KERNELS[device_type]


def check_recipe(recipe: Recipe, device_type: str) -> None:
    """Raise ObrError for a recipe whose layers no packed kernel of this device computes as it asks."""
    weight_only = kernels_of(device_type).weight_only
    if recipe.adopted:
        raise ObrError(
            "Weights that others compressed are read as floats, which no packed kernel multiplies; pass packed=False."
        )
    if recipe.bits > 4:
        raise ObrError(f"Weights of {recipe.bits} bits have no packed kernel; compress with 2 to 4, or packed=False.")
    if recipe.activations.bits > 8 and not (weight_only and recipe.activations.bits == 16):
        raise ObrError(
            f"The recipe keeps activations at {recipe.activations.bits} bits, packed kernels on {device_type} "
            f"multiply by 8 at most{', or 16' if weight_only else ''}; to change what the model computes, pass a "
            "recipe whose activations have 8 bits, else packed=False."
        )


def check_layer(about: dict | None, settings: QuantizerSettings, name: str, device_type: str) -> None:
    """Raise ObrError for a layer that this device's kernels have no form for. about: of its packed form."""
    weight_only = kernels_of(device_type).weight_only
    if about is None:
        raise ObrError(f"{name} is not compressed; run obr.compress first.")
    if about["bits"] > 4:
        raise ObrError(f"{name} has weights of {about['bits']} bits; load it with packed=False.")
    if (group := about.get("group")) and not weight_only:
        raise ObrError(f"{name} has scales for groups of {group} columns; load it with packed=False.")
    if settings.bits == 16 and weight_only:
        return
    if settings.bits > 8 or settings.group_size is not None:
        raise ObrError(
            f"{name} reads activations of {settings.bits} bits, group_size {settings.group_size}; packed kernels "
            "take 2 to 8 bits and one scale a token, so load it with packed=False."
        )
