"""Block-wise refinement: a compressed block is trained to put out what the block of the dense model does.

The loss is ‖block(X) - block'(X')‖², X what enters the block in the dense model and X' what enters it in the
compressed one (EfficientQAT's first phase, arXiv 2407.11062). Masks and bit widths stay. Trained are the quantised
integers before rounding, with straight-through gradients; the scales; and the weights of the block's norms. This is
no longer training-free: reports have its time apart.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from obr.checkpoints.format import round_rest
from obr.checkpoints.packing import unpack
from obr.checkpoints.writer import LayerReport, store
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.methods.grid import HALF_RANGE, Grid
from obr.methods.restore import Restored
from obr.models.architectures import Layout
from obr.models.blocks import run_block
from obr.models.hidden_states import HiddenStates
from obr.models.layers import QuantLinear
from obr.rotations.learning import straight_through

LOOKS = 10  # at the error on held-out windows, on the way
LEAST_SCALE = 0.01  # of what it was: a scale stays positive however long it is trained
SCALE_RATE = 0.1  # learning rate of scales and norms, relative to themselves, beside that of the integers


@dataclass(frozen=True)
class Windows:
    """What enters the compressed block and the dense one: b hidden states (1, s, d) each."""

    compressed: HiddenStates
    dense: HiddenStates


@dataclass(frozen=True)
class Refinement:
    """Relative squared error of a block's output before and after, on held-out windows if there are any, else on the
    calibration windows."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else 1.0


class TrainedLayer:
    """A compressed layer whose integers, or kept values at 16 bits, and scales are trained.

    Integers and values are in units of the grid's scale; at 16 bits of half the row's root mean square.
    """

    def __init__(self, linear: QuantLinear):
        self.stored, self.dtype = unpack(linear.packed), linear.weight.dtype
        device = linear.weight.device
        self.mask = self.stored.mask.to(device)
        self.is_rounded = self.stored.codes is not None
        if self.is_rounded:
            self.grid = Grid(self.stored.scale.to(device), self.stored.bits, self.stored.group)
            units = self.stored.codes.to(device).float()
        else:
            weight = self.stored.weight.to(device)
            scale = weight.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12) / 2
            self.grid, units = Grid(scale, 16), weight / scale
        self.units = units.requires_grad_()
        self.change = torch.zeros_like(self.grid.scale).requires_grad_()  # of the scales, relative to them

    def weight(self) -> Tensor:
        """(r, n), with gradients to integers and scales."""
        units, grid = self.units, self._trained_grid()
        if self.is_rounded:
            units = straight_through.rounded(units).clamp(grid.low, grid.high)
        return (units * self.mask * grid.over(units.shape[1])).to(self.dtype)

    def _trained_grid(self) -> Grid:
        return replace(self.grid, scale=self.grid.scale * (1 + self.change).clamp_min(LEAST_SCALE))

    @torch.no_grad()
    def restored(self) -> Restored:
        """The layer as it is stored; scales of groups are rounded to float16 there."""
        grid = self._trained_grid()
        if not self.is_rounded:
            return replace(self.stored, weight=(self.units * self.mask * grid.scale).cpu())
        scale = grid.scale if grid.group is None else grid.scale.clamp(*HALF_RANGE).half().float()
        codes = (self.units.round().clamp(grid.low, grid.high) * self.mask).to(torch.int8)
        weight = codes * replace(grid, scale=scale).over(codes.shape[1])
        return replace(self.stored, weight=weight.cpu(), codes=codes.cpu(), scale=scale.cpu())


class TrainedBlock:
    """A compressed block with its trained layers and norms, beside the block before compression."""

    def __init__(self, block: nn.Module, dense: nn.Module, layout: Layout, arguments: dict):
        self.block, self.dense, self.layout, self.arguments = block, dense, layout, arguments
        self.layers = {name: TrainedLayer(block.get_submodule(name)) for name in layout.linears}
        self.norms = {name: parameter.detach().clone() for name, parameter in _norms(block, layout)}
        self.changes = {name: torch.zeros_like(norm).float().requires_grad_() for name, norm in self.norms.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The block's parameters that are trained, by name."""
        offset = self.layout.norm_offset  # Gemma's norms multiply by 1 + weight
        found = {f"{name}.weight": layer.weight() for name, layer in self.layers.items()}
        for name, norm in self.norms.items():
            found[name] = ((norm.float() + offset) * (1 + self.changes[name]) - offset).to(norm.dtype)
        return found

    def error(self, states: Tensor, dense_states: Tensor) -> Tensor:
        """Squared error of the output (1, s, d) for states (1, s, d), over the squares of the output that the dense
        block has for its own."""
        with torch.no_grad():
            wanted = run_block(self.dense, dense_states, self.arguments).float()
        out = functional_call(self.block, self.tensors(), (states,), self.arguments)
        out = out[0] if isinstance(out, tuple) else out
        return (out.float() - wanted).square().sum() / wanted.square().sum()

    @torch.no_grad()
    def mean_error(self, windows: Windows) -> float:
        """Mean of `error` over windows."""
        pairs = zip(windows.compressed, windows.dense, strict=True)
        return float(torch.stack([self.error(states, beside) for states, beside in pairs]).mean())

    def parameters(self) -> Iterator[Tensor]:
        """All that is trained."""
        for layer in self.layers.values():
            yield from (layer.units, layer.change)
        yield from self.changes.values()

    def copy(self) -> list[Tensor]:
        """Of all that is trained."""
        return [parameter.detach().clone() for parameter in self.parameters()]

    @torch.no_grad()
    def take(self, copied: list[Tensor]) -> None:
        """Set what is trained to what `copy` gave."""
        for parameter, value in zip(self.parameters(), copied, strict=True):
            parameter.copy_(value)

    def optimizer(self, recipe: Recipe) -> torch.optim.Optimizer:
        """Adam with a rate for integers and another for scales and norms."""
        units = [layer.units for layer in self.layers.values()]
        scales = [layer.change for layer in self.layers.values()] + list(self.changes.values())
        return torch.optim.Adam(
            [
                {"params": units, "lr": recipe.refine_rate},
                {"params": scales, "lr": SCALE_RATE * recipe.refine_rate},
            ]
        )

    @torch.no_grad()
    def store(self, dtype: torch.dtype) -> None:
        """Put what was trained into the block, exactly as it will be read back."""
        norms = {name: tensor for name, tensor in self.tensors().items() if name in self.norms}
        for name, layer in self.layers.items():
            store(self.block.get_submodule(name), layer.restored(), dtype)
        for name, tensor in norms.items():
            self.block.get_parameter(name).data = tensor
        round_rest(self.block, self.layout, dtype)


@torch.enable_grad()
def refine_block(
    trained: TrainedBlock, windows: Windows, held_out: Windows | None, recipe: Recipe, index: int
) -> Refinement:
    """Train a compressed block for `recipe.refine_steps` steps of one window each; `trained.store` then keeps it.

    The block becomes that of the step with the least error: on held-out windows, of ten looks on the way; without
    them on the calibration windows, of the first and the last. index: the block's number.

    Raises:
        ObrError: the loss is no longer finite.
    """
    optimizer, steps, judged = trained.optimizer(recipe), recipe.refine_steps, held_out or windows
    rates = [group["lr"] for group in optimizer.param_groups]
    interval = max(1, steps // LOOKS) if held_out else steps
    with _straight_through(trained.block):
        before = best = trained.mean_error(judged)
        kept = trained.copy()
        for step, window in enumerate(_order(len(windows.dense), steps, recipe.seed, index), start=1):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
            loss = trained.error(windows.compressed[window], windows.dense[window])
            if not math.isfinite(value := float(loss.detach())):
                raise ObrError(f"Block {index}: the loss of refinement is {value}; use a smaller refine_rate.")
            optimizer.zero_grad()
            (loss / loss.detach().clamp_min(1e-30)).backward()  # blocks of large and small errors take equal steps
            optimizer.step()
            if (step % interval == 0 or step == steps) and (error := trained.mean_error(judged)) < best:
                best, kept = error, trained.copy()
        trained.take(kept)
    return Refinement(before, best)


def refined_rows(
    rows: list[LayerReport], block: nn.Module, refinement: Refinement, seconds: float
) -> list[LayerReport]:
    """The report of a block's layers after refinement, which took so many seconds; shared out by size."""
    weights, refined = sum(row.rows * row.columns for row in rows), []
    for row in rows:
        linear = block.get_submodule(row.layer)
        share = seconds * row.rows * row.columns / weights
        refined.append(
            replace(
                row, zeros=float((linear.weight == 0).float().mean()), packed_bytes=linear.packed.bytes,
                refined=refinement.ratio, refine_seconds=round(share, 4),
            )
        )  # fmt: skip
    return refined


def _norms(block: nn.Module, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Weights of the block's norms, by name: one number a channel, of modules that are no linear layers."""
    for path, module in block.named_modules():
        weight = getattr(module, "weight", None) if path not in layout.linears else None
        if isinstance(weight, nn.Parameter) and weight.ndim == 1:
            yield f"{path}.weight", weight


@contextmanager
def _straight_through(block: nn.Module) -> Iterator[None]:
    """Quantisers of activations that pass gradients on, for as long as the block is trained."""
    straight_through.swap(block, straight_through.ste_range)
    try:
        yield
    finally:
        for module in block.modules():
            vars(module).pop("quantize", None)  # back to the class's own


def _order(windows: int, steps: int, seed: int, block: int) -> list[int]:
    """The window of each step: all of them in a random order, then all in another."""
    generator, found = torch.Generator().manual_seed(seed * 10_007 + block), []
    while len(found) < steps:
        found += torch.randperm(windows, generator=generator).tolist()
    return found[:steps]
