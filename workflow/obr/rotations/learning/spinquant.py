"""SpinQuant (Liu et al., arXiv 2405.16406): R1 and R2 of each block, by Cayley SGD on the quantised model's loss."""

import torch
from torch.nn import functional as F

from obr.config.rotations import LEARNERS
from obr.rotations.learning import straight_through
from obr.rotations.learning.cayley_sgd import CayleySGD
from obr.rotations.learning.distillation import imitation
from obr.rotations.learning.end_to_end import TrainingLoop, orthogonalised, warmup_schedule
from obr.rotations.learning.network import Network, Objective
from obr.rotations.learning.run import LearningRun
from obr.rotations.spinquant import SpinQuant


def learn(task: LearningRun) -> tuple[SpinQuant, list[dict]]:
    """R1 and R2 from random Hadamard matrices, by Cayley SGD on the quantised model.

    Own settings: loss (cross_entropy of the next token, as published; kl_top, OSTQuant's imitation of the 16-bit
    model, whose gradients are less noisy: for few and short windows); top (k of kl_top); gradients (passed straight
    through quantisers, as published; flowing through their ranges too, which a rotation changes most); steps,
    batch (windows a step); micro_batch (windows that pass through a block at a time; by default as many as have 2,048
    tokens); lr (of Cayley steps, cosine to 0; the norm of the step bounds it); warmup (steps over which lr grows to
    what it is); momentum; every (steps between looks at held-out windows), keep_every (steps between states kept).
    The published runs took 100 steps of 8 windows of 2,048 tokens, asymmetric 4-bit activations, keys and values in
    groups of 128. Weights were at 16 bits for GPTQ with quantised activations, and rounded to nearest in every pass
    otherwise.

    Raises:
        ObrError: clips that are to be learned.
    """
    settings = task.settings(
        loss="cross_entropy", top=1000, gradients="passed", micro_batch=None, lr=1.5, momentum=0.0,
        warmup=0, every=10, keep_every=10, **LEARNERS["spinquant"].defaults,
    )  # fmt: skip
    rotation = SpinQuant.draw(task.dimensions, task.seed)
    generator = torch.Generator().manual_seed(task.seed)
    rotation.to(task.device)
    leaves = {name: p.float().requires_grad_() for name, p in rotation.parameters.items()}
    quantise = straight_through.ste_range if settings.gradients == "flowing" else straight_through.ste_identity
    network = Network(task, quantise, settings.micro_batch)
    next_token = Objective(_cross_entropy, lambda windows, places: windows[:, 1:])
    descent = TrainingLoop(
        task,
        network,
        rotation,
        next_token if settings.loss == "cross_entropy" else imitation(network, settings.top),
        leaves,
        CayleySGD(leaves.values(), settings.lr, generator, settings.momentum),
        steps=settings.steps,
        batch=settings.batch,
        every=settings.every,
        keep_every=settings.keep_every,
        generator=generator,
        factor=warmup_schedule(settings.warmup / settings.steps),
    )
    curve = descent.run()
    rotation.seed = None
    return orthogonalised(rotation), curve


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (t, v), summed."""
    return F.cross_entropy(logits, targets, reduction="sum")
