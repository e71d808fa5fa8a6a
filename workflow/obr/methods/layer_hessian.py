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
        if not is_finite(matrix):
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
        self._inverses: dict[int, Tensor] = {}  # of trailing blocks
        self._factors: dict[int, Tensor] = {}
        self._ordered: dict[int, tuple[Hessian, Tensor]] = {}  # by columns that stay together
        self.diagonal = self.matrix.diagonal().clone()
        self.dead = self.diagonal == 0
        if self.dead.any():
            self.flags.append(f"{int(self.dead.sum())} dead columns")

    def damped(self, start: int = 0, by_columns: bool = False) -> Tensor:
        """The trailing block from column `start` on, a copy: dead columns get a unit diagonal, then damping is added.

        Its size is `damp` times the mean of the whole diagonal. Before `inverse` it is the damping asked for.
        by_columns: whether the copy is stored column by column, as `factored` overwrites it.
        """
        block = self.matrix[start:, start:]
        damped = torch.empty_like(block, memory_format=torch.contiguous_format)
        damped = (damped.mT if by_columns else damped).copy_(block)
        diagonal = torch.where(self.dead, 1, self.diagonal)
        damped.diagonal().copy_((diagonal + self.damp * diagonal.mean())[start:])
        return damped

    @cached_property
    def inverse(self) -> Tensor:
        """(n, n) inverse of the damped Hessian; settles the damping."""
        return self._inverted()

    def _inverted(self) -> Tensor:
        asked = self.damp
        for _ in range(DAMP_RETRIES + 1):
            factor, positive = factored(self.damped(by_columns=True))
            if positive:
                if self.damp != asked:
                    self.flags.append(f"damp raised from {asked:g} to {self.damp:g}")
                return inverted(factor)
            factor = None  # before the next copy
            self.damp = max(10 * self.damp, 1e-3)
        raise ObrError(
            f"{self.name}: the Hessian cannot be factored, even with damp {self.damp / 10:g}; use more "
            "calibration tokens than the layer has columns, or a larger damp."
        )

    def tail_inverse(self, start: int) -> Tensor:
        """(n - start, n - start) inverse of the damped Hessian's trailing block H[start:, start:]."""
        if not start:
            return self.inverse
        if start not in self._inverses:
            self.inverse  # noqa: B018  settles the damping
            self._inverses[start] = inverted(factored(self.damped(start, by_columns=True))[0])
        return self._inverses[start]

    def factor(self, start: int = 0) -> Tensor:
        """(n - start, n - start) upper U with UᵀU the inverse of the trailing block H[start:, start:].

        It is also the trailing block of the U of H's whole inverse. That inverse is overwritten where nothing has
        asked for it.

        Raises:
            ObrError: the inverse cannot be factored.
        """
        if start not in self._factors:
            kept = start or "inverse" in self.__dict__
            inverse = self.tail_inverse(start).clone() if kept else self._inverted()
            self._factors[start], positive = factored(inverse, upper=True)
            if not positive:
                raise ObrError(f"{self.name}: the inverse Hessian is not positive definite; use a larger damp.")
        return self._factors[start]

    @property
    def inverse_factor(self) -> Tensor:
        """(n, n) upper U with UᵀU = H⁻¹."""
        return self.factor()

    def by_diagonal(self, unit: int = 1) -> tuple["Hessian", Tensor]:
        """(the same of columns in another order, that order (n,)): from the largest diagonal element to the smallest,
        of equal ones the first first. Its i-th column is this one's order[i].

        unit: so many columns stay side by side, in their own order; the largest sum comes first. What the result
        flags is flagged here, too; its `damp` is this one's until it is factored.
        """
        if unit not in self._ordered:
            starts = self.diagonal.view(-1, unit).sum(1).argsort(descending=True, stable=True) * unit
            order = (starts[:, None] + torch.arange(unit, device=starts.device)).flatten()
            matrix = self.matrix.index_select(0, order).index_select(1, order)
            self._ordered[unit] = Hessian(matrix, self.damp, self.name), order
            self._ordered[unit][0].flags = self.flags
        return self._ordered[unit]

    def forget_order(self) -> None:
        """Free what `by_diagonal` keeps."""
        self._ordered.clear()

    def loss(self, change: Tensor) -> float:
        """tr(D H Dᵀ) of `change (r, n)`, undamped H."""
        return float((change @ self.matrix).mul_(change).sum(dtype=torch.float64))


def is_finite(matrix: Tensor) -> bool:
    """Whether no value is NaN or infinite; unlike `torch.isfinite`, without a copy."""
    return not matrix.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(matrix))).all())


def factored(matrix: Tensor, upper: bool = False) -> tuple[Tensor, bool]:
    """(Cholesky factor (n, n), whether the matrix is positive definite), in the memory of `matrix (n, n)`.

    LAPACK overwrites matrices that are stored column by column, as the transpose of a symmetric one is.
    """
    columns = matrix if matrix.stride(0) == 1 else matrix.mT
    factor, info = torch.linalg.cholesky_ex(
        columns, upper=upper, out=(columns, torch.empty((), dtype=torch.int32, device=matrix.device))
    )
    return factor, not bool(info)


def inverted(factor: Tensor) -> Tensor:
    """(n, n) inverse of the matrix whose lower Cholesky factor this is, in its memory."""
    return torch.cholesky_inverse(factor, out=factor)
