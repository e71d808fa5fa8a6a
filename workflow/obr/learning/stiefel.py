"""Optimisers on the Stiefel manifold: descent that leaves matrices orthogonal."""

import torch
from torch import Tensor

SWEEPS = 5  # of the fixed-point iteration for a Cayley transform
REORTHOGONALISED = 1 / 101  # of a matrix' steps that begin with a QR decomposition
STABILISED = 10  # steps between projections, for RiemannianAdam


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
    def step(self, closure=None) -> None:
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


class RiemannianAdam(torch.optim.Optimizer):
    """Adam on the Stiefel manifold with its canonical metric (Bécigneul & Ganea, ICLR 2019).

    For R (..., n, n) with gradient G: g = G - R Gᵀ R, M averages g and v, one number a matrix, ⟨g, g⟩ = ‖g‖² -
    ½ ‖Rᵀ g‖²; u = -lr M / √v, both unbiased; R ← C R, M ← C M with the Cayley transform C of A = u Rᵀ - R uᵀ,
    which moves R by 2u to first order. Groups with `flat` are plain Adam.
    """

    def __init__(self, parameters, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "flat": False})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step for every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._descend(parameter, group)

    def _descend(self, parameter: Tensor, group: dict) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        gradient = parameter.grad if group["flat"] else _canonical(parameter, parameter.grad)
        if not state:
            state["mean"], state["step"] = torch.zeros_like(gradient), torch.zeros(())
            state["square"] = torch.zeros_like(_square(parameter, gradient, group["flat"]))
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(_square(parameter, gradient, group["flat"]), 1 - second)
        count = int(state["step"])
        size = (state["square"] / (1 - second**count)).sqrt() + group["eps"]
        moved = -group["lr"] / (1 - first**count) * state["mean"] / size
        if group["flat"]:
            parameter.add_(moved)
            return
        turn = cayley(moved @ parameter.mT - parameter @ moved.mT)
        parameter.copy_(turn @ parameter)
        state["mean"].copy_(turn @ state["mean"])
        if count % STABILISED == 0:
            parameter.copy_(nearest(parameter))
            state["mean"].copy_(_canonical(parameter, state["mean"]) / 2)


def _canonical(matrix: Tensor, gradient: Tensor) -> Tensor:
    """The gradient (..., n, n) in the canonical metric; twice the projection onto the tangent space."""
    return gradient - matrix @ gradient.mT @ matrix


def _square(matrix: Tensor, gradient: Tensor, flat: bool) -> Tensor:
    """What Adam divides by the root of: squares one by one, or one number (..., 1, 1) a matrix."""
    if flat:
        return gradient.square()
    total = gradient.square() - 0.5 * (matrix.mT @ gradient).square()
    return total.sum((-2, -1), keepdim=True)


def cayley(skew: Tensor) -> Tensor:
    """(I - A/2)⁻¹ (I + A/2), orthogonal, of skew-symmetric A (..., n, n)."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity - skew / 2, identity + skew / 2)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Q of the QR decomposition (..., n, n) whose R has a positive diagonal: the matrix itself if orthogonal."""
    q, r = torch.linalg.qr(matrix)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def nearest(matrix: Tensor) -> Tensor:
    """The orthogonal matrix (..., n, n) nearest to one."""
    u, _, vt = torch.linalg.svd(matrix)
    return u @ vt
