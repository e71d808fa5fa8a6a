"""Blocks that a thread reads ahead: the same blocks, two in memory at most, errors where they are due."""

import gc
import threading
import weakref

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
