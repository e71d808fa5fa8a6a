"""What the layouts of quantised layers share: which tensors make up a layer, and the weight that they stand for."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from obr.config.quantizer import SIXTEEN_BITS, QuantizerSettings
from obr.errors import ObrError
from obr.models.tensor_files import TensorFiles

FLOATS = ("F16", "BF16", "F32")  # dtypes of scales, as headers name them


@dataclass(frozen=True)
class Stored:
    """How a layer is stored.

    bits: of a code. group: columns of a row that share a scale; None where a row has one. theory: bits a weight,
    scales of whole rows left out.
    """

    bits: int
    group: int | None
    theory: float


class Layout(ABC):
    """One way of storing quantised linear layers.

    Args:
        files: the tensors of the folder. settings: the `quantization_config` of config.json.
        shapes: {linear layer or embedding: [rows, columns]} of the model that config.json describes.
    """

    name = ""
    # Ends of the names of tensors that a layer may have instead of `.weight`. The first one marks a quantised layer.
    ends: tuple[str, ...] = ()
    # {end: dtypes, as headers name them, in which the tensor may be stored}.
    dtypes: ClassVar[dict[str, tuple[str, ...]]] = {}
    may_be_plain = False  # whether the settings allow that no layer is quantised
    activations: QuantizerSettings = SIXTEEN_BITS  # as the format says that they are quantised
    left_out: str | None = None  # what the format quantises besides, which is not simulated

    def __init__(self, files: TensorFiles, settings: dict, shapes: dict[str, list[int]]):
        self.files, self.settings, self.shapes = files, settings, shapes

    def layers(self) -> dict[str, list[str]]:
        """{quantised layer: names of its tensors}.

        Raises:
            ObrError: a quantised module that is no linear layer of the model, one that is stored twice, or a tensor
                of another dtype than the layout's.
        """
        found = {}
        for name in self.files.headers:
            module = next((name.removesuffix(f".{end}") for end in self.markers() if name.endswith(f".{end}")), None)
            if module is None:
                continue
            if module not in self.shapes:
                raise ObrError(
                    f"{self.files.what} has {name}, but the model of its config.json has no linear layer {module}; "
                    "choose a model of a known family."
                )
            found[module] = [f"{module}.{end}" for end in self.ends if f"{module}.{end}" in self.files.headers]
        for module, names in found.items():
            if f"{module}.weight" in set(self.files.headers) - set(names):
                raise self.unfit(module, "it is stored a second time, as .weight")
            for end, dtypes in self.dtypes.items():
                stored = self.files.headers.get(f"{module}.{end}", (None, dtypes[0]))[1]
                if stored not in dtypes:
                    raise self.unfit(module, f"{end} is stored as {stored}, not as {' or '.join(dtypes)}")
        return found

    def markers(self) -> tuple[str, ...]:
        """Ends of the names of tensors by which a quantised layer is known."""
        return self.ends[:1]

    @abstractmethod
    def stored(self, layer: str) -> Stored:
        """How a layer is stored. Raises ObrError if its tensors do not fit each other."""

    @abstractmethod
    def weight(self, layer: str) -> Tensor:
        """The weight (r, n) that a layer's tensors stand for, float32."""

    def bytes_of(self, layer: str, ends: tuple[str, ...] | None = None) -> int:
        """Bytes of a layer's tensors; ends: of these alone."""
        names = [f"{layer}.{end}" for end in ends or self.ends]
        return sum(self.files.bytes_of(name) for name in names if name in self.files.headers)

    def read(self, layer: str, *ends: str) -> list[Tensor | None]:
        """The tensors of a layer with these ends; None for one that is not there."""
        names = {end: f"{layer}.{end}" for end in ends if f"{layer}.{end}" in self.files.headers}
        found = self.files.read(names)
        return [found.get(end) for end in ends]

    def shape(self, layer: str, end: str) -> list[int]:
        """Of a tensor that a layer must have. Raises ObrError if it has not."""
        if f"{layer}.{end}" not in self.files.headers:
            raise ObrError(f"{self.files.what} has no {layer}.{end}, so {self.name} does not say what the layer is.")
        return self.files.headers[f"{layer}.{end}"][0]

    def order_of(self, layer: str, order: Tensor | None, groups: int, reordered: bool | None) -> Tensor | None:
        """(n,) the group of each column; None where groups are of consecutive columns.

        Files without an order of their own have no such tensor, or one of zeros (GPTQ) or of -1 (compressed-tensors).

        reordered: the settings say that groups are of columns in another order; None where they say nothing.

        Raises:
            ObrError: groups that do not exist, or settings that name an order which the file does not have, or that
                name none where it has one.
        """
        if groups == 1:
            return None
        if order is not None and list(order.shape) != [self.shapes[layer][1]]:
            raise self.unfit(layer, f"g_idx of shape {list(order.shape)} for {self.shapes[layer][1]} columns")
        if order is not None and not -1 <= int(order.min()) <= int(order.max()) < groups:
            raise self.unfit(layer, f"columns of group {int(order.max())} of {groups}")
        if order is None or int(order.max()) <= 0:
            if reordered:
                raise self.unfit(layer, "columns in an order of their own, but no g_idx that says which")
            return None
        if int(order.min()) < 0:
            raise self.unfit(layer, "columns without a group")
        if reordered is False and bool((order.diff() < 0).any()):
            raise self.unfit(
                layer, "columns in an order of their own, though quantization_config says that they are not"
            )
        return order

    def unfit(self, layer: str, why: str) -> ObrError:
        """The sentence for tensors that contradict each other."""
        return ObrError(f"{self.files.what}: {layer} is no layer of {self.name}: {why}; fetch the model again.")


def spread(scale: Tensor, rows: int, columns: int, group: int | None, order: Tensor | None = None) -> Tensor:
    """Scales or zero points (r or 1, groups) as (r, n) or what broadcasts to it.

    group: columns that share one. order: (n,) the group of each column, instead of consecutive ones.

    Example:
        >>> import torch
        >>> spread(torch.tensor([[0.5, 2.0]]), rows=1, columns=5, group=3).tolist()
        [[0.5, 0.5, 0.5, 2.0, 2.0]]
    """
    if scale.shape[1] == 1:
        return scale
    if order is not None:
        return scale[:, order.long()]
    return scale.repeat_interleave(group, dim=1)[:, :columns]
