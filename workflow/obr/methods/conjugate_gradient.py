"""The linear systems of the restoration, one a row, solved for all rows at once."""

import torch
from torch import Tensor

from obr.errors import ObrError
from obr.methods import row_products
from obr.runtime.processor import product_dtype

TOLERANCE = 5e-4  # of each row's residual: leaves the loss optimal to 1e-6, as it is quadratic in it
RENEW = 0.05  # the residual, in units of the target, at which bfloat16's rounding so far is taken out
LOW_ITERATIONS = 30  # in bfloat16, to RENEW and from there to the tolerance; real layers need 10 each
MAX_ITERATIONS = 500
# Iterations between looks whether any row goes on, by device: a GPU is waited for. Rows that have converged stay.
LOOK_EVERY = {"cpu": 1, "cuda": 8}
SCALED_ROWS = 1024  # of a matrix that are scaled at a time


def images_on_support(matrix: Tensor, target: Tensor, support: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """`v @ matrix` (r, n) for the v that is zero off `support` and for which `v @ matrix` is `target` on it.

    Conjugate gradients over all rows of a part at once (see `rows`), with a diagonal preconditioner. A row stays as
    it is once it has converged, so its result does not depend on the rows beside it. The products are taken in
    `product_dtype`. bfloat16 carries 8 bits, so at a residual of RENEW the image is computed once in float32: only
    what is added after that is rounded, and the result is as good as float32's. Rows for which that image shows that
    the matrix is too badly conditioned for bfloat16, or that have not come so far in LOW_ITERATIONS, go on in
    float32.

    Args:
        matrix: (n, n), symmetric positive definite.
        target: (r, n). support: (r, n) bool.
        tolerance: of each row's residual, in units of its target.

    Raises:
        ObrError: some row has not converged after MAX_ITERATIONS.
    """
    scale = matrix.diagonal().rsqrt()  # to a unit diagonal, which preconditions all rows alike
    low = _scaled(matrix, scale, product_dtype(matrix.device.type))
    images = torch.empty_like(target)
    for part in row_products.parts(len(target), target.device):
        count = len(target[part])
        systems = _Systems(
            matrix, scale, row_products.filled(target[part] * scale), row_products.filled(support[part])
        )
        if low.dtype == matrix.dtype:
            solved = systems.iterate(low, tolerance, MAX_ITERATIONS)
        else:
            solved = _in_low_precision(systems, low, tolerance)
            if not solved.all():
                solved = solved | _in_full(systems, tolerance, ~solved)
        if not solved.all():
            raise ObrError(
                f"The restoration has not converged in {MAX_ITERATIONS} iterations; use a larger damp or more "
                "calibration tokens."
            )
        torch.div(systems.image[:count], scale, out=images[part])
    return images


def _scaled(matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`matrix (n, n)` with rows and columns scaled, made in `dtype` without a copy in the matrix's own."""
    scaled = torch.empty_like(matrix, dtype=dtype)
    for first in range(0, len(matrix), SCALED_ROWS):
        part = slice(first, first + SCALED_ROWS)
        scaled[part] = matrix[part] * scale * scale[part, None]
    return scaled


def _in_low_precision(systems: "_Systems", low: Tensor, tolerance: float) -> Tensor:
    """(r,) which rows converged with products in `low (n, n)`; the others are left where they came to."""
    converged = systems.iterate(low, RENEW, LOW_ITERATIONS)
    exact = systems.renew() <= 1.2 * RENEW
    return systems.iterate(low, tolerance, LOW_ITERATIONS, converged & exact)


def _in_full(systems: "_Systems", tolerance: float, among: Tensor) -> Tensor:
    """(r,) which of the rows `among (r,)` converged with products in the matrix's own dtype."""
    systems.restart(among)
    full = _scaled(systems.matrix, systems.scale, systems.matrix.dtype)
    return systems.iterate(full, tolerance, MAX_ITERATIONS, among)


class _Systems:
    """Conjugate gradients on the rows of a part; all tensors are (r, n) but the powers, squared norms (r,).

    The system is that of `matrix (n, n)` with rows and columns multiplied by `scale (n,)`.
    """

    def __init__(self, matrix: Tensor, scale: Tensor, target: Tensor, on: Tensor):
        self.matrix, self.scale, self.target, self.on = matrix, scale, target, on.to(target.dtype)
        self.solution, self.image = torch.zeros_like(target), torch.zeros_like(target)
        self.residual = target * self.on
        self.direction = self.residual.clone()
        self.along, self.scratch = torch.empty_like(target), torch.empty_like(target)
        self.whole = self.power = self._squares()

    def _squares(self) -> Tensor:
        return torch.linalg.vector_norm(self.residual, dim=1).square_()

    def renew(self, among: Tensor | None = None) -> Tensor:
        """Compute image and residual from the solution, in the matrix's own dtype; returns the residuals (r,), in
        units of the targets. among: (r,) the rows for which, all by default."""
        image = torch.mm(torch.mul(self.solution, self.scale, out=self.scratch), self.matrix).mul_(self.scale)
        self.image = image if among is None else torch.where(among[:, None], image, self.image)
        torch.sub(self.target, self.image, out=self.residual).mul_(self.on)
        self.power = self._squares()
        return (self.power / self.whole.clamp_min(torch.finfo(self.whole.dtype).tiny)).sqrt()

    def restart(self, among: Tensor) -> None:
        """Forget the search directions of the rows `among (r,)`, and their solutions where these are no better than
        none."""
        self.renew(among)
        self.solution[among & ~(self.power < self.whole)] = 0
        self.renew(among)
        self.direction = self.residual.clone()

    def iterate(self, products: Tensor, tolerance: float, iterations: int, among: Tensor | None = None) -> Tensor:
        """Go on until each row's residual is `tolerance` of its target; returns (r,) which rows have come to that.

        among: (r,) the rows that go on, all by default; the others stay as they are, and have not.
        """
        among = torch.ones_like(self.power, dtype=torch.bool) if among is None else among
        goal = tolerance**2 * self.whole
        direction_low, image_low = (torch.empty_like(self.along, dtype=products.dtype) for _ in range(2))
        every = LOOK_EVERY[goal.device.type]
        for count in range(iterations):
            going = among & ~(self.power <= goal)
            if count % every == 0 and not going.any():
                break
            torch.mm(direction_low.copy_(self.direction), products, out=image_low)
            self.along.copy_(image_low)
            curvature = torch.mul(self.direction, self.along, out=self.scratch).sum(1)
            step = torch.where(going & (curvature > 0), self.power / curvature, 0).unsqueeze(1)
            self.solution.addcmul_(step, self.direction)
            self.image.addcmul_(step, self.along)
            self.residual.addcmul_(step, self.along.mul_(self.on), value=-1)
            previous, self.power = self.power, self._squares()
            ratio = torch.where(previous > 0, self.power / previous, 0)
            ratio = torch.where(going, ratio, 1).unsqueeze(1)
            self.direction.mul_(ratio).addcmul_(going.to(ratio.dtype).unsqueeze(1), self.residual)
        return among & (self.power <= goal)
