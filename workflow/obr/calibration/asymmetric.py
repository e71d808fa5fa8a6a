"""Targets of layers that read what compressed blocks put out: what the dense model computed, not what they would.

A layer W read X (t, n) in the dense model and reads X̂ once the blocks before it are compressed. Least squares of
W X̂ᵀ to the dense outputs W Xᵀ has its minimum at `W* = W C Ĥ⁻¹`, C = XᵀX̂ and Ĥ = X̂ᵀX̂ (damped), and leaves
`tr((W* - Ŵ) Ĥ (W* - Ŵ)ᵀ)` to whatever is made of the layer: the loss of every method, W* in the place of W. A
share of the step to W* is taken, since calibration data tells it with noise.

The asymmetric calibration of GPTAQ (arXiv 2504.02692), for methods other than GPTQ, too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obr.calibration.collect_hessians import Accumulator, Moments, inputs_of_each
from obr.methods.layer_hessian import Hessian
from obr.methods.row_products import product
from obr.models.architectures import Layout
from obr.models.hidden_states import HiddenStates


@dataclass
class GroupStatistics:
    """Of a group's inputs: their moments, how the dense model's differ, `2/S Σ (X - X̂)ᵀ X̂` (n, n), and the Hessian
    (n, n) of held-out windows."""

    moments: Moments
    drift: Tensor | None = None
    held_out: Tensor | None = None


def collect(
    block: nn.Module,
    dense: nn.Module,
    layout: Layout,
    hidden: HiddenStates,
    dense_hidden: HiddenStates,
    arguments: dict,
    groups: list[str],
) -> dict[str, GroupStatistics]:
    """Moments and drift of some groups of `block`, beside `dense`, the block before compression.

    Seven parameters: two blocks and the hidden states of both.

    hidden, dense_hidden: b inputs (1, s, d) of either. groups: keys of `layout.groups`, in its order.
    """
    names = [layout.groups[group][0] for group in groups]  # the others of a group read the same input
    weights = [block.get_submodule(name).weight for name in names]
    totals = [Accumulator(weight.shape[1], len(hidden), weight.device) for weight in weights]
    drifts = [torch.zeros_like(total.upper) for total in totals]
    for states, dense_states in zip(hidden, dense_hidden, strict=True):
        seen = inputs_of_each(block, names, states, arguments)
        wanted = inputs_of_each(dense, names, dense_states, arguments)
        for total, drift, x, aim in zip(totals, drifts, seen, wanted, strict=True):
            total(x)
            drift.addmm_((aim - x).T, x, alpha=total.factor)
    found = zip(groups, totals, drifts, strict=True)
    return {group: GroupStatistics(total.moments(), drift) for group, total, drift in found}


def shifted(weight: Tensor, drift: Tensor, hessian: Hessian, share: float) -> Tensor:
    """(r, n): `weight (r, n)` and a share (0 to 1) of the step to where its outputs are the dense model's.

    Raises:
        ObrError: the Hessian cannot be factored.
    """
    weight = weight.float()
    return weight + share * product(product(weight, drift), hessian.inverse)
