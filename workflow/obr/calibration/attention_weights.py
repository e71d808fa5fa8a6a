"""Attention weights: tokens count in the Hessian of queries, keys and values by the attention that they receive.

An error in the key and value of a token reaches the outputs of all tokens that attend to it. Token j of T counts by
p_j = Σ_{h,i} A_h[i, j] / (heads (T - j)), A_h the attention probabilities (T, T) of head h: the mean attention that
it receives from the tokens that may see it (WaterSIC, arXiv 2603.04956).
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from obr.calibration.moments import Captured
from obr.models.architectures import Layout
from obr.models.blocks import run_block
from obr.models.hidden_states import HiddenStates

ATTENDED = ("qkv", "latent")  # groups of layers of which keys and values are made


@torch.no_grad()
def attention_weights(
    block: nn.Module, layout: Layout, hidden: HiddenStates, arguments: dict, share: float
) -> Tensor:
    """(b, s) float32, each window's mean 1: `1 - share + share p / mean(p)`, p the attention that a token receives.

    Attention is that of `block` as it is, its keys and queries quantised if they are.

    Args:
        hidden: b inputs (1, s, d). share: 0 for tokens that count alike, 1 for attention alone.
    """
    group = next(name for name in ATTENDED if name in layout.groups)
    module = block.get_submodule(layout.groups[group][0].partition(".")[0])
    received = []

    def observe(query: Tensor, key: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> None:
        received.append(attention_received(query, key, mask, **settings))
        raise Captured

    module.attention_observer = observe
    try:
        for states in hidden:
            with suppress(Captured):
                run_block(block, states, arguments)
    finally:
        del module.attention_observer
    found = torch.stack(received)
    return found.div_(found.mean(1, keepdim=True)).mul_(share).add_(1 - share)


def attention_received(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Tensor:
    """(s,) float32: the mean attention that each token receives, of query (1, h, s, m) and key (1, k, s, m).

    One head at a time is in memory. mask: of transformers, True or 0 where a token is seen; None if causal.
    """
    heads, length, groups = query.shape[1], query.shape[2], query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    total = torch.zeros(length, device=query.device)
    for head in range(heads):
        scores = (query[0, head] @ key[0, head // groups].mT).float().mul_(scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = causal if mask is None else mask[0, min(head, mask.shape[1] - 1), :length, :length]
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen.float()
        total += scores.softmax(-1).sum(0)
    return total / heads / torch.arange(length, 0, -1, device=query.device)
