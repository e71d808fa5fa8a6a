"""NVFP4 operands: codes, scales, and the order in which cuBLAS reads these."""

import torch

from obr.kernels import fp4


def test_codes_and_scales_give_the_numbers_that_are_said_to_be_multiplied():
    values = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 2, 5)[:, None]
    operand = fp4.quantize(values)
    halves = torch.stack([operand.codes & 15, operand.codes >> 4], dim=2).flatten(1).long()
    levels = torch.tensor([*fp4.VALUES, *(-value for value in fp4.VALUES)]).double()
    back = levels[halves] * operand.scales.double().repeat_interleave(fp4.BLOCK, 1)
    assert torch.equal(back, operand.exact)
    largest = values.abs().unflatten(1, (-1, fp4.BLOCK)).amax(2).repeat_interleave(fp4.BLOCK, 1)
    assert ((back - values).abs() <= largest / 5).all()


def test_values_are_rounded_to_the_nearest_level():
    values = torch.randn(8, 48, generator=torch.Generator().manual_seed(1)).clamp(-6, 6)
    values[:, ::16] = 6.0  # so that scales are one
    operand = fp4.quantize(values)
    levels = torch.tensor([*fp4.VALUES, *(-value for value in fp4.VALUES)])
    nearest = levels[(values[..., None] - levels).abs().argmin(-1)]
    assert (operand.scales.float() == 1).all() and torch.equal(operand.exact.float(), nearest)


def test_scales_lie_as_cublas_documents_it():
    """Tiles of 128 x 4, in them row r and column c at 16 (r mod 32) + 4 (r // 32) + c; zeros in what is missing."""
    for rows, columns in ((128, 4), (256, 12), (70, 3)):
        scales = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)).to(torch.float8_e4m3fn)
        found, across = fp4.scale_tiles(scales).float(), -(-columns // 4)
        expected = torch.zeros(-(-rows // 128) * across * 512)
        for r in range(rows):
            for c in range(columns):
                tile = r // 128 * across + c // 4
                expected[512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = scales[r, c].float()
        assert torch.equal(found, expected)
