"""NVFP4: values of 4 bits (E2M1), with a scale in FP8 (E4M3) for each 16 columns, as PyTorch multiplies them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1, by code; bit 3 is the sign
BLOCK = 16  # columns that share a scale
TILE = (128, 4)  # rows, scales of a row: what cuBLAS wants together, padded


@dataclass(frozen=True)
class Operand:
    """A matrix (r, n) in NVFP4.

    codes: (r, n / 2) uint8, the even column in the low half. scales: (r, n / 16) float8. swizzled: the same in the
    order of `scale_tiles`, flat. exact: (r, n) float64, the very numbers.
    """

    codes: Tensor
    scales: Tensor
    swizzled: Tensor
    exact: Tensor

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that a product reads: codes, and scales in cuBLAS's order."""
        return self.codes, self.swizzled


def quantize(values: Tensor) -> Operand:
    """Round `values (r, n)` to NVFP4, n a multiple of 16; the largest value of a block becomes 6 scales."""
    blocks = values.float().unflatten(1, (-1, BLOCK))
    scales = (blocks.abs().amax(2) / VALUES[-1]).clamp(2.0**-9, 448).to(torch.float8_e4m3fn)
    levels = torch.tensor(VALUES, device=values.device)
    middle = (levels[1:] + levels[:-1]) / 2
    steps = blocks / scales.float()[..., None]
    codes = torch.bucketize(steps.abs(), middle)
    exact = (levels[codes] * steps.sign()).double() * scales.double()[..., None]
    codes = (codes | ((steps < 0).long() << 3)).flatten(1).to(torch.uint8)
    return Operand(codes[:, ::2] | codes[:, 1::2] << 4, scales, scale_tiles(scales), exact.flatten(1))


def scale_tiles(scales: Tensor) -> Tensor:
    """Scales (r, k) as cuBLAS reads them: tiles of 128 rows by 4, each as 32 x (4, 4), zeros in what is missing."""
    rows, columns = scales.shape
    padded = functional.pad(scales.view(torch.uint8), (0, -columns % TILE[1], 0, -rows % TILE[0]))
    tiles = padded.view(len(padded) // TILE[0], 4, 32, -1, TILE[1]).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(torch.float8_e4m3fn)


def multiply(left: Operand, right: Operand) -> Tensor:
    """left (t, n) right (r, n)^T, bfloat16, on a device with FP4 products."""
    kind = torch.float4_e2m1fn_x2
    return torch._scaled_mm(
        left.codes.view(kind), right.codes.view(kind).t(), scale_a=left.swizzled, scale_b=right.swizzled,
        out_dtype=torch.bfloat16,
    )  # fmt: skip
