"""Texts and prompts pass through a model together, so that each of its blocks is loaded once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from obr.evaluation.resume_point import ResumePoint
from obr.models.blocks import Blocks, run_block
from obr.models.hidden_states import MemoryBudget, StoredStates
from obr.models.prefetch import in_turn
from obr.runtime.progress import Progress


class Part(Protocol):
    """What is evaluated: pieces of hidden states, and the result once they have left the last block.

    shapes: (b, s) tokens of each piece.
    """

    shapes: list[tuple[int, int]]

    def entering(self) -> Iterator[Tensor]:
        """The hidden states (b, s, d) of each piece in front of the first block."""

    def arguments(self, index: int, piece: int, states: Tensor) -> dict:
        """The keyword arguments with which block `index` is called for a piece's states."""

    def finish(self, states: Iterator[Tensor]) -> Any:
        """The result, from the states of each piece behind the last block."""


@torch.no_grad()
def run(
    blocks: Blocks,
    parts: Sequence[Part],
    room: MemoryBudget | None = None,
    shown: str | None = None,
    resume: ResumePoint | None = None,
) -> list[Any]:
    """The result of each part.

    Args:
        blocks: of the model. One is in memory at a time; on a GPU the next one is read meanwhile.
        room: for the hidden states of all parts.
        shown: the name under which progress is shown, None for silence.
        resume: keeps the hidden states of an interrupted pass.

    Raises:
        ObrError: tokens that the model does not have, or no room for the hidden states.
    """
    pieces = [(part, number) for part in parts for number in range(len(part.shapes))]
    if not pieces:
        return [part.finish(iter(())) for part in parts]
    hidden = _stored(blocks, parts, room)
    done = resume.load(hidden) if resume else 0
    if not done:
        _enter(parts, hidden)
    with Progress(shown or "", len(blocks), shown is not None) as progress:
        for _ in range(done):
            progress.resume()
        read = in_turn(blocks, done)
        for index in range(done, len(blocks)):
            _replace(hidden, next(read), index, pieces)
            progress.block()
            if resume and index + 1 < len(blocks):
                resume.save(hidden, index + 1)
    return _finished(parts, hidden)


def _stored(blocks: Blocks, parts: Sequence[Part], room: MemoryBudget | None) -> StoredStates:
    """Room for the hidden states of all parts."""
    first = next(states for part in parts for states in part.entering())
    shapes = [(*shape, first.shape[-1]) for part in parts for shape in part.shapes]
    return StoredStates(shapes, first.dtype, blocks.device, room)


def _enter(parts: Sequence[Part], hidden: StoredStates) -> None:
    place = 0
    for part in parts:
        for states in part.entering():
            hidden[place] = states
            place += 1


def _replace(hidden: StoredStates, block: nn.Module, index: int, pieces: Sequence[tuple[Part, int]]) -> None:
    """Replace the hidden states of all pieces (part, its piece) by the outputs of block `index`."""
    for place, (part, piece) in enumerate(pieces):
        states = hidden[place]
        hidden[place] = run_block(block, states, part.arguments(index, piece, states))


def _finished(parts: Sequence[Part], hidden: StoredStates) -> list[Any]:
    found, start = [], 0
    for part in parts:
        places = range(start, start + len(part.shapes))
        found.append(part.finish(hidden[place] for place in places))
        start = places.stop
    return found
