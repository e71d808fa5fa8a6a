"""Learning over a whole model: its outputs as a function of a rotation, and the loop that descends."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import cos, pi

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from obr.config.quantizer import QuantizerSettings
from obr.errors import ObrError
from obr.models.architectures import GROUP_OF
from obr.models.blocks import StreamedBlocks
from obr.models.hadamard import Kronecker
from obr.models.layers import set_quantizers
from obr.rotations import fold
from obr.rotations.base import Rotation
from obr.rotations.learning import straight_through
from obr.rotations.learning.cayley_sgd import nearest
from obr.rotations.learning.run import LearningRun

TOKENS = 512  # whose logits, a vocabulary wide each, exist at a time

# Logits (t, v) of some tokens and what they should be (t, …) -> sum of the loss over the tokens.
Criterion = Callable[[Tensor, Tensor], Tensor]


class Network:
    """A model rotated and quantised again in every pass, with gradients on the rotation's parameters.

    quantise: `straight_through.passed` or `.flowing`. recompute: keep only what enters each block, and compute
    it again on the way back. Folds and hidden states are float32; products are of `task.dtype`. The recipe's bits
    and clip say how weights are rounded in every pass: clip is minmax or mse.

    Where weights are quantised, all is folded into them. Where they are not, the residual stream's rotation R is
    not: quantised inputs are turned back by Rᵀ and outputs by R, which is the same and takes fewer operations,
    since weights then need no gradients.
    """

    def __init__(self, task: LearningRun, quantise: Callable, recompute: bool = False):
        if task.recipe.clip == "learned":
            raise ObrError(
                "learn.quantise.clip is 'learned', but this learner does not learn clips; use mse or minmax, or kind "
                "flatquant or omniquant."
            )
        self.task, self.quantise, self.recompute = task, quantise, recompute
        self.source = StreamedBlocks(task.model, None, torch.float32, task.device)
        self.layout = self.source.layout
        self.blocks = [self.source.load(index) for index in range(len(self.source))]
        self.plain = [{n: p.detach() for n, p in block.named_parameters()} for block in self.blocks]

    def __call__(self, rotation: Rotation, windows: Tensor) -> Tensor:
        """Last hidden states (b, s, d) of the rotated and quantised model, turned back; windows: (b, s) tokens."""
        embedded, arguments = self.source.embed(windows)
        states, residual = torch.cat(list(embedded)).float(), rotation.residual()
        if residual is not None:
            states = residual(states)
        for index in range(len(self.blocks)):
            if self.recompute and torch.is_grad_enabled():
                states = checkpoint(self._block, index, rotation, states, arguments[index], use_reentrant=False)
            else:
                states = self._block(index, rotation, states, arguments[index])
        return states if residual is None else Kronecker.right(residual.factors())(states)

    def _block(self, index: int, rotation: Rotation, states: Tensor, arguments: dict) -> Tensor:
        block, changes = self.blocks[index], rotation.changes(index)
        fold.attach(block, changes, self.layout)
        set_quantizers(block, self.layout, self.task.recipe)
        straight_through.swap(block, self.quantise)
        if self.task.recipe.bits < 16 or changes.residual is None:
            new = fold.fold_block(self.plain[index], changes, self.layout, dtype=torch.float32)
            for path in self.layout.linears:
                new[f"{path}.weight"] = self._weight(new[f"{path}.weight"])
            return self._run(block, new, states, arguments)
        turns = {group: _Turned(self.quantise, changes, group) for group in fold.READS_RESIDUAL}
        for group, turn in turns.items():
            for path in self.layout.groups[group]:
                block.get_submodule(path).quantize = turn
        writers = [block.get_submodule(p) for g in fold.WRITES_RESIDUAL for p in self.layout.groups[g]]
        hooks = [writer.register_forward_hook(lambda _, __, out: changes.residual(out)) for writer in writers]
        try:
            return self._run(block, self._unfolded(index, changes), states, arguments)
        finally:
            for hook in hooks:
                hook.remove()

    def _unfolded(self, index: int, changes: fold.BlockTransforms) -> dict[str, Tensor]:
        """Weights and norms of a block with all changes but those of the residual stream, which `_Turned` makes."""
        plain, offset = self.plain[index], self.layout.norm_offset
        inner = replace(changes, residual=None, norms={})
        gains = {group: plain[f"{norm}.weight"].float() + offset for group, norm in self.layout.norms.items()}
        gained = dict(plain)
        for role, path in self.layout.roles.items():
            if (gain := gains.get(GROUP_OF[role])) is not None:
                gained[f"{path}.weight"] = plain[f"{path}.weight"] * gain
        new = fold.fold_block(gained, inner, self.layout, dtype=torch.float32)
        for group, norm in self.layout.norms.items():
            ones = torch.ones_like(gains[group])
            new[f"{norm}.weight"] = changes.norms.get(group, ones).to(ones) - offset
        return new

    def _run(self, block: nn.Module, new: dict[str, Tensor], states: Tensor, arguments: dict) -> Tensor:
        with self.products():
            out = functional_call(block, new, (states,), arguments)
        return (out[0] if isinstance(out, tuple) else out).float()

    def _weight(self, weight: Tensor) -> Tensor:
        bits, clip = self.task.recipe.bits, self.task.recipe.clip
        if self.quantise is straight_through.ste_identity:
            return straight_through.ste_weight(weight, bits, clip)
        if clip == "mse":
            return straight_through.clipped_weight(weight, bits)
        return straight_through.ste_range_weight(weight, bits)

    def products(self):
        """Products of matrices in the task's dtype."""
        return torch.autocast(self.source.device.type, self.task.dtype, enabled=self.task.dtype != torch.float32)

    def logits(self, states: Tensor) -> Tensor:
        """(t, v) in float32, from last hidden states (t, d)."""
        with self.products():
            return self.source.logits(states).float()

    def loss(
        self, states: Tensor, aims: Tensor, criterion: Criterion, backward: bool = False, share: float = 1.0
    ) -> float:
        """Mean loss over tokens whose last hidden states are (t, d); aims (t, …): what belongs to each.

        backward: pass gradients of `share` times the loss on too; those of the logits exist for TOKENS tokens at a
        time.
        """
        leaf, total = states.detach().requires_grad_(backward), 0.0
        for part, aim in zip(leaf.split(TOKENS), aims.split(TOKENS), strict=True):
            with torch.set_grad_enabled(backward):
                loss = criterion(self.logits(part), aim) / len(states)
            if backward:
                (share * loss).backward()
            total += float(loss.detach())
        if backward:
            states.backward(leaf.grad)
        return total


class _Turned:
    """Quantises what a group's layers read of the residual stream, then turns it back for their own weights.

    The layers of a group are called with the same input, and share the product.
    """

    def __init__(self, quantise: Callable, changes: fold.BlockTransforms, group: str):
        self.quantise, self.factors = quantise, changes.norms.get(group)
        self.back = Kronecker.right(changes.residual.factors())  # the transpose
        self.input = self.output = None

    def __call__(self, x: Tensor, settings: QuantizerSettings, bounds=None) -> Tensor:
        if x is not self.input:
            quantised = self.quantise(x, settings, bounds)
            self.input = x
            self.output = self.back(quantised if self.factors is None else quantised / self.factors.to(quantised))
        return self.output


@dataclass
class Objective:
    """What a network is to do: after tokens of windows, say what `aims` tells of them, as `criterion` measures it.

    aims: (the windows' tokens (b, s), their places among all windows, those learned from first) -> (b, t, …) for
    the first t ≤ s tokens of each.
    """

    criterion: Criterion
    aims: Callable[[Tensor, Tensor], Tensor]


@dataclass
class TrainingLoop:
    """The loop: batches of windows, a step of the optimiser for each, and from time to time a look at `held_out`.

    leaves: what is learned. place: makes the rotation's parameters of them. steps, batch (windows of a step),
    micro_batch (windows computed at a time, whose gradients are summed; None: the batch), every (steps between
    looks), keep_every (steps between states kept for a restart): counts. factor: of the learning rates, by the part
    of the steps that is done.
    """

    task: LearningRun
    network: Network
    rotation: Rotation
    objective: Objective
    leaves: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    steps: int
    batch: int
    every: int
    keep_every: int
    factor: Callable[[float], float]
    generator: torch.Generator | None = None
    place: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    micro_batch: int | None = None

    def run(self) -> list[dict]:
        """All steps, those that an interrupted run has taken left out; returns the curve."""
        step, curve, recent = self._resume()
        rates, started, resumed = [group["lr"] for group in self.optimizer.param_groups], time.monotonic(), step
        if not curve:
            curve.append(self._look(0, None))
        while step < self.steps:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.factor(step / self.steps)
            recent.append(self._step(step))
            step += 1
            if step % self.every == 0 or step == self.steps:
                curve.append(self._look(step, sum(recent) / len(recent)))
                recent.clear()
                left = (time.monotonic() - started) / (step - resumed) * (self.steps - step)
                print(f"{self.steps - step} steps left, about {left:.0f} s", file=sys.stderr, flush=True)
            if step % self.keep_every == 0 or step == self.steps:
                self._keep(step, curve, recent)
        self.rotation.parameters = {name: p.detach() for name, p in self.place(self.leaves).items()}
        return curve

    def _step(self, step: int) -> float:
        chosen = draw_batch(len(self.task.windows), self.batch, step, self.task.seed)
        self.optimizer.zero_grad()
        loss = 0.0
        for part in chosen.split(self.micro_batch or self.batch):
            share = len(part) / len(chosen)
            loss += share * self._loss(self.task.windows[part], part, backward=True, share=share)
        self.optimizer.step()
        return loss

    def _loss(self, windows: Tensor, places: Tensor, backward: bool = False, share: float = 1.0) -> float:
        aims = self.objective.aims(windows, places).to(self.network.source.device)
        with torch.set_grad_enabled(backward):
            self.rotation.parameters = self.place(self.leaves)
            states = self.network(self.rotation, windows)[:, : aims.shape[1]]
            states, aims = states.flatten(0, 1), aims.flatten(0, 1)
            return self.network.loss(states, aims, self.objective.criterion, backward, share)

    def _look(self, step: int, loss: float | None) -> dict:
        """A line of the curve, with the mean loss over the held-out windows."""
        held_out, first = self.task.held_out, len(self.task.windows)
        places = torch.arange(first, first + len(held_out))
        at_once = self.micro_batch or self.batch
        parts = zip(held_out.split(at_once), places.split(at_once), strict=True)
        total = sum(self._loss(windows, where) * len(windows) for windows, where in parts)
        row = {"step": step, "loss": loss, "held_out": total / len(held_out)}
        row = {name: value for name, value in row.items() if value is not None}
        self.task.report(row)
        return row

    def _keep(self, step: int, curve: list[dict], recent: list[float]) -> None:
        tensors = {f"leaf.{name}": leaf for name, leaf in self.leaves.items()}
        for index, leaf in enumerate(self.leaves.values()):
            state = self.optimizer.state.get(leaf, {})
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        if self.generator is not None:
            tensors["generator"] = self.generator.get_state()
        self.task.kept.write(tensors, {"step": step, "curve": curve, "recent": recent})

    @torch.no_grad()
    def _resume(self) -> tuple[int, list[dict], list[float]]:
        """(steps taken, curve, losses since its last line) of an interrupted run, its state put in place."""
        found = self.task.kept.read()
        if found is None:
            return 0, [], []
        tensors, note = found
        for index, (name, leaf) in enumerate(self.leaves.items()):
            leaf.copy_(tensors[f"leaf.{name}"])
            prefix = f"optimizer.{index}."
            for key in (key for key in tensors if key.startswith(prefix)):
                value = tensors[key]
                count = value.ndim == 0 and not value.is_floating_point()  # of steps, which geoopt keeps as a number
                self.optimizer.state[leaf][key.removeprefix(prefix)] = int(value) if count else value.to(leaf.device)
        if self.generator is not None:
            self.generator.set_state(tensors["generator"])
        return note["step"], note["curve"], note["recent"]


def warmup_schedule(warmup: float) -> Callable[[float], float]:
    """A factor of learning rates by the part of the steps that is done: cosine to 0, linear from 0 over `warmup`.

    Adam's first steps are as long as it can make them, whatever the gradient's noise: without, they lose ground.
    """
    return lambda done: 0.5 * (1 + cos(pi * done)) * (min(1.0, done / warmup) if warmup else 1.0)


def draw_batch(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Places (batch,) of the windows of a step, out of `count`: all in random order, then all in another."""
    places = range(step * batch, (step + 1) * batch)
    orders = {epoch: _order(count, epoch, seed) for epoch in {place // count for place in places}}
    return torch.stack([orders[place // count][place % count] for place in places])


def _order(count: int, epoch: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(100_003 * seed + epoch))


def orthogonalised(rotation: Rotation) -> Rotation:
    """The rotation with its orthogonal parameters made so to float32, whatever error steps have left."""
    for name, parameter in rotation.expected().items():
        if parameter.must == "orthogonal":
            rotation.parameters[name] = nearest(rotation.parameters[name].double()).float()
    return rotation
