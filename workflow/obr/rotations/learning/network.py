"""A model's loss as a function of a rotation, and its gradient, with one block on the device at a time.

Forward keeps what enters each block. Backward goes from the last block to the first: each is loaded, run again with
gradients, and hands back the gradient of its input. That of the rotation adds up over the blocks.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from obr.errors import ObrError
from obr.methods.grid import Grid
from obr.models.blocks import StreamedBlocks
from obr.models.hadamard import Kronecker
from obr.models.hidden_states import MemoryBudget, StoredStates
from obr.rotations.base import Rotation
from obr.rotations.learning.rotated_block import RotatedBlock
from obr.rotations.learning.run import LearningRun
from obr.runtime.allocator import return_freed_memory

TOKENS = 512  # whose logits, a vocabulary wide each, exist at a time
BATCH_TOKENS = 2048  # that pass through a block at a time, unless the entry says how many windows

# Logits (t, v) of some tokens and what they should be (t, …) -> sum of the loss over the tokens.
Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Objective:
    """What a network is to do: after tokens of windows, say what `aims` tells of them, as `criterion` measures it.

    aims: (the windows' tokens (b, s), their places among all windows, those learned from first) -> (b, t, …) for
    the first t ≤ s tokens of each. prepare: called once with all windows (w, s) and places (w,) that `aims` will be
    asked for.
    """

    criterion: Criterion
    aims: Callable[[Tensor, Tensor], Tensor]
    prepare: Callable[[Tensor, Tensor], None] = lambda windows, places: None


class Network:
    """A model rotated and quantised again in every pass, with gradients on the rotation's parameters.

    quantise: `straight_through.ste_identity` or `.ste_range`. at_once: windows that pass through a block at a time;
    None for as many as have BATCH_TOKENS tokens. Folds and hidden states are float32; products are of `task.dtype`.
    The recipe's bits and clip say how weights are rounded in every pass: clip is minmax or mse.

    Blocks are read from disk in every pass. What enters them lies in memory within `room`, which at first is that of
    the task, and in files beyond.

    Raises:
        ObrError: clips that are to be learned.
    """

    def __init__(self, task: LearningRun, quantise: Callable, at_once: int | None = None):
        if task.recipe.clip == "learned":
            raise ObrError(
                "learn.quantise.clip is 'learned', but this learner does not learn clips; use mse or minmax, or kind "
                "flatquant or omniquant."
            )
        self.task, self.quantise, self.room = task, quantise, task.room
        self.at_once = at_once or max(1, BATCH_TOKENS // task.windows.shape[1])
        self.source = StreamedBlocks(task.model, None, torch.float32, task.device)
        self.grids: list[dict[str, Grid]] = []
        self._held: tuple[int, nn.Module] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> nn.Module:
        """Block `index`, wrapped. The block that was loaded last is kept until another is asked for."""
        if self._held is None or self._held[0] != index:
            self.release()
            self._held = index, self.source.load(index)
        return self._held[1]

    def release(self) -> None:
        """Let go of the block that was loaded last."""
        self._held = None
        return_freed_memory()

    def loss(
        self, rotation: Rotation, windows: Tensor, places: Tensor, objective: Objective, backward: bool = False
    ) -> float:
        """Mean loss over the tokens of windows (b, s) that have these places (b,) among all.

        backward: add its gradient to those of the rotation's parameters too.
        """
        self.grids = [{} for _ in range(len(self))]  # found once a pass, in the forward direction
        with torch.no_grad():
            hidden, arguments, room = self._entering(rotation, windows, self.room)
            kept = [hidden]
            for index in range(len(self)):
                leaving, room = self._leaving(hidden, room) if backward else (hidden, room)
                self._forward(index, rotation, hidden, leaving, arguments[index])
                hidden = leaving
                if backward:
                    kept.append(leaving)
        total = self._judge(rotation, hidden, windows, places, objective, backward)
        if backward:
            slopes = kept.pop()  # which `_judge` has put in the place of the last hidden states
            for index in reversed(range(len(self))):
                self._backward(index, rotation, kept.pop(), slopes, arguments[index])
            self._backward_embedding(rotation, windows, slopes)
        return total

    def _entering(
        self, rotation: Rotation, windows: Tensor, room: MemoryBudget
    ) -> tuple[StoredStates, list[dict], MemoryBudget]:
        """(what enters the first block, batch by batch; arguments of each block; the room that is left)."""
        hidden = None
        for number, part in enumerate(windows.split(self.at_once)):
            states, arguments = self._embedded(rotation, part)
            if hidden is None:
                shapes = [(len(other), *states.shape[1:]) for other in windows.split(self.at_once)]
                hidden = StoredStates(shapes, torch.float32, self.source.device, room)
            hidden[number] = states
        return hidden, arguments, left_of(room, hidden)

    def _leaving(self, like: StoredStates, room: MemoryBudget) -> tuple[StoredStates, MemoryBudget]:
        """(a place for states of the same shapes, the room that is left)."""
        states = StoredStates(like.shapes, like.dtype, like.device, room)
        return states, left_of(room, states)

    def _embedded(self, rotation: Rotation, windows: Tensor) -> tuple[Tensor, list[dict]]:
        """(embeddings (b, s, d) on the rotated residual stream, arguments of each block)."""
        rows, arguments = self.source.embed(windows)
        states, residual = torch.cat(list(rows)).float(), rotation.residual()
        return states if residual is None else residual(states), arguments

    def _block(self, index: int, rotation: Rotation, learns: bool) -> RotatedBlock:
        return RotatedBlock(
            self.load(index),
            index,
            rotation,
            self.source.layout_at(index),
            self.task.recipe,
            self.quantise,
            self.grids[index],
            learns,
        )

    def _forward(
        self, index: int, rotation: Rotation, entering: StoredStates, leaving: StoredStates, arguments: dict
    ) -> None:
        block = self._block(index, rotation, learns=False)
        with self.products():
            for number, states in enumerate(entering):
                leaving[number] = block(states, arguments)

    def _backward(
        self, index: int, rotation: Rotation, entering: StoredStates, slopes: StoredStates, arguments: dict
    ) -> None:
        """Add the gradient of the rotation by this block; `slopes` move from what leaves it to what enters it."""
        block = self._block(index, rotation, learns=True)
        for number in range(len(entering)):
            slopes[number] = self._slope(block, entering[number], slopes[number], arguments)
        block.hand_back()

    def _slope(self, block: RotatedBlock, states: Tensor, slope: Tensor, arguments: dict) -> Tensor:
        leaf = states.detach().requires_grad_()
        with torch.enable_grad(), self.products():
            out = block(leaf, arguments)
        out.backward(slope)
        return leaf.grad

    def _backward_embedding(self, rotation: Rotation, windows: Tensor, slopes: StoredStates) -> None:
        for number, part in enumerate(windows.split(self.at_once)):
            with torch.enable_grad():
                states, _ = self._embedded(rotation, part)
            if states.requires_grad:
                states.backward(slopes[number])

    def _judge(
        self, rotation: Rotation, last: StoredStates, windows: Tensor, places: Tensor, objective: Objective,
        backward: bool,
    ) -> float:  # fmt: skip
        """The mean loss; its gradient by the last hidden states takes their place. Six parameters and the states."""
        device = self.source.device
        total = torch.zeros((), dtype=torch.float64, device=device)  # no number yet: a GPU is waited for
        batches = zip(windows.split(self.at_once), places.split(self.at_once), strict=True)
        for number, (part, where) in enumerate(batches):
            aims, share = objective.aims(part, where).to(device), len(part) / len(windows)
            leaf = last[number].detach().requires_grad_(backward)
            with torch.set_grad_enabled(backward):
                states, residual = leaf, rotation.residual()
                if residual is not None:
                    states = Kronecker.right(residual.factors())(states)
                states, aims = states[:, : aims.shape[1]].flatten(0, 1), aims.flatten(0, 1)
                total += share * self.head_loss(states, aims, objective.criterion, backward, share)
            if backward:
                last[number] = leaf.grad
        return float(total)

    def head_loss(
        self, states: Tensor, aims: Tensor, criterion: Criterion, backward: bool = False, share: float = 1.0
    ) -> Tensor:
        """Mean loss, float64, over tokens whose last hidden states are (t, d); aims (t, …): what belongs to each.

        backward: pass gradients of `share` times the loss on too; those of the logits exist for TOKENS tokens at a
        time.
        """
        leaf = states.detach().requires_grad_(backward)
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        for part, aim in zip(leaf.split(TOKENS), aims.split(TOKENS), strict=True):
            with torch.set_grad_enabled(backward):
                loss = criterion(self.logits(part), aim) / len(states)
            if backward:
                (share * loss).backward()
            total += loss.detach()
        if backward:
            states.backward(leaf.grad)
        return total

    def products(self) -> AbstractContextManager:
        """Products of matrices in the task's dtype."""
        if self.task.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.source.device.type, self.task.dtype)

    def logits(self, states: Tensor) -> Tensor:
        """(t, v) in float32, from last hidden states (t, d)."""
        with self.products():
            return self.source.logits(states).float()


def left_of(room: MemoryBudget, states: StoredStates) -> MemoryBudget:
    """What is left of the room beside states that lie in memory."""
    taken = 0 if states.memory is None else states.needed / 1e6
    return replace(room, megabytes=room.megabytes - taken)
