"""Moments of what the experts of a block read: each expert's from the tokens that the router sends to it.

The states that enter the experts are kept once for all of them, with what the router chose. An expert's inputs are
its tokens' states, multiplied by the weights with which the router adds up outputs: an error of an expert counts as
much as its output does.

An expert with fewer tokens than a layer has columns shares: with t tokens and n columns, H = m (t/n A + (1 - t/n) B)
where A is the mean of x xᵀ over its own tokens, weighted as routed, B the mean over all tokens of the block as this
expert reads them, and m the sum of its squared routing weights (1 if it has no tokens).
"""

from contextlib import suppress
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from obr.calibration.moments import Accumulator, Captured, Moments
from obr.models.architectures import Layout
from obr.models.blocks import run_block
from obr.models.hidden_states import HiddenStates, MemoryBudget
from obr.models.split import Experts


def is_of_expert(group: str) -> bool:
    """Whether a group of a block is one of an expert."""
    return group.startswith("experts.")


def expert_of(group: str) -> int:
    """The number of the expert that a group is of."""
    return int(group.split(".")[1])


def shared_flags(moments: Moments) -> list[str]:
    """What the report says of layers that share the block's Hessian; nothing of others."""
    tokens, columns = moments.tokens, len(moments.hessian)
    if tokens is None or tokens >= columns:
        return []
    return [f"{tokens} tokens for {columns} columns, Hessian shared with the block's"]


class ExpertInputs:
    """What the experts of a block read on b windows, found in one pass that ends at the experts.

    hidden: b inputs (1, s, d) of the block. room: for the states that enter the experts, and once more in memory for
    the tokens of as many experts in turn as fit.
    """

    def __init__(
        self,
        block: nn.Module,
        layout: Layout,
        hidden: HiddenStates,
        arguments: dict,
        room: MemoryBudget | None = None,
    ):
        self.block, self.layout = block, layout.in_block(block)
        self.states = HiddenStates(len(hidden), hidden.shape, hidden.dtype, hidden.device, room)
        self.chosen: list[tuple[Tensor, Tensor]] = []  # (t, k) numbers of experts and routing weights, by window
        self.gathered: dict[int, list[tuple[Tensor, Tensor]]] = {}  # see `_tokens_of`
        self.bytes = (room or MemoryBudget()).megabytes * 1e6
        experts: Experts = block.get_submodule(self.layout.experts)
        self.count = experts.num_experts
        experts.observer = self._take
        try:
            for states in hidden:
                with suppress(Captured):
                    run_block(block, states, arguments)
        finally:
            experts.observer = None

    def _take(self, states: Tensor, numbers: Tensor, weights: Tensor) -> None:
        self.states[len(self.chosen)] = states[None]
        self.chosen.append((numbers, weights))
        raise Captured

    def tokens(self, number: int) -> int:
        """How many tokens an expert gets."""
        return self._counts[number]

    @cached_property
    def _counts(self) -> list[int]:
        numbers = torch.cat([numbers.flatten() for numbers, _ in self.chosen])
        return torch.bincount(numbers, minlength=self.count).tolist()

    def _tokens_of(self, number: int) -> list[tuple[Tensor, Tensor]]:
        """Of an expert's tokens (states (t, d), routing weights (t,)) by window, on the host.

        One pass over the windows gathers those of this and the next experts, as many as fit.
        """
        if number not in self.gathered:
            taken, chosen = 0.0, []
            for other in range(number, self.count):
                taken += self._counts[other] * self.states.shape[-1] * self.states.dtype.itemsize
                if chosen and taken > self.bytes:
                    break
                chosen.append(other)
            self.gathered = {other: [] for other in chosen}
            for states, (numbers, weights) in zip(self.states, self.chosen, strict=True):
                for other in chosen:
                    rows, place = torch.where(numbers == other)
                    self.gathered[other].append((states[0, rows].cpu(), weights[rows, place].float().cpu()))
        return self.gathered[number]

    def collect(self, group: str, share: bool = True) -> Moments:
        """Moments of a group of one expert's layers. share: with the block's, if columns are more than tokens."""
        number = expert_of(group)
        columns = self.block.get_submodule(self.layout.groups[group][0]).weight.shape[1]
        own = Accumulator(columns, len(self.states), self.states.device)
        mass, device = 0.0, self.states.device
        for states, factors in self._tokens_of(number):
            mass += float(factors.square().sum())
            own.add(self._inputs(group, number, states.to(device)) * factors.to(device)[:, None])
        found, tokens = own.moments(), self.tokens(number)
        if tokens < columns and share:
            part = tokens / columns if mass else 0.0
            found = _mixed(found, self._of_all(group, number, columns), part, mass or 1.0)
        return replace(found, tokens=tokens)

    def _of_all(self, group: str, number: int, columns: int) -> Moments:
        """Moments of all tokens of the block, each counted as one part of all, as this expert reads them."""
        total = Accumulator(columns, len(self.states), self.states.device)
        for states in self.states:
            total.add(self._inputs(group, number, states[0]))
        count = sum(len(numbers) for numbers, _ in self.chosen)
        found = total.moments()
        return Moments(found.hessian / count, found.harmonic / count)

    def _inputs(self, group: str, number: int, states: Tensor) -> Tensor:
        """(t, n) float32: what the layers of the group read of states (t, d), behind their online transform."""
        linear, found = self.block.get_submodule(self.layout.groups[group][0]), []
        if not len(states):
            return states.new_zeros(0, linear.weight.shape[1], dtype=torch.float32)
        linear.observer = _then_stop(found)
        try:
            with suppress(Captured):
                self.block.get_submodule(f"{self.layout.experts}.{number}")(states)
        finally:
            linear.observer = None
        return found[0].float()


def _then_stop(found: list[Tensor]):
    def observe(x: Tensor) -> None:
        found.append(x)
        raise Captured

    return observe


def _mixed(own: Moments, of_all: Moments, part: float, mass: float) -> Moments:
    """The part of an expert's own moments that counts, with those of all tokens, which are means, at its mass."""
    rest = (1 - part) * mass
    return Moments(part * own.hessian + rest * of_all.hessian, part * own.harmonic + rest * of_all.harmonic)
