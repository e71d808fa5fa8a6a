"""What a quantised model is to do after every token: what the 16-bit model does, by the KL-Top loss of OSTQuant."""

import copy

import torch
from torch import Tensor

from obr.models.blocks import run_in_place
from obr.models.hidden_states import HiddenStates, MemoryBudget
from obr.rotations.learning.end_to_end import Network, Objective


def imitation(network: Network, top: int, renormalised: bool = False) -> Objective:
    """The objective of a network: KL-Top to its own 16-bit model, see `kl_top`."""
    task = network.task
    count, length = len(task.windows) + len(task.held_out), task.windows.shape[1]
    return Objective(
        lambda logits, states: kl_top(logits, network.logits(states), top, renormalised),
        Teacher(network, count, length, MemoryBudget(folder=task.kept.folder)),
    )


class Teacher:
    """Last hidden states of a network's 16-bit model, for each window computed when it is first asked for.

    count: of all windows, of s tokens each. room: for the states, which are kept.
    """

    def __init__(self, network: Network, count: int, length: int, room: MemoryBudget | None = None):
        self.network, source = network, network.source
        width = source.dimensions.hidden
        self.states = HiddenStates(count, (length, width), torch.float32, source.device, room)
        self.known: set[int] = set()
        # Blocks of its own, on the same weights: the network's get transforms and quantisers.
        self.blocks = [copy.deepcopy(block, {id(p): p for p in block.parameters()}) for block in network.blocks]

    def __call__(self, windows: Tensor, places: Tensor) -> Tensor:
        """(b, s, d) for windows (b, s) that have these places (b,) among all."""
        new = [i for i, place in enumerate(places.tolist()) if place not in self.known]
        if new:
            self._learn(windows[new], places[new].tolist())
        return torch.cat([self.states[place] for place in places.tolist()])

    @torch.no_grad()
    def _learn(self, windows: Tensor, places: list[int]) -> None:
        hidden, arguments = self.network.source.embed(windows)
        with self.network.products():
            for block, own in zip(self.blocks, arguments, strict=True):
                run_in_place(block, hidden, own)
        for place, states in zip(places, hidden, strict=True):
            self.states[place] = states
        self.known |= set(places)


def kl_top(logits: Tensor, teacher: Tensor, top: int, renormalised: bool = False) -> Tensor:
    """KL-Top of logits (t, v) to a teacher's (t, v): Σ_i p_i (log p_i - log q_i) over its k likeliest, summed over t.

    renormalised: p and q are of these k alone; otherwise of the whole vocabulary, and the sum is no divergence
    unless k is v.
    """
    best = teacher.detach().topk(min(top, teacher.shape[-1]), dim=-1)
    if renormalised:
        p, q = best.values.log_softmax(-1), logits.gather(-1, best.indices).log_softmax(-1)
    else:
        p, q = (_log_probabilities(x, best.indices) for x in (teacher.detach(), logits))
    return (p.exp() * (p - q)).sum()


def _log_probabilities(logits: Tensor, indices: Tensor) -> Tensor:
    return logits.gather(-1, indices) - logits.logsumexp(-1, keepdim=True)
