"""Moments of what the experts of a block read: each expert's from the tokens that the router sends to it.

The states that enter the experts are kept once for all of them, with what the router chose. An expert's inputs are
its tokens' states, multiplied by the weights with which the router adds up outputs: an error of an expert counts as
much as its output does.

An expert with fewer tokens than a layer has columns shares: with t tokens and n columns, H = m (t/n A + (1 - t/n) B)
where A is the mean of x xᵀ over its own tokens, weighted as routed, B the mean over all tokens of the block as this
expert reads them, and m the sum of its squared routing weights (1 if it has no tokens).

Where targets are outputs of the dense model, each token that the compressed model sends to an expert is paired with
the dense model's state at the same place, whatever experts it went to there. The target is what the dense expert
makes of it. What the residual stream lacks at a token is paid back by the token's experts together. Of experts with
the weights g, the one with g_e makes up for the part g_e² / Σ g², the split with the least change of their outputs.
Shared experts pay nothing back.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from obr.calibration.moments import Accumulator, Captured, GroupStatistics, Moments
from obr.models.architectures import Layout, kind_of
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


@dataclass
class DenseBlock:
    """The block before compression and its hidden states. pays_back: what the residual stream lacks is wanted."""

    block: nn.Module
    hidden: HiddenStates
    pays_back: bool = False


@dataclass
class Tokens:
    """An expert's tokens of a window: states (t, d), routing weights (t,), the dense model's states (t, d), and the
    expert's part of what the residual stream lacks (t, d)."""

    states: Tensor
    weights: Tensor
    dense: Tensor | None = None
    lack: Tensor | None = None


class ExpertInputs:
    """What the experts of a block read on b windows, found in one pass that ends at the experts.

    Six parameters: a block, what it is called with, and the same of the dense model.

    hidden: b inputs (1, s, d) of the block. room: for the states that enter the experts, and once more in memory for
    the tokens of as many experts in turn as fit. dense: for targets that are outputs of the dense model.
    """

    def __init__(
        self,
        block: nn.Module,
        layout: Layout,
        hidden: HiddenStates,
        arguments: dict,
        room: MemoryBudget | None = None,
        dense: DenseBlock | None = None,
    ):
        self.block, self.layout, self.dense = block, layout.in_block(block), dense
        room = room or MemoryBudget()
        copies = 1 + (dense is not None) + bool(dense and dense.pays_back)
        room = replace(room, megabytes=room.megabytes / copies)
        self.bytes = room.megabytes * 1e6  # of the states of gathered tokens
        self.chosen: list[tuple[Tensor, Tensor]] = []  # (t, k) numbers of experts and routing weights, by window
        self.gathered: dict[int, list[Tokens]] = {}  # see `_tokens_of`
        self.count = block.get_submodule(self.layout.experts).num_experts
        self.states, streams = self._entering(block, hidden, arguments, room)
        self.dense_states, self.lack = None, None
        if dense is not None:
            chosen, self.chosen = self.chosen, []
            self.dense_states, dense_streams = self._entering(dense.block, dense.hidden, arguments, room)
            self.chosen, self.lack = chosen, dense_streams
            for window, stream in enumerate(streams or ()):
                self.lack[window] = self.lack[window] - stream

    def _entering(
        self, block: nn.Module, hidden: HiddenStates, arguments: dict, room: MemoryBudget
    ) -> tuple[HiddenStates, HiddenStates | None]:
        """(states that enter the experts, the residual stream to which they add if that is wanted), by window."""
        states, streams, hooks = _like(hidden, room), None, []
        if self.dense is not None and self.dense.pays_back:
            streams = _like(hidden, room)
            norm = block.get_submodule(self.layout.norms["up_gate"])

            def keep(_module: nn.Module, inputs: tuple) -> None:
                streams[len(self.chosen)] = inputs[0]

            hooks.append(norm.register_forward_pre_hook(keep))

        def take(found: Tensor, numbers: Tensor, weights: Tensor) -> None:
            states[len(self.chosen)] = found[None]
            self.chosen.append((numbers, weights))
            raise Captured

        experts: Experts = block.get_submodule(self.layout.experts)
        experts.observer = take
        try:
            for entering in hidden:
                with suppress(Captured):
                    run_block(block, entering, arguments)
        finally:
            experts.observer = None
            for hook in hooks:
                hook.remove()
        return states, streams

    def tokens(self, number: int) -> int:
        """How many tokens an expert gets."""
        return self._counts[number]

    @cached_property
    def _counts(self) -> list[int]:
        numbers = torch.cat([numbers.flatten() for numbers, _ in self.chosen])
        return torch.bincount(numbers, minlength=self.count).tolist()

    def _tokens_of(self, number: int) -> list[Tokens]:
        """An expert's tokens by window, on the host.

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
            for window, states in enumerate(self.states):
                self._gather(window, states[0], chosen)
        return self.gathered[number]

    def _gather(self, window: int, states: Tensor, experts: list[int]) -> None:
        """Add one window's tokens of these experts; states (t, d) enter all experts."""
        numbers, weights = self.chosen[window]
        dense = None if self.dense_states is None else self.dense_states[window][0]
        lack = None if self.lack is None else self.lack[window][0]
        whole = weights.float().square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        for expert in experts:
            rows, place = torch.where(numbers == expert)
            own = weights[rows, place].float()
            found = Tokens(states[rows].cpu(), own.cpu())
            if dense is not None:
                found.dense = dense[rows].cpu()
            if lack is not None:
                found.lack = (lack[rows].float() * (own.square() / whole[rows])[:, None]).cpu()
            self.gathered[expert].append(found)

    def collect(self, group: str, share: bool = True) -> Moments:
        """Moments of a group of one expert's layers. share: with the block's, if columns are more than tokens."""
        return self.statistics(group, share).moments

    def statistics(self, group: str, share: bool = True) -> GroupStatistics:
        """The moments, and, beside a dense model, drift and what the stream lacks. share: as of `collect`."""
        number, linear = expert_of(group), self.block.get_submodule(self.layout.groups[group][0])
        columns, tokens, device = linear.weight.shape[1], self.tokens(number), self.states.device
        sums = _Sums(self, linear.weight, group)
        mass = 0.0
        for found in self._tokens_of(number):
            mass += float(found.weights.square().sum())
            sums.add(found, found.weights.to(device)[:, None])
        own = sums.totals()
        if tokens < columns and share:
            part = tokens / columns if mass else 0.0
            own = _mixed(own, self._of_all(group, linear.weight), part, mass or 1.0)
        return replace(own, moments=replace(own.moments, tokens=tokens))

    def _of_all(self, group: str, weight: Tensor) -> GroupStatistics:
        """Of all tokens of the block, each counted as one part of all, as this expert reads them.

        They lack nothing: what is paid back is of the expert's own tokens.
        """
        total = _Sums(self, weight, group)
        for window, states in enumerate(self.states):
            dense = None if self.dense_states is None else self.dense_states[window][0]
            total.add(Tokens(states[0], torch.ones(()), dense), 1.0)
        return total.totals(sum(len(numbers) for numbers, _ in self.chosen))

    def inputs(self, block: nn.Module, group: str, states: Tensor) -> Tensor:
        """(t, n) float32: what the layers of the group read of states (t, d), behind their online transform."""
        linear, found = block.get_submodule(self.layout.groups[group][0]), []
        if not len(states):
            return states.new_zeros(0, linear.weight.shape[1], dtype=torch.float32)
        linear.observer = _then_stop(found)
        try:
            with suppress(Captured):
                block.get_submodule(f"{self.layout.experts}.{expert_of(group)}")(states)
        finally:
            linear.observer = None
        return found[0].float()


class _Sums:
    """Sums over windows of what a group of an expert's layers, one of them with weight (r, n), reads."""

    def __init__(self, source: ExpertInputs, weight: Tensor, group: str):
        self.source, self.group = source, group
        self.moments = Accumulator(weight.shape[1], len(source.states), weight.device)
        self.drift = None if source.dense is None else torch.zeros_like(self.moments.upper)
        pays = source.lack is not None and kind_of(group) == "down"
        self.lacking = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if pays else None

    def add(self, tokens: Tokens, weights: Tensor | float) -> None:
        source, device = self.source, self.moments.upper.device
        x = source.inputs(source.block, self.group, tokens.states.to(device)) * weights
        self.moments.add(x)
        if self.drift is not None:
            wanted = source.inputs(source.dense.block, self.group, tokens.dense.to(device)) * weights
            self.drift.addmm_((wanted - x).T, x, alpha=self.moments.factor)
        if self.lacking is not None and tokens.lack is not None:
            self.lacking.addmm_(tokens.lack.to(device).T, x, alpha=self.moments.factor)

    def totals(self, count: int = 1) -> GroupStatistics:
        """The sums, divided by a count."""
        found = self.moments.moments()
        parts = (found.hessian, found.harmonic, self.drift, self.lacking)
        hessian, harmonic, drift, lacking = (None if x is None else x / count for x in parts)
        return GroupStatistics(Moments(hessian, harmonic), drift, lacking)


def _like(hidden: HiddenStates, room: MemoryBudget) -> HiddenStates:
    return HiddenStates(len(hidden), hidden.shape, hidden.dtype, hidden.device, room)


def _then_stop(found: list[Tensor]):
    def observe(x: Tensor) -> None:
        found.append(x)
        raise Captured

    return observe


def _mixed(own: GroupStatistics, of_all: GroupStatistics, part: float, mass: float) -> GroupStatistics:
    """The part of an expert's own sums that counts, with those of all tokens, which are means, at its mass."""
    rest = (1 - part) * mass
    mine, all_tokens = own.moments, of_all.moments
    moments = Moments(
        part * mine.hessian + rest * all_tokens.hessian, part * mine.harmonic + rest * all_tokens.harmonic
    )
    drift = None if own.drift is None else part * own.drift + rest * of_all.drift
    return GroupStatistics(moments, drift, None if own.lacking is None else part * own.lacking)
