"""What a quantised model is to do after every token: what the 16-bit model does, by the KL-Top loss of OSTQuant."""

import torch
from torch import Tensor

from obr.models.blocks import run_in_place
from obr.models.hidden_states import HiddenStates
from obr.rotations.learning.network import Network, Objective, left_of


def imitation(network: Network, top: int, renormalised: bool = False) -> Objective:
    """The objective of a network: KL-Top to its own 16-bit model, see `kl_top`."""
    teacher = Teacher(network)
    return Objective(
        lambda logits, states: kl_top(logits, network.logits(states), top, renormalised), teacher, teacher.prepare
    )


class Teacher:
    """Last hidden states of a network's 16-bit model for windows, computed in one pass over its blocks and kept."""

    def __init__(self, network: Network):
        self.network = network
        self.states: HiddenStates | None = None
        self.rows: dict[int, int] = {}  # of the states, by the windows' places

    def __call__(self, windows: Tensor, places: Tensor) -> Tensor:
        """(b, s, d) for windows (b, s) that have these places (b,) among those prepared."""
        return torch.cat([self.states[self.rows[place]] for place in places.tolist()])

    @torch.no_grad()
    def prepare(self, windows: Tensor, places: Tensor) -> None:
        """Compute the states of windows (w, s) with these places (w,), one block in memory at a time."""
        network = self.network
        network.release()  # whose block has transforms and quantisers
        self.states, arguments = network.source.embed(windows, network.room)
        network.room = left_of(network.room, self.states)
        self.rows = {place: row for row, place in enumerate(places.tolist())}
        with network.products():
            for index, own in enumerate(arguments):
                run_in_place(network.source.load(index), self.states, own)


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
