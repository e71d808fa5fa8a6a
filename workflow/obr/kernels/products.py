"""Matrix products of this device, PyTorch's and this package's, each with its operands in place.

PyTorch has no INT4 x INT4 product and no unstructured sparse one; what it has is taken as it is: dense products,
INT8, FP8, NVFP4, INT4 weights with 16-bit activations, and 2:4 sparsity. `int4` on a CPU and `gpu` on CUDA multiply
packed 4-bit weights, in every pattern that a compression makes, by 8-bit activations, and `gpu` by 16-bit ones;
`cuda` 4-bit weights by 4-bit activations on tensor cores, dense and in pairs of 4:8, which is all that these take.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from obr.config.pattern import Pattern
from obr.config.quantizer import QuantizerSettings
from obr.kernels import fp4
from obr.kernels.cuda import library, operands
from obr.kernels.gpu import layout, product
from obr.kernels.int4 import packed_weight
from obr.methods.grid import Grid
from obr.methods.masks import mask_from_scores


class Lacking(Exception):
    """This device or build does not have the kernel; the message is the reason, in words."""


class Emulated(Lacking):
    """PyTorch would compute the product with other instructions, so slowly that nobody runs it on this device."""


@dataclass(frozen=True)
class Case:
    """A kernel with its operands in place.

    run: () -> (t, r), the product. x: (t, n) and weight: (r, n): the very numbers it multiplies, in float64.
    stored: the tensors that hold the weight as the kernel reads it. executed: share of the multiplications
    that it carries out. remark: what a reader of its time must know.
    """

    run: Callable[[], Tensor]
    x: Tensor
    weight: Tensor
    stored: tuple[Tensor, ...]
    executed: float = 1.0
    remark: str = ""


def _dense(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Case]:
    def kernel(x: Tensor, weight: Tensor) -> Case:
        x, weight = x.to(dtype), weight.to(dtype)
        return Case(lambda: torch.nn.functional.linear(x, weight), x, weight, (weight,))

    return kernel


def _to_int8(values: Tensor) -> Tensor:
    return (values / values.abs().max() * 127).round().to(torch.int8)


def _int8(x: Tensor, weight: Tensor) -> Case:
    x, weight = _to_int8(x), _to_int8(weight)
    return Case(lambda: torch._int_mm(x, weight.t()), x, weight, (weight,))


def _fp8(x: Tensor, weight: Tensor) -> Case:
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        raise Lacking("FP8 products need CUDA compute capability 8.9 or later")
    if not x.is_cuda and not _multiplies_fp8():
        raise Emulated("this processor has no FP8 products (AMX with AVX10.2), and PyTorch would emulate them")
    x, weight = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    one = torch.ones((), device=x.device)
    scales = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
    return Case(lambda: torch._scaled_mm(x, weight.t(), **scales), x, weight, (weight,))


def _multiplies_fp8() -> bool:
    """Whether the CPU has AMX-FP8, which comes with AVX10.2; newer versions of PyTorch report AVX10.2."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("amx_tile") and has.get("avx10_2"))


def _int4_weight(x: Tensor, weight: Tensor) -> Case:
    """INT4 codes with a bfloat16 scale and zero per group of columns: weight = (code - 8) * scale + zero."""
    rows, columns = weight.shape
    group = next((size for size in (128, 64, 32) if columns % size == 0), None)
    if group is None:
        raise Lacking(f"groups of 128, 64 or 32 columns do not divide {columns}")
    grouped = weight.reshape(rows, -1, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / 15).bfloat16()
    zero = (low + 8 * (high - low) / 15).bfloat16()
    steps = (grouped - zero[..., None].float()) / scale[..., None].float()
    codes = (steps.round() + 8).clamp(0, 15)
    exact = (codes.double() - 8) * scale[..., None].double() + zero[..., None].double()
    codes, x = codes.to(torch.int32).reshape(rows, columns), x.bfloat16()
    scales = torch.stack([scale.T, zero.T], dim=-1).contiguous()
    aten = torch.ops.aten
    if x.is_cuda:
        packed = aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
        multiply = aten._weight_int4pack_mm
    else:
        packed, multiply = (
            aten._convert_weight_to_int4pack_for_cpu(codes, 1),
            aten._weight_int4pack_mm_for_cpu,
        )
    return Case(lambda: multiply(x, packed, group, scales), x, exact.reshape(rows, columns), (packed, scales))


def _two_of_four(weight: Tensor) -> Tensor:
    """`weight` (r, n) with the two smaller of every four neighbours in a row set to zero."""
    rows, columns = weight.shape
    if columns % 4:
        raise Lacking(f"2:4 sparsity does not divide {columns} columns")
    fours = weight.reshape(rows, -1, 4)
    dropped = fours.abs().argsort(dim=-1)[..., :2]
    return fours.scatter(-1, dropped, 0).reshape(rows, columns)


def _need_cuda(x: Tensor) -> None:
    if not x.is_cuda:
        raise Lacking("PyTorch has 2:4 sparse products on CUDA devices only")


def _sparse(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Case]:
    def kernel(x: Tensor, weight: Tensor) -> Case:
        _need_cuda(x)
        x, weight = x.to(dtype), _two_of_four(weight).to(dtype)
        sparse = torch.sparse.to_sparse_semi_structured(weight)
        stored = tuple(part for part in (sparse.packed, sparse.meta) if part is not None)
        return Case(lambda: torch.nn.functional.linear(x, sparse), x, weight, stored, executed=0.5)

    return kernel


def _sparse_int8(x: Tensor, weight: Tensor) -> Case:
    """INT8 2:4 with an exact int32 result, which only cuSPARSELt's own call gives; it computes weight x^T."""
    _need_cuda(x)
    if not torch.backends.cusparselt.is_available():
        raise Lacking("this build of PyTorch has no cuSPARSELt")
    x, weight = _to_int8(x), _two_of_four(_to_int8(weight))
    packed = torch._cslt_compress(weight)
    return Case(
        lambda: torch._cslt_sparse_mm(packed, x.t(), out_dtype=torch.int32).t(),
        x,
        weight,
        (packed,),
        executed=0.5,
    )


def _sparse_fp8(x: Tensor, weight: Tensor) -> Case:
    """FP8 2:4 by cuSPARSELt's own call, as `_sparse_int8`; scales of one."""
    _need_cuda(x)
    if not torch.backends.cusparselt.is_available():
        raise Lacking("this build of PyTorch has no cuSPARSELt")
    if torch.cuda.get_device_capability(x.device) < (8, 9):
        raise Lacking("FP8 products need CUDA compute capability 8.9 or later")
    x, weight = x.to(torch.float8_e4m3fn), _two_of_four(weight).to(torch.float8_e4m3fn)
    packed = torch._cslt_compress(weight)
    return Case(
        lambda: torch._cslt_sparse_mm(packed, x.t(), out_dtype=torch.bfloat16).t(), x, weight, (packed,), executed=0.5
    )


def _nvfp4(x: Tensor, weight: Tensor) -> Case:
    """Both operands in FP4 (E2M1), a scale in FP8 for each 16 columns."""
    _need_fp4(x)
    if x.shape[1] % 32:
        raise Lacking(f"FP4 products need columns in multiples of 32, not {x.shape[1]}")
    left, right = fp4.quantize(x), fp4.quantize(weight)
    return Case(lambda: fp4.multiply(left, right), left.exact, right.exact, right.stored)


def _sparse_nvfp4(x: Tensor, weight: Tensor) -> Case:
    _need_fp4(x)
    raise Lacking("PyTorch has no sparse product of FP4; cuSPARSELt has one for pairs of 4:8")


def _need_fp4(x: Tensor) -> None:
    if not x.is_cuda:
        raise Lacking("PyTorch has FP4 products on CUDA devices only")
    if torch.cuda.get_device_capability(x.device) < (10, 0):
        raise Lacking("FP4 products need CUDA compute capability 10.0 or later")


def _packed(pattern: str | None, weight_only: bool = False) -> Callable[[Tensor, Tensor], Case]:
    """4-bit codes in a pattern, "50 %" for none, by activations rounded to 8 bits a token as part of the product.

    weight_only: by activations of 16 bits.
    """
    parsed = None if pattern in (None, "50 %") else Pattern.parse(pattern)

    def kernel(x: Tensor, weight: Tensor) -> Case:
        if weight_only and not x.is_cuda:
            raise Lacking("packed 4-bit weights meet 16-bit activations on CUDA devices only")
        codes, scale, mask = _codes(weight, pattern)
        prepare = _on_gpu if x.is_cuda else _on_cpu
        run, x, stored = prepare(x.bfloat16() if weight_only else x, codes, scale, mask, parsed)
        return Case(run, x, codes * scale.double(), stored, executed=1.0 if mask is None else 0.5)

    return kernel


def _codes(weight: Tensor, pattern: str | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes of 4 bits (r, n), scales (r, 1) and mask of a weight, half of it pruned by magnitude unless dense."""
    grid = Grid.fit(weight, 4, clip="minmax")
    codes = grid.codes(weight)
    if pattern is None:
        return codes, grid.scale, None
    mask = mask_from_scores(weight.abs(), 0.5, None if pattern == "50 %" else Pattern.parse(pattern))
    return codes * mask, grid.scale, mask


def _on_cpu(x: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, pattern: Pattern | None) -> tuple:
    """(product, the activations that it multiplies, stored tensors), activations rounded to 8 bits."""
    packed, settings = packed_weight.Weight.pack(codes, scale, mask, pattern), QuantizerSettings(bits=8)
    rounded = packed_weight.quantize(x, settings)
    exact = (rounded.q[:, : x.shape[1]].double() - rounded.zero[:, None]) * rounded.scale[:, None]
    stored = tuple(getattr(packed, part) for part in packed_weight.PARTS)
    return lambda: packed.multiply(packed_weight.quantize(x, settings)), exact, stored


def _on_gpu(x: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, pattern: Pattern | None) -> tuple:
    """As `_on_cpu`, in Triton; 16-bit activations are not rounded."""
    packed, settings = layout.Weight.pack(codes, scale, mask, pattern), QuantizerSettings(bits=8)
    product.programs()
    stored = tuple(getattr(packed, part) for part in layout.PARTS)
    if x.dtype == torch.bfloat16:
        return lambda: product.multiply(packed, x), x, stored
    exact = product.quantize(x, settings).floats.double()
    return lambda: product.multiply(packed, product.quantize(x, settings)), exact, stored


def _need_tensor_cores(x: Tensor) -> str:
    """What is to be remarked on the device; Lacking if it has no tensor cores for 4 bits."""
    if not x.is_cuda:
        raise Lacking("INT4 tensor cores are on CUDA devices only")
    capability = torch.cuda.get_device_capability(x.device)
    if capability < (8, 0):
        raise Lacking("these products need CUDA compute capability 8.0 or later")
    return "" if capability < (9, 0) else "emulated: this generation has no tensor cores for INT4"


def _tensor_cores(sparse: bool) -> Callable[[Tensor, Tensor], Case]:
    """Codes of 4 bits by codes of 4 bits, sums in int32; sparse: in the pattern "paired 4:8"."""

    def kernel(x: Tensor, weight: Tensor) -> Case:
        remark = _need_tensor_cores(x)
        tokens, (codes, packed) = _to_int4(x), _operand(weight, sparse)
        right, (rows, count) = library.activations(packed, tokens), (len(weight), len(x))
        return Case(
            lambda: library.multiply(packed, right).t()[:count, :rows],
            tokens,
            codes,
            packed.stored,
            executed=0.5 if sparse else 1.0,
            remark=remark,
        )

    return kernel


def _operand(weight: Tensor, sparse: bool) -> tuple[Tensor, operands.Operand]:
    """Codes (r, n) of 4 bits, half of them zero in pairs of 4:8 if sparse, and the same as the kernel reads them."""
    codes = _to_int4(weight)
    if not sparse:
        return codes, operands.dense(codes)
    mask = mask_from_scores(weight.abs(), 0.5, Pattern.parse("paired 4:8"))
    return codes * mask, operands.sparse(codes, mask)


def _to_int4(values: Tensor) -> Tensor:
    return (values / values.abs().max() * 7).round().to(torch.int8)


def _half_by_cutlass(x: Tensor, weight: Tensor) -> Case:
    _need_tensor_cores(x)
    x, weight = x.half(), weight.half()
    filled = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 8))  # tokens in eights, as the kernel wants them
    return Case(lambda: library.half(weight, filled).t()[: len(x)], x, weight, (weight,))


# Packed weights by name, and their patterns.
PACKED = {
    "packed int4": None,
    **{f"packed int4 {pattern}": pattern for pattern in ("50 %", "8:16", "4:8", "2:4", "paired 4:8")},
}

# By name: (x (t, n), weight (r, n), both float32 on the device) -> Case.
KERNELS: dict[str, Callable[[Tensor, Tensor], Case]] = {
    "fp32": _dense(torch.float32),
    "fp16": _dense(torch.float16),
    "bf16": _dense(torch.bfloat16),
    "int8": _int8,
    "fp8": _fp8,
    "int4 weight": _int4_weight,
    "fp16 2:4": _sparse(torch.float16),
    "bf16 2:4": _sparse(torch.bfloat16),
    "int8 2:4": _sparse_int8,
    "fp8 2:4": _sparse_fp8,
    "nvfp4": _nvfp4,
    "nvfp4 paired 4:8": _sparse_nvfp4,
    "fp16 (CUTLASS)": _half_by_cutlass,
    "int4 (CUTLASS)": _tensor_cores(sparse=False),
    "int4 paired 4:8 (CUTLASS)": _tensor_cores(sparse=True),
    **{name: _packed(pattern) for name, pattern in PACKED.items()},
    **{f"{name}, 16-bit": _packed(pattern, weight_only=True) for name, pattern in PACKED.items()},
}

# Weights of a GPU's kernels whose layout does not take a GPU to make: float32 -> (stored, share executed).
LAYOUTS: dict[str, Callable[[Tensor], tuple[tuple[Tensor, ...], float]]] = {
    "fp32": lambda weight: ((weight,), 1.0),
    "fp16": lambda weight: ((weight.half(),), 1.0),
    "bf16": lambda weight: ((weight.bfloat16(),), 1.0),
    "fp16 (CUTLASS)": lambda weight: ((weight.half(),), 1.0),
    "int8": lambda weight: ((_to_int8(weight),), 1.0),
    "fp8": lambda weight: ((weight.to(torch.float8_e4m3fn),), 1.0),
    "int4 (CUTLASS)": lambda weight: (_operand(weight, sparse=False)[1].stored, 1.0),
    "int4 paired 4:8 (CUTLASS)": lambda weight: (_operand(weight, sparse=True)[1].stored, 0.5),
    "nvfp4": lambda weight: (fp4.quantize(weight).stored, 1.0),
}


def _laid_out(pattern: str | None) -> Callable[[Tensor], tuple[tuple[Tensor, ...], float]]:
    def stored(weight: Tensor) -> tuple[tuple[Tensor, ...], float]:
        codes, scale, mask = _codes(weight, pattern)
        parsed = None if pattern in (None, "50 %") else Pattern.parse(pattern)
        packed = layout.Weight.pack(codes, scale, mask, parsed)
        return tuple(getattr(packed, part) for part in layout.PARTS), 1.0 if mask is None else 0.5

    return stored


for _name, _pattern in PACKED.items():
    LAYOUTS[_name] = LAYOUTS[f"{_name}, 16-bit"] = _laid_out(_pattern)
