"""OSTQuant (Hu et al., arXiv 2501.13987): rotations and scales that keep the quantised model's likeliest tokens."""

import torch
from geoopt import CanonicalStiefel, ManifoldParameter
from geoopt.optim import RiemannianAdam
from torch import Tensor

from obr.config.rotations import LEARNERS
from obr.errors import ObrError
from obr.models.architectures import Dimensions
from obr.rotations.learning import klt, straight_through
from obr.rotations.learning.distillation import imitation
from obr.rotations.learning.end_to_end import TrainingLoop, orthogonalised, warmup_schedule
from obr.rotations.learning.network import Network
from obr.rotations.learning.run import LearningRun
from obr.rotations.ostquant import OSTQuant, over_pairs, pairs_of


def learn(task: LearningRun) -> tuple[OSTQuant, list[dict]]:
    """R_res, R_ov from random Hadamard matrices, all scales from one, by RiemannianAdam on the KL-Top loss.

    Without geoopt's `stabilize`, which doubles the momentum of square matrices each time: what orthogonality steps
    lose, 1e-7 each, the end makes good.

    Own settings: steps, batch, micro_batch, warmup, every, keep_every as SpinQuant's; start (hadamard, or
    klt: see `obr.rotations.learning.klt`); lr (of rotations) and lr_scales, cosine to 0 (the paper's schedule; its
    scripts name none); scales (false: rotations alone are learned); top (k of KL-Top); renormalised (probabilities
    over the top k only); online_query_key (a Hadamard transform of queries and keys). Key scales are one within each
    RoPE pair, so that the 16-bit model stays what it was.

    Raises:
        ObrError: an unknown `start`, or clips that are to be learned.
    """
    settings = task.settings(
        micro_batch=None, lr=0.0169, lr_scales=0.00179, top=1000, renormalised=False,
        online_query_key=False, scales=True, start="hadamard", warmup=0, every=10, keep_every=10,
        **LEARNERS["ostquant"].defaults,
    )  # fmt: skip
    if settings.start not in ("hadamard", "klt"):
        raise ObrError(f"learn.start is {settings.start!r}; choose hadamard or klt.")
    rotation = OSTQuant.draw(task.dimensions, task.seed)
    if not settings.online_query_key:
        rotation.transforms.pop("query_key", None)
    rotation.to(task.device)
    network = Network(task, straight_through.ste_range, settings.micro_batch)
    if settings.start == "klt":
        klt.turn(rotation, network.source)
    leaves = {
        name: leaf.requires_grad_(settings.scales or ".S_" not in name) for name, leaf in _leaves(rotation).items()
    }
    descent = TrainingLoop(
        task,
        network,
        rotation,
        imitation(network, settings.top, settings.renormalised),
        leaves,
        _optimizer(leaves, settings.lr, settings.lr_scales),
        steps=settings.steps,
        batch=settings.batch,
        every=settings.every,
        keep_every=settings.keep_every,
        factor=warmup_schedule(settings.warmup / settings.steps),
        place=lambda values: _placed(values, task.dimensions),
    )
    curve = descent.run()
    rotation.seed = None
    return orthogonalised(rotation), curve


def _leaves(rotation: OSTQuant) -> dict[str, Tensor]:
    """What is learned, by name: rotations as drawn, scales of one; of S_qk (k, m) only what RoPE pairs share."""
    leaves, manifold = {}, CanonicalStiefel()
    for name, tensor in rotation.parameters.items():
        if name.endswith("S_qk"):
            heads = 1 if rotation.dimensions.normed_heads else len(tensor)
            tensor = tensor[:heads, : pairs_of(rotation.dimensions)]
        scale = ".S_" in name
        tensor = torch.ones_like(tensor, dtype=torch.float32) if scale else tensor.float()
        leaves[name] = tensor if scale else ManifoldParameter(tensor, manifold=manifold)
    return leaves


def _placed(leaves: dict[str, Tensor], dimensions: Dimensions) -> dict[str, Tensor]:
    """The rotation's parameters of what is learned: key scales (k, m) repeated over heads and RoPE pairs."""
    return {name: over_pairs(leaf, dimensions) if name.endswith("S_qk") else leaf for name, leaf in leaves.items()}


def _optimizer(leaves: dict[str, Tensor], lr: float, lr_scales: float) -> RiemannianAdam:
    turned = [leaf for name, leaf in leaves.items() if ".S_" not in name]
    scales = [leaf for name, leaf in leaves.items() if ".S_" in name]
    return RiemannianAdam([{"params": turned}, {"params": scales, "lr": lr_scales}], lr)
