"""The second-order model of one layer: the Hessian of its inputs, with the factors that methods share."""

from functools import cached_property

import torch
from torch import Tensor

from obr.errors import ObrError

DAMP_RETRIES = 3


class Hessian:
    """A layer's Hessian with what every method derives from it, each computed once.

    One object serves all layers that read the same input (q, k and v, say).

    Args:
        matrix: (n, n), undamped.
        damp: added to the diagonal, in units of its mean. If the matrix cannot be factored, ten times the
            damping is tried, up to three times; `damp` then holds the value used and `flags` says so.
        harmonic: (n,), squared norms of the inputs' columns with sequence i weighted by 1/i, for the mask
            "wanda_harmonic"; None if they are not known.

    Raises:
        ObrError: values that are not finite, norms of another size, or no factor even with the largest damping.
    """

    def __init__(self, matrix: Tensor, damp: float = 0.01, name: str = "layer", harmonic: Tensor | None = None):
        if not torch.isfinite(matrix).all():
            raise ObrError(
                f"{name}: the Hessian has NaN or infinite values; check the calibration activations (half "
                "precision overflows on some models: use dtype float32 or bfloat16) and rebuild it."
            )
        if harmonic is not None and (harmonic.shape != matrix.shape[:1] or not (harmonic >= 0).all()):
            raise ObrError(
                f"{name}: harmonic has shape {tuple(harmonic.shape)}; it must hold the squared norms, 0 or more, of "
                f"{len(matrix)} columns."
            )
        self.matrix = matrix.float()
        self.harmonic = None if harmonic is None else harmonic.to(self.matrix)
        self.damp, self.name, self.flags = damp, name, []
        self._tails: dict[int, tuple[Tensor, Tensor]] = {}
        self.diagonal = self.matrix.diagonal().clone()
        self.dead = self.diagonal == 0
        if self.dead.any():
            self.flags.append(f"{int(self.dead.sum())} dead columns")

    def damped(self, start: int = 0) -> Tensor:
        """The trailing block from column `start` on, a copy: dead columns get a unit diagonal, then damping is added.

        Its size is `damp` times the mean of the whole diagonal. Before `inverse` it is the damping asked for.
        """
        damped = self.matrix[start:, start:].clone()
        diagonal = torch.where(self.dead, 1, self.diagonal)
        damped.diagonal().copy_((diagonal + self.damp * diagonal.mean())[start:])
        return damped

    @cached_property
    def inverse(self) -> Tensor:
        """(n, n) inverse of the damped Hessian; settles the damping."""
        asked = self.damp
        for _ in range(DAMP_RETRIES + 1):
            factor, info = torch.linalg.cholesky_ex(self.damped())
            if not info.any():
                if self.damp != asked:
                    self.flags.append(f"damp raised from {asked:g} to {self.damp:g}")
                return torch.cholesky_inverse(factor)
            self.damp = max(10 * self.damp, 1e-3)
        raise ObrError(
            f"{self.name}: the Hessian cannot be factored, even with damp {self.damp / 10:g}; use more "
            "calibration tokens than the layer has columns, or a larger damp."
        )

    def tail(self, start: int) -> tuple[Tensor, Tensor]:
        """Inverse of the damped Hessian's trailing block H[start:, start:], and its upper factor U.

        Both are (n - start, n - start), with UᵀU the inverse; the U of a trailing block is also that of H's
        inverse from `start` on.

        Raises:
            ObrError: the inverse cannot be factored.
        """
        if start not in self._tails:
            inverse = self.inverse
            if start:
                inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.damped(start)))
            factor, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if info.any():
                raise ObrError(f"{self.name}: the inverse Hessian is not positive definite; use a larger damp.")
            self._tails[start] = inverse, factor
        return self._tails[start]

    @property
    def inverse_factor(self) -> Tensor:
        """(n, n) upper U with UᵀU = H⁻¹."""
        return self.tail(0)[1]

    def loss(self, change: Tensor) -> float:
        """tr(D H Dᵀ) of `change (r, n)`, undamped H."""
        return float(((change @ self.matrix) * change).sum(dtype=torch.float64))
