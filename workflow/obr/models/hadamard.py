"""Orthogonal matrices of any size as Kronecker products of small ones, Hadamard wherever one is known."""

from collections.abc import Callable, Sequence
from functools import cache, cached_property, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from obr.errors import ObrError

LARGEST_DENSE = 1024  # of a factor that is not Hadamard: larger ones would cost more than they spare
HALF = (torch.float16, torch.bfloat16)
_SYLVESTER = 128  # power-of-two parts are applied as dense products of at most this size


class Constants(nn.Module):
    """A module whose buffers keep their dtype when a model is cast: rounded, they would add a systematic error."""

    def _apply(self, fn, recurse=True):
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class Kronecker(Constants):
    """x (..., n) -> (x * signs) (F0 ⊗ F1 ⊗ …)ᵀ, for matrices F that are orthogonal, or at least invertible.

    Factors are applied one by one, so the cost is n * Σ size instead of n². An integer stands for an identity
    of that size. Where activations are transformed, the rows of the weight that reads them take the `dual`
    operator: T(x) T.dual(W)ᵀ = x Wᵀ. An orthogonal operator is its own dual. Factors may carry gradients.

    precision: activations are transformed in this dtype if it is wider than theirs. None: float16 and bfloat16
    activations are transformed in float32 up to the product with H_K, a Hadamard matrix that is not Sylvester's. That
    product is in the activations' dtype, as in the released code of QuaRot. See `_in_half`.
    """

    def __init__(self, factors: Sequence[Tensor | int], signs: Tensor | None = None):
        super().__init__()
        self.sizes = [f if isinstance(f, int) else f.shape[0] for f in factors]
        self.columns = torch.Size(self.sizes).numel()
        self.precision: torch.dtype | None = torch.float32
        self.register_buffer("signs", signs)
        for i, factor in enumerate(factors):
            self.register_buffer(f"factor{i}", None if isinstance(factor, int) else factor)

    def forward(self, x: Tensor) -> Tensor:
        """The transform of the last dimension of x (..., n), in the dtype of x."""
        shape, dtype = x.shape, x.dtype
        work = x.to(torch.promote_types(dtype, self.precision or dtype))
        if work.dtype in HALF:
            return self._in_half(work).reshape(shape)
        if self.signs is not None:
            work = work * self.signs.to(work)
        work = work.reshape(-1, *self.sizes)
        for axis, factor in enumerate(self.factors(), start=1):
            if factor is not None:
                work = self._applied(work, factor, axis)
        return work.reshape(shape).to(dtype)

    def _in_half(self, x: Tensor) -> Tensor:
        """x (..., n) in float16 or bfloat16 -> (-1, *sizes), rounded before a product with H_K and at the end.

        No constant is rounded, so the scale of the result has no systematic error: H_K is multiplied as a matrix of
        ±1, which any dtype holds, and its 1/√K is multiplied in float32.
        """
        work, plain, scale = x.float(), [], 1.0
        if self.signs is not None:
            work = work * self.signs.to(work)
        work = work.reshape(-1, *self.sizes)
        for axis, (factor, in_half) in enumerate(zip(self.factors(), self._multiplied_in_half, strict=True), start=1):
            if in_half:
                plain.append((axis, factor.sign()))
                scale *= factor.shape[0] ** -0.5
            elif factor is not None:
                work = self._applied(work, factor, axis)
        work = (work * scale if plain else work).to(x.dtype)
        for axis, factor in plain:
            work = _apply(work, factor.to(work), axis)
        return work

    @cached_property
    def fast(self) -> bool:
        """Whether the last factor may be left to the fast CUDA transform, where that is installed."""
        last = self.factors()[-1]
        return last is not None and not last.requires_grad and is_sylvester(last)

    @cached_property
    def _multiplied_in_half(self) -> list[bool]:
        """Of each factor: whether it is an H_K that is multiplied in the activations' dtype.

        One without other factors is not: the scaled activations would lie on a coarse grid, and their rounding has a
        mean error of up to 1e-4 in bfloat16.
        """
        found = [f is not None and _is_plus_minus(f) and not is_sylvester(f) for f in self.factors()]
        alone = all(f is None or one for f, one in zip(self.factors(), found, strict=True))
        return [one and not alone for one in found]

    def _applied(self, work: Tensor, factor: Tensor, axis: int) -> Tensor:
        fast = self._fast_transform(work) if axis == len(self.sizes) else None
        return fast(work, factor.shape[0] ** -0.5) if fast else _apply(work, factor.to(work), axis)

    def _fast_transform(self, x: Tensor):
        """The CUDA kernel, where it applies: it has no float64, in which weights are folded."""
        fast = _cuda_hadamard() if x.is_cuda and x.dtype != torch.float64 else None
        return fast if fast is not None and self.fast else None

    @property
    def device(self) -> torch.device | None:
        """Where its constants lie; None if it has none."""
        return next((constant.device for constant in self.buffers()), None)

    def factors(self) -> list[Tensor | None]:
        """The factors, None for an identity."""
        return [getattr(self, f"factor{i}") for i in range(len(self.sizes))]

    def dual(self) -> "Kronecker":
        """The operator for the rows of the weights that read what this one gives: the inverse, transposed.

        Inverses are taken in float64, and are differentiable. Raises ObrError for a singular factor.
        """
        signs = None if self.signs is None else self.signs.double().reciprocal()
        return self._with(inverse_transposed, signs)

    def _with(self, change: Callable[[Tensor], Tensor], signs: Tensor | None) -> "Kronecker":
        return Kronecker(
            [n if f is None else change(f) for n, f in zip(self.sizes, self.factors(), strict=True)], signs
        )

    def matrix(self) -> Tensor:
        """P (n, n) such that this is x -> x P, float64."""
        return self(torch.eye(self.columns, dtype=torch.float64, device=self.device))

    def held_in(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "Kronecker":
        """A copy whose factors and signs are of this dtype, on this device."""
        copied = partial(
            torch.Tensor.to, device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format
        )
        held = self._with(copied, None if self.signs is None else copied(self.signs))
        if "fast" in self.__dict__:  # found by looking at a factor, for which a GPU is waited for
            held.__dict__["fast"] = self.fast
        return held

    @classmethod
    def right(cls, factors: Sequence[Tensor | int]) -> "Kronecker":
        """x -> x (P0 ⊗ P1 ⊗ …): for matrices P given as papers write them, on the right of row vectors."""
        return cls([p if isinstance(p, int) else p.mT for p in factors])

    def spec(self) -> dict:
        """What, with the buffers, rebuilds this module."""
        dense = [f is not None for f in self.factors()]
        return {"sizes": self.sizes, "dense": dense, "signs": self.signs is not None}

    @classmethod
    def from_spec(cls, spec: dict, tensors: dict[str, Tensor], prefix: str = "") -> "Kronecker":
        """The transform that `spec` describes; tensors: with its factors and signs below `prefix`."""
        factors = [
            tensors[f"{prefix}factor{i}"] if dense else size
            for i, (size, dense) in enumerate(zip(spec["sizes"], spec["dense"], strict=True))
        ]
        return cls(factors, tensors[f"{prefix}signs"] if spec["signs"] else None)


def inverse_transposed(matrix: Tensor) -> Tensor:
    """P^-T (..., n, n) in float64.

    Raises:
        ObrError: P has no inverse. A GPU is not waited for while a P is learned: what comes out is not finite then.
    """
    inverse, failed = torch.linalg.inv_ex(matrix.double())
    if (matrix.device.type == "cpu" or not matrix.requires_grad) and bool(failed.any()):
        raise ObrError(f"A transform of size {matrix.shape[-1]} has no inverse; its file is broken.")
    return inverse.mT


def _apply(x: Tensor, factor: Tensor, axis: int) -> Tensor:
    if axis == x.ndim - 1:
        return x @ factor.T
    if x.ndim == 3:  # the first of two factors: one batched product, nothing moved
        return factor @ x
    return (x.movedim(axis, -1) @ factor.T).movedim(-1, axis)


def _is_plus_minus(matrix: Tensor) -> bool:
    """Whether all entries of the matrix (n, n) are ±1/√n, to the rounding of its dtype."""
    magnitudes, expected = matrix.abs(), matrix.shape[0] ** -0.5
    return bool(((magnitudes - expected).abs() <= torch.finfo(matrix.dtype).eps * expected).all())


def is_sylvester(matrix: Tensor) -> bool:
    """Whether the matrix is the normalised Hadamard matrix of Sylvester's order."""
    n = matrix.shape[0]
    return n & (n - 1) == 0 and torch.equal(matrix, sylvester(n).to(matrix))


@cache
def _cuda_hadamard():
    """The transform of the optional package fast-hadamard-transform, or None where it is not installed."""
    if find_spec("fast_hadamard_transform") is None:
        return None
    from fast_hadamard_transform import hadamard_transform

    return hadamard_transform


@lru_cache(maxsize=16)
def sylvester(n: int) -> Tensor:
    """Hadamard matrix (n, n) of a power of two, normalised to be orthogonal, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / n**0.5


def known_hadamard(n: int) -> Tensor | None:
    """Hadamard matrix (n, n) from the table in compressed-tensors (every multiple of 4 up to 256), or None."""
    package = Path(find_spec("compressed_tensors").submodule_search_locations[0])
    with safe_open(package / "transform/utils/hadamards.safetensors", framework="pt") as table:
        if str(n) not in table.keys():  # noqa: SIM118  not a mapping
            return None
        return table.get_tensor(str(n)).double() / n**0.5


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Orthogonal matrix (n, n), uniform over the group, float64."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def hadamard(n: int, generator: torch.Generator, what: str = "size") -> Kronecker:
    """An orthogonal transform of size n = K·2^p: H_K ⊗ H_2^p with a known Hadamard matrix H_K.

    Where there is none of that size (9, 14, 29568 …), K is the odd part and its matrix a random orthogonal
    one, drawn from `generator`.

    Raises:
        ObrError: the odd part is too large for a dense factor.
    """
    odd, power = n, 1
    while odd % 2 == 0:
        odd, power = odd // 2, power * 2
    factors: list[Tensor] = []
    if odd > 1:
        matrix = known_hadamard(4 * odd) if power >= 4 else None
        if matrix is not None:
            power //= 4
        elif odd > LARGEST_DENSE:
            raise ObrError(f"{what} {n} has the odd part {odd}, too large for an online rotation; use another.")
        else:
            matrix = random_orthogonal(odd, generator)
        factors.append(matrix)
    while power > _SYLVESTER:
        factors.append(sylvester(_SYLVESTER))
        power //= _SYLVESTER
    if power > 1 or not factors:
        factors.append(sylvester(power))
    return Kronecker(factors)


def block_hadamard(n: int, block: int, what: str = "size") -> Kronecker:
    """I ⊗ H_b: every `block` consecutive ones of n channels are mixed among themselves. b is a power of two.

    Raises:
        ObrError: blocks that do not divide n.
    """
    if n % block:
        least = n & -n  # the largest power of two that divides n
        raise ObrError(
            f"Hadamard blocks of {block} do not divide the {what} {n}; choose a power of two up to {least}, or null."
        )
    return Kronecker([n // block, sylvester(block)])


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """(n,) of +1 and -1."""
    return torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
