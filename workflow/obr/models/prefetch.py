"""The blocks of a model one after another, the next one read while the current one computes on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from obr.models.blocks import Blocks


def in_turn(blocks: Blocks, start: int = 0, ahead: bool | None = None) -> Iterator[nn.Module]:
    """Blocks `start`, `start + 1`, ... of a model.

    Args:
        blocks: of the model.
        start: the first block.
        ahead: whether a thread reads the next block while the caller uses the current one. Two blocks are then in
            memory. None is True on a GPU, where reading, unpacking and copying overlap with the computation.

    A reading error is raised where its block is due.
    """
    ahead = blocks.device.type == "cuda" if ahead is None else ahead
    if not ahead:
        for index in range(start, len(blocks)):
            yield blocks.load(index)
        return
    stream = None
    if blocks.device.type == "cuda":
        stream = torch.cuda.Stream(blocks.device)
        stream.wait_stream(torch.cuda.current_stream(blocks.device))  # what blocks are made with: rotations, say
    with ThreadPoolExecutor(1, "block") as reader:
        following = reader.submit(_read, blocks, start, stream) if start < len(blocks) else None
        for index in range(start, len(blocks)):
            block, is_copied = following.result()
            following = None  # holds the block otherwise
            if index + 1 < len(blocks):
                following = reader.submit(_read, blocks, index + 1, stream)
            if is_copied is not None:
                _hand_over(block, is_copied, torch.cuda.current_stream(blocks.device))
            yield block
            del block


@torch.no_grad()
def _read(blocks: Blocks, index: int, stream: torch.cuda.Stream | None) -> tuple[nn.Module, torch.cuda.Event | None]:
    """(block, event at the end of its copies), read on a stream of its own; no event without a stream."""
    if stream is None:
        return blocks.load(index), None
    with torch.cuda.stream(stream):
        block = blocks.load(index)
        event = torch.cuda.Event()
        event.record(stream)
    return block, event


def _hand_over(block: nn.Module, is_copied: torch.cuda.Event, current: torch.cuda.Stream) -> None:
    """Let the stream of the computation use a block: after its copies, before its memory is used for another one."""
    current.wait_event(is_copied)
    for tensor in (*block.parameters(), *block.buffers()):
        if tensor.is_cuda:
            tensor.record_stream(current)
