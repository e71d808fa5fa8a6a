"""Blocks that a thread reads ahead: the same blocks, two in memory at most, errors where they are due."""

import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch

from obr.errors import ObrError
from obr.evaluation import block_pass
from obr.evaluation.likelihood import streamed_log_likelihoods
from obr.models import prefetch
from obr.models.blocks import StreamedBlocks
from obr.models.prefetch import in_turn


@pytest.fixture
def blocks(tiny_folder):
    return StreamedBlocks(tiny_folder / "model", device="cpu")


def test_blocks_read_ahead_are_those_read_in_turn(blocks):
    plain, ahead = (list(in_turn(blocks, 1, ahead=flag)) for flag in (False, True))
    assert len(plain) == len(ahead) == len(blocks) - 1
    for one, other in zip(plain, ahead, strict=True):
        theirs = other.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_nothing_is_read_behind_the_last_block(blocks):
    assert list(in_turn(blocks, len(blocks), ahead=True)) == list(in_turn(blocks, len(blocks), ahead=False)) == []


def test_the_next_block_is_read_while_one_is_used_and_two_are_in_memory_at_most(blocks, monkeypatch):
    real, made, started = blocks.load, [], [threading.Event() for _ in range(len(blocks))]

    def watched(index: int):
        started[index].set()
        gc.collect()
        assert sum(block() is not None for block in made) <= 1
        block = real(index)
        made.append(weakref.ref(block))
        return block

    monkeypatch.setattr(blocks, "load", watched)
    read = in_turn(blocks, ahead=True)
    for index in range(len(blocks)):
        block = next(read)
        if index + 1 < len(blocks):
            assert started[index + 1].wait(60)  # although this one is still in use
        del block
    assert len(made) == len(blocks)


def test_an_error_of_the_reading_thread_is_raised_where_its_block_is_due(blocks, monkeypatch):
    real = blocks.load

    def broken(index: int):
        if index == 1:
            raise ObrError("block 1 is broken; fetch it again.")
        return real(index)

    monkeypatch.setattr(blocks, "load", broken)
    read = in_turn(blocks, ahead=True)
    assert next(read) is not None
    with pytest.raises(ObrError, match="block 1 is broken"):
        next(read)


@pytest.mark.parametrize(
    "end", [GeneratorExit(), KeyboardInterrupt(), ObrError("broken.")], ids=lambda end: type(end).__name__
)
def test_reading_thread_ends_with_the_pass_however_that_ends(blocks, end):
    read = in_turn(blocks, ahead=True)
    next(read)
    assert any(thread.name.startswith("block") for thread in threading.enumerate())
    with pytest.raises(type(end)):
        read.throw(end)
    assert not any(thread.name.startswith("block") for thread in threading.enumerate())


class Streams:
    """Stands in for torch.cuda: streams by name, and what they are told to do, in order."""

    def __init__(self):
        self.told, self.current = [], {0: "main 0", 1: "main 1"}

    def Stream(self, device):
        return Stream(self, f"side {device.index}")

    def stream(self, stream):
        return nullcontext()

    def current_stream(self, device=None):
        return Stream(self, self.current[0 if device is None else device.index])

    def Event(self):
        return Event(self)


class Stream:
    def __init__(self, streams: Streams, name: str):
        self.streams, self.name = streams, name

    def wait_stream(self, other: "Stream") -> None:
        self.streams.told.append((self.name, "waits for", other.name))

    def wait_event(self, event: "Event") -> None:
        self.streams.told.append((self.name, "waits for", event.recorded))


class Event:
    def __init__(self, streams: Streams):
        self.recorded = None

    def record(self, stream: Stream) -> None:
        self.recorded = stream.name


class OnSecondGpu:
    """Blocks that say that they lie on the second of two GPUs."""

    device = torch.device("cuda", 1)

    def __init__(self, streams: Streams):
        self.streams = streams

    def __len__(self) -> int:
        return 2

    def load(self, index: int) -> torch.nn.Module:
        self.streams.told.append(f"block {index} is read")
        return torch.nn.Linear(2, 2)


def test_streams_of_a_gpu_other_than_the_current_one_wait_for_each_other(monkeypatch):
    """The reading one for what is on its way to the device, such as rotations; the computing one for the block."""
    streams = Streams()
    monkeypatch.setattr(torch, "cuda", streams)
    for index, _ in enumerate(in_turn(OnSecondGpu(streams))):
        streams.told.append(f"block {index} is used")
    order = [told for told in streams.told if told != "block 1 is read"]  # while block 0 is used, or before
    handed = ("main 1", "waits for", "side 1")
    assert order == [
        ("side 1", "waits for", "main 1"), "block 0 is read", handed, "block 0 is used", handed, "block 1 is used"
    ]  # fmt: skip


def test_scores_do_not_depend_on_reading_ahead(blocks, monkeypatch):
    """Position embeddings are computed, with recorders in place of the blocks, while the next block is read."""
    requests = [("", [1, 2, 3, 4], [5, 6]), ("", [1, 2, 3, 4], [7]), ("", [9, 8], [3, 2, 1])] * 5
    found = []
    for ahead in (False, True):
        monkeypatch.setattr(
            block_pass, "in_turn", lambda blocks, start, flag=ahead: prefetch.in_turn(blocks, start, flag)
        )
        found.append(streamed_log_likelihoods(blocks, requests, 64, 8))
    assert found[0] == found[1]
