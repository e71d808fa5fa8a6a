"""Where the compression of a block gets its Hessians from: files, or the compressed blocks before it."""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from obr.calibration import asymmetric, collect_hessians
from obr.calibration.attention_weights import ATTENDED, attention_weights
from obr.calibration.expert_inputs import DenseBlock, ExpertInputs, expert_of, is_of_expert
from obr.calibration.moments import GroupStatistics
from obr.calibration.token_weights import token_weights
from obr.compression.refine import Windows
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.models.architectures import prefix_of
from obr.models.blocks import Blocks, run_in_place
from obr.models.hidden_states import HiddenStates, MemoryBudget
from obr.models.layers import set_quantizers
from obr.runtime.resume import block_file


class HessianSource:
    """Where the Hessians of a compression come from: passes through the blocks done so far, or files.

    tokens: (b, s) for passes. cached: folder of Hessians of the dense model. room: for the hidden states. A recipe
    whose targets are outputs of the dense model has the dense blocks run beside the compressed ones, on hidden states
    of their own; held-out windows pass through the compressed blocks alone, unless they decide about targets.
    """

    def __init__(
        self,
        blocks: Blocks,
        recipe: Recipe,
        tokens: Tensor | None,
        cached: Path | None,
        room: MemoryBudget | None = None,
    ):
        self.blocks, self.recipe, self.cached, self.chosen = blocks, recipe, cached, recipe.chosen(len(blocks))
        self.quantised = recipe if recipe.hessian_inputs == "quantised" else None
        self.hidden, self.arguments = None, None
        self.dense, self.dense_hidden, self.held_out, self.dense_held_out = None, None, None, None
        self.gathered: dict[str, GroupStatistics] = {}  # of the groups of a block that are still to come
        self.weights: dict[tuple[int, str], Tensor] = {}  # (b, s) of all windows' tokens, by block and group
        self.routed: list[ExpertInputs] = []  # of a block's experts: of calibration windows, and of held-out ones
        check_experts(blocks, recipe)
        if tokens is not None and recipe.needs_hessian:
            room, count = room or MemoryBudget(), len(tokens) - recipe.held_out
            if count < 1:
                raise ObrError(
                    f"held_out is {recipe.held_out}, but there are {len(tokens)} calibration windows; hold out fewer."
                )
            _check_stream(blocks, recipe)
            if recipe.token_weights:
                self.weights = token_weights(blocks, tokens.to(blocks.device), recipe.token_weights, room)
            is_judged = recipe.held_out and (recipe.target_shrinkage == "held_out" or recipe.refine_steps > 0)
            copies = 1 + recipe.runs_dense + bool(recipe.held_out) + bool(is_judged)
            copies *= 3 if blocks.layout.experts else 1  # beside what enters a block, what enters its experts, twice
            room = self.room = replace(room, megabytes=room.megabytes / copies)
            if recipe.runs_dense:
                self.dense_hidden, _ = blocks.embed(tokens[:count], room)
            if recipe.held_out:
                self.held_out, _ = blocks.embed(tokens[count:], room)
            if is_judged:
                self.dense_held_out, _ = blocks.embed(tokens[count:], room)
            self.hidden, self.arguments = blocks.embed(tokens[:count], room)

    def prepared(self, index: int, block: nn.Module) -> nn.Module:
        """A block that is to be compressed, its activations quantised if that is what the Hessians are to see."""
        self.routed = []
        if self.dense_hidden is not None and index <= self.chosen[-1]:
            self.dense = copy.deepcopy(block)
        return self._quantised(index, block)

    def resumed(self, index: int, block: nn.Module) -> nn.Module:
        """The same for a block that is compressed already."""
        if self.dense_hidden is not None:
            self.dense = self.blocks.load(index)
        return self._quantised(index, block)

    def _quantised(self, index: int, block: nn.Module) -> nn.Module:
        if self.quantised is not None and index in self.chosen:
            set_quantizers(block, self.blocks.layout, self.quantised)
        return block

    def begin(self, block: nn.Module, index: int) -> None:
        """Collect what is wanted of a whole block before any of its layers changes."""
        if self.hidden is not None and self.recipe.hessian_scope == "block" and index in self.chosen:
            layout = self.blocks.layout_at(index)
            groups = [group for group in layout.groups if not is_of_expert(group)]
            self.gathered = self._gathered(block, index, groups)
            if layout.experts:
                self.routed = self._routed(block, index)

    def collected(self, block: nn.Module, index: int, group: str) -> GroupStatistics | None:
        """Of a group's inputs; None where there are neither tokens nor files."""
        if self.hidden is not None and is_of_expert(group):
            return self.gathered.pop(group, None) or self._of_expert(block, index, group)
        if self.hidden is not None:
            return self.gathered.pop(group, None) or self._gathered(block, index, [group])[group]
        if self.cached is not None:
            path, harmonic = self.cached / block_file(index), self.recipe.needs_harmonic
            return GroupStatistics(collect_hessians.load(path, self.blocks.device, [group], harmonic)[group])
        return None

    def _of_expert(self, block: nn.Module, index: int, group: str) -> GroupStatistics:
        """Of what a group of an expert's layers reads. The states that enter the experts are found once a block.

        With the scope of a block, what an expert's down layer reads is collected before the first of its layers
        changes, so that the Hessians of one expert at a time are in memory.
        """
        if not self.routed:
            self.routed = self._routed(block, index)
        down = f"{prefix_of(group)}down"
        if self.recipe.hessian_scope == "block" and group != down:
            self.gathered[down] = self._of_routed(down)
        return self._of_routed(group)

    def _of_routed(self, group: str) -> GroupStatistics:
        found, *held_out = self.routed
        statistics = found.statistics(group)
        if held_out and held_out[0].tokens(expert_of(group)):
            statistics.held_out = held_out[0].statistics(group, share=False)
        return statistics

    def _routed(self, block: nn.Module, index: int) -> list[ExpertInputs]:
        """What enters the experts of a block as it is: of calibration windows, and of held-out ones."""
        windows = [(self.hidden, self.dense_hidden)]
        if self.held_out is not None:
            windows.append((self.held_out, self.dense_held_out))
        found, pays_back = [], bool(self.recipe.residual)
        for hidden, beside in windows:
            unused = beside is None or not self.recipe.needs_dense
            dense = None if unused else DenseBlock(self.dense, beside, pays_back)
            arguments, layout = self.arguments[index], self.blocks.layout_at(index)
            found.append(ExpertInputs(block, layout, hidden, arguments, self.room, dense))
        return found

    def _gathered(self, block: nn.Module, index: int, groups: list[str]) -> dict[str, GroupStatistics]:
        """Of the inputs of some groups, from one pass through a block as it is."""
        found = self._of_windows(block, index, groups, self.hidden, self.dense_hidden)
        if self.held_out is not None:
            held_out = self._of_windows(
                block, index, groups, self.held_out, self.dense_held_out, first=len(self.hidden)
            )
            for group in groups:
                found[group].held_out = held_out[group]
        return found

    def _of_windows(
        self,
        block: nn.Module,
        index: int,
        groups: list[str],
        hidden: HiddenStates,
        dense: HiddenStates | None,
        first: int = 0,
    ) -> dict[str, GroupStatistics]:
        """Of the windows with these hidden states, beside those of the dense model if there are such.

        first: the place of the first of them among all calibration windows.
        """
        layout, arguments, weights = self.blocks.layout_at(index), self.arguments[index], None
        if self.weights:
            weights = {group: self.weights[index, group][first : first + len(hidden)] for group in groups}
        attended = [group for group in groups if group in ATTENDED]
        if self.recipe.attention_weights and attended:
            received = attention_weights(block, layout, hidden, arguments, self.recipe.attention_weights)
            weights = weights or {group: torch.ones_like(received) for group in groups}
            weights |= {group: weights[group] * received for group in attended}
        if dense is not None and self.recipe.needs_dense:
            return asymmetric.collect(block, self.dense, layout, hidden, dense, arguments, groups, weights)
        moments = collect_hessians.collect(block, layout, hidden, arguments, groups, False, weights)
        return {group: GroupStatistics(moments[group]) for group in groups}

    def windows_of_both(self) -> tuple[Windows, Windows | None]:
        """What enters the current block in the compressed model and in the dense one: of the calibration windows, and
        of held-out ones."""
        held_out = Windows(self.held_out, self.dense_held_out) if self.held_out is not None else None
        return Windows(self.hidden, self.dense_hidden), held_out

    def advances(self, index: int) -> bool:
        """Whether a later block needs what this one puts out."""
        return self.hidden is not None and index < self.chosen[-1]

    def advance(self, index: int, block: nn.Module | None) -> None:
        """Pass the hidden states through a compressed block, if a later one needs them."""
        if self.advances(index):
            run_in_place(block, self.hidden, self.arguments[index])
            if self.dense_hidden is not None:
                run_in_place(self.dense, self.dense_hidden, self.arguments[index])
            if self.held_out is not None:
                run_in_place(block, self.held_out, self.arguments[index])
            if self.dense_held_out is not None:
                run_in_place(self.dense, self.dense_held_out, self.arguments[index])
        self.dense, self.routed = None, []


def _check_stream(blocks: Blocks, recipe: Recipe) -> None:
    """Raise ObrError if layers are to make up for the residual stream, but add to it otherwise than as they are."""
    factor = getattr(blocks.model.config, "residual_multiplier", 1.0)
    if recipe.residual and not blocks.layout.adds_plainly:
        raise ObrError(
            f"residual is {recipe.residual}, but layers of {blocks.config.model_type} models are not added to the "
            "residual stream one after the other as they are; use residual 0."
        )
    if recipe.residual and factor != 1.0:
        raise ObrError(
            f"residual is {recipe.residual}, but this model's layers are multiplied by {factor} before they are "
            "added to the residual stream; use residual 0."
        )


def check_experts(blocks: Blocks, recipe: Recipe) -> None:
    """Raise ObrError at settings that experts have no meaning for, or that cost too much with them."""
    if not blocks.layout.experts:
        return
    family = blocks.config.model_type
    if recipe.token_weights:
        raise ObrError(
            f"token_weights is {recipe.token_weights}, but experts of {family} models get tokens in the compressed "
            "model that the dense one sends elsewhere, for which no gradient is known; set token_weights to 0."
        )
    if recipe.allocation is not None:
        raise ObrError(
            "Allocations measure what each layer costs by a pass through the model for each, but experts of "
            f"{family} models are thousands of layers; leave allocation out."
        )
