"""A block rotated and quantised as a function of a rotation's parameters, with gradients through its folded weights.

Weights are folded once for all batches that pass through the block. Their gradients add up over the batches, and are
handed back to the rotation layer by layer, so that the graph of one layer's fold exists at a time.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from obr.config.quantizer import QuantizerSettings
from obr.config.recipe import Recipe
from obr.methods.grid import Grid
from obr.models.architectures import KIND_OF, Layout, kind_of
from obr.models.hadamard import Kronecker
from obr.models.layers import set_quantizers
from obr.rotations import fold
from obr.rotations.base import Rotation
from obr.rotations.block_transforms import BlockTransforms
from obr.rotations.learning import straight_through

NORMS, READERS = "norms", "readers"  # the parts of a block that are no layers


class RotatedBlock:
    """Block `index` under a rotation, callable with states (b, s, d) and the block's further arguments.

    Where weights are quantised, all is folded into them. Where they are not, the residual stream's rotation R is
    not: quantised inputs are turned back by Rᵀ and outputs by R, which is the same and takes fewer operations,
    since weights then need no gradients.

    Args:
        block: wrapped and plain, float32; it gets online transforms and quantisers, its parameters stay.
        recipe: bits and clip (minmax or mse) say how weights are rounded. quantise: `straight_through.ste_identity`
            or `.ste_range`. grids: of rounded weights, by path; those that are missing are found and added.
        learns: whether gradients are wanted.
    """

    def __init__(
        self, block: nn.Module, index: int, rotation: Rotation, layout: Layout, recipe: Recipe, quantise: Callable,
        grids: dict[str, Grid], learns: bool,
    ):  # fmt: skip
        """One parameter for each part of what the block computes."""
        self.block, self.index, self.rotation, self.layout = block, index, rotation, layout
        self.recipe, self.quantise, self.grids = recipe, quantise, grids
        self.plain = {name: parameter.detach() for name, parameter in block.named_parameters()}
        self.changes = rotation.changes(index)
        self.is_folded = recipe.bits < 16 or self.changes.residual is None
        fold.attach(block, self.changes, layout)
        set_quantizers(block, layout, recipe)
        straight_through.swap(block, quantise)
        self.weights: dict[str, Tensor] = {}
        for part in (*layout.roles, READERS, NORMS):
            self.weights |= self._leaves(part, learns)

    def __call__(self, states: Tensor, arguments: dict) -> Tensor:
        """(b, s, d) in float32."""
        if self.is_folded:
            return self._run(states, arguments)
        layout, block = self.layout, self.block
        changes = self.rotation.changes(self.index)  # with a graph of its own, which one backward pass uses up
        for group in fold.READS_RESIDUAL:
            turn = _Turned(self.quantise, changes, group)
            for path in layout.of_kind(group):  # not every family has each
                block.get_submodule(path).quantize = turn
        writers = [block.get_submodule(path) for path in layout.of_kind(*fold.WRITES_RESIDUAL)]
        hooks = [writer.register_forward_hook(lambda _, __, out: changes.residual(out)) for writer in writers]
        try:
            return self._run(states, arguments)
        finally:
            for hook in hooks:
                hook.remove()
            straight_through.swap(block, self.quantise)

    def hand_back(self) -> None:
        """Add the gradients of the folded weights, gathered by backward passes, to those of the rotation."""
        for part in (*self.layout.roles, READERS, NORMS):
            self._hand_back(part)

    def _hand_back(self, part: str) -> None:
        with torch.enable_grad():
            for name, tensor in self._folded(part).items():
                gradient = self.weights.pop(name).grad
                if gradient is not None:  # what other layers share of the graph is still needed
                    torch.autograd.backward(tensor, gradient, retain_graph=True)

    def _leaves(self, part: str, learns: bool) -> dict[str, Tensor]:
        """The folded tensors of a part without their graph; those that the rotation reaches take gradients."""
        with torch.set_grad_enabled(learns):
            folded = self._folded(part)
        return {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in folded.items()}

    def _folded(self, part: str) -> dict[str, Tensor]:
        """Weight and bias of the layer with this role, the gains of the norms, or what stays at 16 bits, by name."""
        if part == READERS:
            return fold.fold_readers(self.plain, self.changes, self.layout, torch.float32)
        if part != NORMS:
            path = self.layout.roles[part]
            new = self._folded_layer(part)
            new[f"{path}.weight"] = self._rounded(path, new[f"{path}.weight"])
            return new
        if self.is_folded:
            return fold.fold_norms(self.plain, self.changes, self.layout, torch.float32)
        new = fold.fold_norms(self.plain, replace(self.changes, residual=None, norms={}), self.layout, torch.float32)
        for group, norm in self.layout.norms.items():  # their gains are in the weights
            ones = torch.ones_like(self.plain[f"{norm}.weight"])
            new[f"{norm}.weight"] = self.changes.norms.get(group, ones).to(ones) - self.layout.norm_offset
        return new

    def _folded_layer(self, role: str) -> dict[str, Tensor]:
        layout, state = self.layout, self.plain
        if self.is_folded:
            return fold.fold_layer(state, self.changes, layout, role, dtype=torch.float32)
        path = layout.roles[role]
        if (norm := layout.norms.get(KIND_OF[kind_of(role)])) is not None:
            weight = f"{path}.weight"
            state = {**state, weight: state[weight] * (state[f"{norm}.weight"].float() + layout.norm_offset)}
        return fold.fold_layer(
            state, replace(self.changes, residual=None, norms={}), layout, role, dtype=torch.float32
        )

    def _rounded(self, path: str, weight: Tensor) -> Tensor:
        bits, clip = self.recipe.bits, self.recipe.clip
        if bits == 16:
            return weight
        identity = self.quantise is straight_through.ste_identity
        if not identity and clip != "mse":
            return straight_through.ste_range_weight(weight, bits)
        if path not in self.grids:
            with torch.no_grad():
                self.grids[path] = Grid.fit(weight, bits, clip)
        grid = self.grids[path]
        return (
            straight_through.ste_weight(weight, bits, clip, grid)
            if identity
            else straight_through.clipped_weight(weight, bits, grid)
        )

    def _run(self, states: Tensor, arguments: dict) -> Tensor:
        out = functional_call(self.block, self.weights, (states,), arguments)
        return (out[0] if isinstance(out, tuple) else out).float()


class _Turned:
    """Quantises what a group's layers read of the residual stream, then turns it back for their own weights.

    The layers of a group are called with the same input, and share the product. Those of an expert follow each other.
    """

    def __init__(self, quantise: Callable, changes: BlockTransforms, group: str):
        self.quantise, self.factors = quantise, changes.norms.get(group)
        self.back = Kronecker.right(changes.residual.factors())  # the transpose
        self.input = self.output = None

    def __call__(self, x: Tensor, settings: QuantizerSettings, bounds=None) -> Tensor:
        if x is not self.input:
            quantised = self.quantise(x, settings, bounds)
            self.input = x
            self.output = self.back(quantised if self.factors is None else quantised / self.factors.to(quantised))
        return self.output
