"""Learning over a whole model: the loop that descends, and its schedules."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import Tensor

from obr.rotations.base import Rotation
from obr.rotations.learning.cayley_sgd import nearest
from obr.rotations.learning.network import Network, Objective
from obr.rotations.learning.run import LearningRun


@dataclass
class TrainingLoop:
    """The loop: batches of windows, a step of the optimiser for each, and from time to time a look at `held_out`.

    leaves: what is learned. place: makes the rotation's parameters of them. steps, batch (windows of a step), every
    (steps between looks), keep_every (steps between states kept for a restart): counts. factor: of the learning
    rates, by the part of the steps that is done.
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

    def run(self) -> list[dict]:
        """All steps, those that an interrupted run has taken left out; returns the curve."""
        step, curve, recent = self._resume()
        self._prepare(step)
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

    def _prepare(self, step: int) -> None:
        """Tell the objective which windows the steps from this one on, and the looks, ask for."""
        count, batch = len(self.task.windows), self.batch
        drawn = [draw_batch(count, batch, later, self.task.seed) for later in range(step, self.steps)]
        places = torch.cat([*drawn, torch.arange(count, count + len(self.task.held_out))]).unique()
        self.objective.prepare(torch.cat([self.task.windows, self.task.held_out])[places], places)

    def _step(self, step: int) -> float:
        chosen = draw_batch(len(self.task.windows), self.batch, step, self.task.seed)
        self.optimizer.zero_grad()
        with torch.enable_grad():
            placed = self.place(self.leaves)
        # The rotation's parameters as the blocks see them: their gradients add up over all blocks.
        seen = {name: p.detach().requires_grad_(p.requires_grad) for name, p in placed.items()}
        self.rotation.parameters = seen
        loss = self.network.loss(self.rotation, self.task.windows[chosen], chosen, self.objective, backward=True)
        reached = [name for name, p in seen.items() if p.grad is not None]
        torch.autograd.backward([placed[name] for name in reached], [seen[name].grad for name in reached])
        self.optimizer.step()
        return loss

    def _look(self, step: int, loss: float | None) -> dict:
        """A line of the curve, with the mean loss over the held-out windows."""
        held_out, first = self.task.held_out, len(self.task.windows)
        places = torch.arange(first, first + len(held_out))
        with torch.no_grad():
            self.rotation.parameters = self.place(self.leaves)
        row = {"step": step, "loss": loss}
        row["held_out"] = self.network.loss(self.rotation, held_out, places, self.objective)
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
