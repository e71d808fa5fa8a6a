"""What all layouts of released checkpoints share: the tensors that a file must hold, and blocks made of them."""

import copy
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obr.checkpoints.released.state import StateDict
from obr.errors import ObrError
from obr.models.blocks import StreamedBlocks
from obr.models.layers import wrap_block
from obr.rotations import fold
from obr.rotations.block_transforms import BlockTransforms


@dataclass(frozen=True)
class Part:
    """One tensor of a file.

    names: any one of which is enough, since modules may share the tensor; messages have the last one. shape: that
    it must have. stored: whether the dtype of the checkpoint must hold it without rounding, as weights.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    stored: bool = True


class Reader(ABC):
    """Reads the state dict of one layout as the blocks and ends of a compressed model.

    Names and shapes of all tensors are checked at once, from the files' headers.

    Args:
        state: the file's tensors. blocks: of the base model, whose ends are replaced by the file's.

    Raises:
        ObrError: tensors that are missing, unexpected, of another shape or of an unreadable type.
    """

    kind = ""  # of the rotation
    # Buffers that a state dict may have and that are not read.
    buffers = re.compile(r"rotary_emb\.inv_freq$")

    def __init__(self, state: StateDict, blocks: StreamedBlocks):
        self.state, self.blocks, self.layout = state, blocks, blocks.layout
        self._check_family()
        parts = self.parts()
        known = {name for part in parts for name in part.names}
        unexpected = sorted(n for n in state.headers if n not in known and not self.buffers.search(n))
        for part in parts:
            self._check(part)
        if unexpected:
            raise ObrError(
                f"{state.folder} has {len(unexpected)} unexpected tensors, such as {unexpected[0]!r}; it is another "
                "layout."
            )
        self.dtype = state.dtype(n for part in parts if part.stored for n in part.names if n in state)

    @abstractmethod
    def parts(self) -> list[Part]:
        """All tensors that the file must hold, or may hold and holds."""

    @abstractmethod
    def fill_ends(self) -> None:
        """Put the file's embeddings, final norm and head into the base model."""

    @abstractmethod
    def gain(self, norm: str) -> Tensor:
        """The weight (d,) of a norm, by its full name."""

    @abstractmethod
    def changes(self, index: int) -> BlockTransforms:
        """What stays online in a block."""

    @abstractmethod
    def about(self) -> dict:
        """What the manifest says of the rotation."""

    def likeness(self, index: int, block: nn.Module) -> dict[str, float]:
        """{layer: cosine between its weight and the base model's, folded}; none where folds are not known."""
        return {}

    def weight(self, linear: str) -> tuple[str, ...]:
        """Names of a linear layer's weight."""
        return (f"{linear}.module.weight", f"{linear}.weight")

    def block(self, index: int) -> nn.Module:
        """A wrapped block with the file's weights, biases and norms and the online transforms."""
        block = copy.deepcopy(self.blocks.model.get_submodule(self.layout.blocks)[index])
        prefix = f"{self.layout.blocks}.{index}"
        for name in self.layout.linears:
            linear = block.get_submodule(name)
            for kind, names in self._of_linear(f"{prefix}.{name}").items():
                if getattr(linear, kind) is not None:
                    setattr(linear, kind, nn.Parameter(self.take(names).float(), requires_grad=False))
        for norm in self.layout.norms.values():
            gain = self.gain(f"{prefix}.{norm}")
            block.get_submodule(norm).weight = nn.Parameter(gain.float(), requires_grad=False)
        wrap_block(block, self.layout)
        fold.attach(block, self.changes(index), self.layout)
        return block.eval().requires_grad_(False)

    def take(self, names: tuple[str, ...]) -> Tensor:
        """The tensor with any of these names. Raises ObrError if two of them have different values."""
        tensors = [self.state.read(name) for name in names if name in self.state]
        if any(not torch.equal(tensors[0], other) for other in tensors[1:]):
            owner, _, kind = names[-1].rpartition(".")
            what = {"bias": "biases", "matrix": "matrices"}.get(kind, "weights")
            raise ObrError(
                f"{self.state.folder}: the two {what} of {owner} differ; which one counts is not known. They are "
                f"{' and '.join(name for name in names if name in self.state)}."
            )
        return tensors[0]

    def linear_parts(self) -> list[Part]:
        """Weights and biases of all blocks."""
        parts, model = [], self.blocks.model
        for index in range(len(self.blocks)):
            for name in self.layout.linears:
                path = f"{self.layout.blocks}.{index}.{name}"
                for kind, names in self._of_linear(path).items():
                    tensor = getattr(model.get_submodule(path), kind)
                    if tensor is not None:
                        parts.append(Part(names, tuple(tensor.shape)))
        return parts

    def norms(self) -> list[str]:
        """Full names of all norms, the final one first."""
        layout = self.layout
        return [layout.final_norm] + [
            f"{layout.blocks}.{i}.{norm}" for i in range(len(self.blocks)) for norm in layout.norms.values()
        ]

    def _of_linear(self, path: str) -> dict[str, tuple[str, ...]]:
        """{"weight": names, "bias": names} of a linear layer."""
        weight = self.weight(path)
        return {kind: tuple(f"{n.rpartition('.')[0]}.{kind}" for n in weight) for kind in ("weight", "bias")}

    def _check(self, part: Part) -> None:
        there = [name for name in part.names if name in self.state]
        if not there:
            raise ObrError(
                f"{self.state.folder} has no {part.names[-1]!r}; it is not a whole released checkpoint of this model."
            )
        for name in there:
            if (shape := self.state.shape(name)) != part.shape:
                raise ObrError(f"{self.state.folder}: {name} has shape {shape}, the model needs {part.shape}.")
            self.state.dtype([name])

    def _check_family(self) -> None:
        """Raise ObrError if a block of the base model has parameters that no released layout has."""
        block = self.blocks.model.get_submodule(self.layout.blocks)[0]
        known = tuple(f"{name}." for name in (*self.layout.linears, *self.layout.norms.values()))
        other = [name for name, _ in block.named_parameters() if not name.startswith(known)]
        if other:
            raise ObrError(
                f"{self.blocks.config.model_type} models have {other[0]}, which released checkpoints do not hold; "
                "give the base model that the checkpoint was made from."
            )
