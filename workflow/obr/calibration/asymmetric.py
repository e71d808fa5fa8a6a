"""Targets of layers that read what compressed blocks put out: what the dense model computed, not what they would.

A layer W read X (t, n) in the dense model and reads X̂ once the blocks before it are compressed. Least squares of
W X̂ᵀ to the dense outputs W Xᵀ has its minimum at `W* = W C Ĥ⁻¹`, C = XᵀX̂ and Ĥ = X̂ᵀX̂ (damped), and leaves
`tr((W* - Ŵ) Ĥ (W* - Ŵ)ᵀ)` to whatever is made of the layer: the loss of every method, W* in the place of W. A
share of the step to W* is taken, since calibration data tells it with noise.

o_proj and down_proj add their outputs to the residual stream, which is R (t, r) in the dense model and R̂ here. A
second step, `Δ Ĥ⁻¹` with Δ = (R - R̂)ᵀX̂, makes up for what the stream has lost before it.

The asymmetric calibration of GPTAQ (arXiv 2504.02692), for methods other than GPTQ, too; the second step is that of
WaterSIC (arXiv 2603.04956).

Experts get the tokens that the router of the compressed model sends them, see `expert_inputs`.
"""

import torch
from torch import Tensor, nn

from obr.calibration.collect_hessians import inputs_of_each
from obr.calibration.moments import Accumulator, GroupStatistics
from obr.config.recipe import Recipe
from obr.methods.layer_hessian import Hessian
from obr.methods.row_products import product
from obr.models.architectures import Layout
from obr.models.hidden_states import HiddenStates

ADDS_TO_STREAM = ("o", "down")  # groups whose outputs are added to the residual stream


def collect(
    block: nn.Module,
    dense: nn.Module,
    layout: Layout,
    hidden: HiddenStates,
    dense_hidden: HiddenStates,
    arguments: dict,
    groups: list[str],
    weights: dict[str, Tensor] | None = None,
) -> dict[str, GroupStatistics]:
    """Moments, drift and, of layers that add to it, the lack of the residual stream of some groups of `block`, beside
    `dense`, the block before compression.

    Eight parameters: two blocks and the hidden states of both.

    hidden, dense_hidden: b inputs (1, s, d) of either. groups: keys of `layout.groups`, in its order.
    weights: {group: (b, s)} how much each token counts; None for alike.
    """
    totals, drifts, lacking = {}, {}, {}
    for group in groups:
        weight = block.get_submodule(layout.groups[group][0]).weight  # the others of a group read the same input
        own = weights[group] if weights else None
        totals[group] = Accumulator(weight.shape[1], len(hidden), weight.device, own)
        drifts[group] = torch.zeros_like(totals[group].upper)
        if group in ADDS_TO_STREAM and layout.adds_plainly:
            lacking[group] = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for states, dense_states in zip(hidden, dense_hidden, strict=True):
        seen, streams = _pass(block, layout, groups, states, arguments)
        wanted, dense_streams = _pass(dense, layout, groups, dense_states, arguments)
        for group in groups:
            x, factor = seen[group], totals[group].factor
            totals[group](x)
            if weights:
                x = x * weights[group][totals[group].seen - 1][:, None]
            drifts[group].addmm_((wanted[group] - seen[group]).T, x, alpha=factor)
            if group in lacking:
                lacking[group].addmm_((dense_streams[group] - streams[group]).T, x, alpha=factor)
    return {group: GroupStatistics(totals[group].moments(), drifts[group], lacking.get(group)) for group in groups}


def _pass(
    block: nn.Module, layout: Layout, groups: list[str], states: Tensor, arguments: dict
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(inputs (t, n) of each group, residual stream (t, d) to which each group adds that does) of one window."""
    streams, entering = {"o": states}, []
    norm = layout.norms.get("up_gate")  # reads the stream behind the attention
    module = block if norm is None else block.get_submodule(norm)
    hook = module.register_forward_pre_hook(lambda _module, inputs: entering.append(inputs[0]))
    try:
        found = inputs_of_each(block, [layout.groups[group][0] for group in groups], states, arguments)
    finally:
        hook.remove()
    if entering:
        streams["down"] = entering[0]
    streams = {group: stream.reshape(-1, stream.shape[-1]).float() for group, stream in streams.items()}
    return dict(zip(groups, found, strict=True)), streams


def shifted(weight: Tensor, drift: Tensor, hessian: Hessian, share: float) -> Tensor:
    """(r, n): `weight (r, n)` and a share (0 to 1) of the step to where its outputs are the dense model's.

    Raises:
        ObrError: the Hessian cannot be factored.
    """
    weight = weight.float()
    return weight + share * product(product(weight, drift), hessian.inverse)


def target_weight(
    weight: Tensor, statistics: GroupStatistics, hessian: Hessian, recipe: Recipe
) -> tuple[Tensor, dict[str, float]]:
    """(target (r, n) of a layer with `weight (r, n)`, the shares of the recipe's steps that it took).

    With the recipe's target_shrinkage "held_out" each step is multiplied by a factor, 0 to 1, with the least error of
    the layer's outputs on held-out windows, beside the dense model's. An expert that gets none
    of their tokens takes no step.

    Raises:
        ObrError: the Hessian cannot be factored.
    """
    weight, shares, steps = weight.float(), {}, []
    if recipe.asymmetry:
        shares["asymmetry"] = recipe.asymmetry
        steps.append(product(product(weight, statistics.drift), hessian.inverse))
    if recipe.residual and statistics.lacking is not None:
        shares["residual"] = recipe.residual
        steps.append(product(statistics.lacking, hessian.inverse))
    if not steps:
        return weight, {}
    steps = [step.mul_(share) for step, share in zip(steps, shares.values(), strict=True)]
    if recipe.target_shrinkage == "held_out":
        unseen = statistics.held_out
        factors = best_factors(weight, steps, unseen, "residual" in shares) if unseen else [0.0] * len(steps)
        shares = {name: share * factor for (name, share), factor in zip(shares.items(), factors, strict=True)}
        steps = [step.mul_(factor) for step, factor in zip(steps, factors, strict=True)]
    return sum(steps, weight), shares


def best_factors(weight: Tensor, steps: list[Tensor], unseen: GroupStatistics, pays_back: bool) -> list[float]:
    """Of one or two steps (r, n), the factors from 0 to 1 with the least error on the windows of `unseen`.

    The error of `W + Σ f_i S_i`, ‖(W + Σ f_i S_i) X̂ - W X - (R - R̂)‖², the last term where the layer pays back what
    the stream lacks, is a quadratic of the factors: its minimum in the box is in the inside or on an edge.
    """
    wanted = product(weight, unseen.drift).double()
    if pays_back:
        wanted += unseen.lacking.double()
    images = [product(step, unseen.moments.hessian).double() for step in steps]
    curvature = torch.stack([torch.stack([(image * step).sum() for step in steps]) for image in images])
    slope = torch.stack([(wanted * step).sum() for step in steps])
    candidates = [_on_edge(curvature, slope, i, end) for i in range(len(steps)) for end in (0.0, 1.0)]
    inside, failed = torch.linalg.solve_ex(curvature, slope)
    if not failed and bool(((inside >= 0) & (inside <= 1)).all()):
        candidates.append(inside)
    errors = [float(f @ curvature @ f - 2 * f @ slope) for f in candidates]
    return candidates[errors.index(min(errors))].tolist()


def _on_edge(curvature: Tensor, slope: Tensor, fixed: int, end: float) -> Tensor:
    """(k,) the best factors of one or two, 0 to 1, if one is fixed at an end."""
    factors = torch.full_like(slope, end)
    if len(slope) == 2:
        free = 1 - fixed
        rest = slope[free] - curvature[free, fixed] * end
        factors[free] = (rest / curvature[free, free]).clamp(0, 1) if curvature[free, free] > 0 else 0.0
    return factors
