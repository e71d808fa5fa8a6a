"""The linear systems of the restoration, one a row, solved for all rows at once."""

from functools import cache

import torch
from torch import Tensor

from obr.errors import ObrError

TOLERANCE = 5e-4  # of each row's residual: leaves the loss optimal to 1e-6, as it is quadratic in it
RENEW = 0.05  # the residual, in units of the target, at which bfloat16's rounding so far is taken out
LOW_ITERATIONS = 30  # in bfloat16, to RENEW and from there to the tolerance; real layers need 10 each
MAX_ITERATIONS = 500
# Right-hand sides are solved in chunks whose nine arrays stay in a CPU's cache, or keep a GPU busy, but not of so
# few rows that the products become slow: (elements, least rows).
CHUNK = {"cpu": (1 << 18, 192), "cuda": (1 << 27, 192)}


@cache
def product_dtype(device: str) -> torch.dtype:
    """The dtype of the large products on a device ("cpu", "cuda"): bfloat16 where it is native, else float32.

    Measured on a CPU with AVX512_BF16: 2.1 times as fast as float32 at 576 x 1536, 2.3 times at 512 x 4096.
    """
    if device == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def images_on_support(matrix: Tensor, target: Tensor, support: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """`v @ matrix` (r, n) for the v that is zero off `support` and for which `v @ matrix` is `target` on it.

    Conjugate gradients over all rows of a chunk at once, with a diagonal preconditioner. The products are taken
    in `product_dtype`. bfloat16 carries 8 bits, so at a residual of RENEW the image is computed once in float32:
    only what is added after that is rounded, and the result is as good as float32's. Where that image shows that
    the matrix is too badly conditioned for bfloat16, or it has not come so far in LOW_ITERATIONS, the chunk goes
    on in float32.

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
    elements, least = CHUNK[matrix.device.type]
    chunk = max(least, elements // len(matrix))
    for first in range(0, len(target), chunk):
        part = slice(first, first + chunk)
        rows = _Rows(matrix, scale, target[part] * scale, support[part])
        if low.dtype == matrix.dtype:
            solved = rows.iterate(low, tolerance, MAX_ITERATIONS)
        else:
            solved = _in_low_precision(rows, low, tolerance) or _in_full(rows, tolerance)
        if not solved:
            raise ObrError(
                f"The restoration has not converged in {MAX_ITERATIONS} iterations; use a larger damp or more "
                "calibration tokens."
            )
        torch.div(rows.image, scale, out=images[part])
    return images


def _scaled(matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`matrix (n, n)` with rows and columns scaled, made in `dtype` without a copy in the matrix's own."""
    scaled = torch.empty_like(matrix, dtype=dtype)
    for first in range(0, len(matrix), 1024):
        part = slice(first, first + 1024)
        scaled[part] = matrix[part] * scale * scale[part, None]
    return scaled


def _in_low_precision(rows: "_Rows", low: Tensor, tolerance: float) -> bool:
    converged = rows.iterate(low, RENEW, LOW_ITERATIONS)
    exact = rows.renew() <= 1.2 * RENEW
    return converged and exact and rows.iterate(low, tolerance, LOW_ITERATIONS)


def _in_full(rows: "_Rows", tolerance: float) -> bool:
    rows.restart()
    return rows.iterate(_scaled(rows.matrix, rows.scale, rows.matrix.dtype), tolerance, MAX_ITERATIONS)


class _Rows:
    """Conjugate gradients on some rows; all tensors are (r, n) but the powers, squared norms (r,).

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

    def renew(self) -> float:
        """Compute image and residual from the solution, in the matrix's own dtype; the largest residual."""
        torch.mm(torch.mul(self.solution, self.scale, out=self.scratch), self.matrix, out=self.image)
        self.image.mul_(self.scale)
        torch.sub(self.target, self.image, out=self.residual).mul_(self.on)
        self.power = self._squares()
        return float((self.power / self.whole.clamp_min(torch.finfo(self.whole.dtype).tiny)).max().sqrt())

    def restart(self) -> None:
        """Forget the search directions, and the solutions of rows that are no better than none."""
        self.renew()
        self.solution[~(self.power < self.whole)] = 0
        self.renew()
        self.direction = self.residual.clone()

    def iterate(self, products: Tensor, tolerance: float, iterations: int) -> bool:
        """Go on until every row's residual is `tolerance` of its target; whether that was reached."""
        goal = tolerance**2 * self.whole
        direction_low, image_low = (torch.empty_like(self.along, dtype=products.dtype) for _ in range(2))
        for _ in range(iterations):
            if bool((self.power <= goal).all()):
                return True
            torch.mm(direction_low.copy_(self.direction), products, out=image_low)
            self.along.copy_(image_low)
            curvature = torch.mul(self.direction, self.along, out=self.scratch).sum(1)
            step = torch.where(curvature > 0, self.power / curvature, 0).unsqueeze(1)  # 0: a row of zeros
            self.solution.addcmul_(step, self.direction)
            self.image.addcmul_(step, self.along)
            self.residual.addcmul_(step, self.along.mul_(self.on), value=-1)
            previous, self.power = self.power, self._squares()
            ratio = torch.where(previous > 0, self.power / previous, 0).unsqueeze(1)
            self.direction.mul_(ratio).add_(self.residual)
        return bool((self.power <= goal).all())
