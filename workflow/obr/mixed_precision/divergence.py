"""Divergence: how far a model's next tokens are from the dense model's once a single linear layer is changed.

KL(p ‖ q), mean over positions, in nats a token: p of the dense model, q of the one with one other weight. In the mean
over texts that the model would write itself, that is the rise of its loss.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obr.models.blocks import Blocks, run_copy, run_in_place
from obr.models.hidden_states import HiddenStates, MemoryBudget
from obr.runtime.progress import Progress

TOKENS = 512  # so many tell layers apart
LARGEST = 80.0  # exponent that is finite in float32
SMALL = 0.01  # nats, below which a logarithm of about 1 has lost too many digits


def measurement_windows(tokens: Tensor) -> Tensor:
    """Of calibration windows (b, s) as many as are measured on: few long ones, since what a layer costs where little
    has been read yet is another matter than what it costs after that."""
    length = min(tokens.shape[1], TOKENS)
    return tokens[: TOKENS // length, :length]


@torch.no_grad()
def divergences(
    blocks: Blocks,
    tokens: Tensor,
    changed: Callable[[int], dict[str, Tensor]],
    room: MemoryBudget | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """{"0.self_attn.q_proj": nats a token …} for every layer that `changed(index)` has another weight (r, n) for.

    One pass over the blocks, each loaded once: states of the dense model and of one model a changed layer, which
    differs from it from there on, go through the blocks side by side. They take (1 + layers) × b × s × d × 4 bytes,
    1.9 GB for a 7B model and 512 tokens; beyond `room` they lie in files.

    tokens: (b, s).
    """
    room = room or MemoryBudget()
    share = replace(room, megabytes=room.megabytes / (1 + len(blocks) * len(blocks.layout.linears)))
    dense, arguments = blocks.embed(tokens, share)
    others: dict[str, HiddenStates] = {}
    with Progress("divergences", len(blocks), progress) as shown:
        for index in range(len(blocks)):
            block = blocks.load(index)
            for states in others.values():
                run_in_place(block, states, arguments[index])
            for name, weight in changed(index).items():
                with _replaced(block.get_submodule(name), weight):
                    others[f"{index}.{name}"] = run_copy(block, dense, arguments[index], share)
            run_in_place(block, dense, arguments[index])
            block = None  # before the next is loaded
            shown.block()
    return _compared(blocks, dense, others)


@contextmanager
def _replaced(linear: nn.Module, weight: Tensor):
    own = linear.weight.data
    linear.weight.data = weight.to(own)
    try:
        yield
    finally:
        linear.weight.data = own


def _compared(blocks: Blocks, dense: HiddenStates, others: dict[str, HiddenStates]) -> dict[str, float]:
    sums = torch.zeros(len(others), dtype=torch.float64, device=blocks.device)  # numbers in the end: a GPU waits
    for window in range(len(dense)):
        wanted = _logits(blocks, dense[window])
        likely = F.log_softmax(wanted, -1)
        for number, states in enumerate(others.values()):
            sums[number] += _divergence(likely, _logits(blocks, states[window]).sub_(wanted)).mean()
    return {name: total / len(dense) for name, total in zip(others, sums.tolist(), strict=True)}


def _divergence(likely: Tensor, change: Tensor) -> Tensor:
    """(s,) KL(p ‖ q) of p, whose logarithms are `likely (s, v)`, and of q, whose logits differ by `change (s, v)`,
    overwritten.

    log Σ p exp(δ) - Σ p δ, δ the change less its mean; where that is next to nothing, by log(1 + Σ p (exp(δ) - 1)),
    good to a few digits, while Σ p log p - Σ p log q is but the rounding of sums a million times as large.
    """
    weights = likely.exp()
    change -= torch.linalg.vecdot(weights, change)[:, None]
    mean, large = torch.linalg.vecdot(weights, change), torch.logsumexp(likely + change, -1)
    small = torch.linalg.vecdot(weights, change.clamp_(max=LARGEST).expm1_()).log1p_()
    return torch.where(large > SMALL, large, small) - mean


def _logits(blocks: Blocks, states: Tensor) -> Tensor:
    """(s, v) for states (1, s, d) out of the last block."""
    return blocks.logits(states)[0].float()
