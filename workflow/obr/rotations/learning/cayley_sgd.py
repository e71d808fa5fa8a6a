"""SpinQuant's optimiser on the Stiefel manifold: descent that leaves matrices orthogonal. (Adam's is geoopt's.)"""

from collections.abc import Callable

import torch
from torch import Tensor

SWEEPS = 5  # of the fixed-point iteration for a Cayley transform
REORTHOGONALISED = 1 / 101  # of a matrix' steps that begin with a QR decomposition


class CayleySGD(torch.optim.Optimizer):
    """Steps along Cayley transforms (Li, Fuxin & Todorovic, ICLR 2020), as SpinQuant learns rotations.

    For R (..., n, n), rows orthonormal, with gradient G: X = Rᵀ, V ← momentum V - Gᵀ, W = Ŵ - Ŵᵀ with
    Ŵ = V Xᵀ - ½ X (Xᵀ V Xᵀ), α = min(lr, 1 / ‖W‖₁); X becomes nearly (I - α/2 W)⁻¹ (I + α/2 W) X, and V
    becomes W X.

    generator: decides which steps begin with a QR decomposition, which takes away the error that has gathered.
    """

    def __init__(self, parameters, lr: float, generator: torch.Generator, momentum: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.generator = generator

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """One step for every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._descend(matrix, group["lr"], group["momentum"])

    def _descend(self, matrix: Tensor, lr: float, momentum: float) -> None:
        x = orthogonalised(matrix).mT if self._draw() < REORTHOGONALISED else matrix.mT
        velocity = -matrix.grad.mT
        if momentum:
            velocity = velocity + momentum * self.state[matrix].get("velocity", torch.zeros_like(velocity))
        half = velocity @ x.mT - 0.5 * x @ (x.mT @ velocity @ x.mT)
        skew = half - half.mT
        alpha = (1 / (skew.abs().sum(-2).amax(-1) + 1e-8)).clamp_max(lr)[..., None, None]
        moved = x + alpha * velocity
        for _ in range(SWEEPS):
            moved = x + alpha / 2 * (skew @ (x + moved))
        if momentum:
            self.state[matrix]["velocity"] = skew @ x
        matrix.copy_(moved.mT)

    def _draw(self) -> float:
        return float(torch.rand(1, generator=self.generator))


def orthogonalised(matrix: Tensor) -> Tensor:
    """Q of the QR decomposition (..., n, n) whose R has a positive diagonal: the matrix itself if orthogonal."""
    q, r = torch.linalg.qr(matrix)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def nearest(matrix: Tensor) -> Tensor:
    """The orthogonal matrix (..., n, n) nearest to one."""
    u, _, vt = torch.linalg.svd(matrix)
    return u @ vt
