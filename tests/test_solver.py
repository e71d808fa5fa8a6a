"""The solver of all rows at once: against direct solves, in float32 and with bfloat16 products."""

import pytest
import torch

from obr import solver
from obr.errors import ObrError

ROWS, COLUMNS = 40, 96


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def products(request, monkeypatch):
    monkeypatch.setattr(solver, "product_dtype", lambda device: request.param)
    return request.param


def problem(condition: float = 100.0):
    """A matrix (n, n) of this condition and with uneven diagonal, targets (r, n), and a support with rows all and
    nothing."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=generator))
    scale = torch.rand(COLUMNS, generator=generator) + 0.1
    matrix = (basis * torch.logspace(0, torch.tensor(condition).log10(), COLUMNS)) @ basis.T * scale * scale[:, None]
    target = torch.randn(ROWS, COLUMNS, generator=generator)
    support = torch.rand(ROWS, COLUMNS, generator=generator) > 0.5
    support[3], support[4] = False, True
    target[5] = 0
    return (matrix + matrix.T) / 2, target, support


def direct(matrix, target, support):
    images = []
    for row, on in zip(target.double(), support, strict=True):
        solution = torch.zeros(COLUMNS, dtype=torch.float64)
        solution[on] = torch.linalg.solve(matrix.double()[on][:, on], row[on])
        images.append(solution @ matrix.double())
    return torch.stack(images).float()


def test_images_are_those_of_direct_solves(products):
    matrix, target, support = problem()
    image = solver.images_on_support(matrix, target, support, tolerance=1e-3)
    expected = direct(matrix, target, support)
    assert ((image - target) * support).norm() < 2e-3 * target.norm()
    assert (image - expected).norm() < 0.01 * expected.norm()
    assert not image[3].any() and not image[5].any()


def test_tighter_tolerance_comes_closer():
    matrix, target, support = problem()
    expected = direct(matrix, target, support)
    errors = [
        float((solver.images_on_support(matrix, target, support, t) - expected).norm()) for t in (0.1, 1e-2, 1e-3)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_rows_are_independent_of_their_chunk(monkeypatch):
    matrix, target, support = problem()
    whole = solver.images_on_support(matrix, target, support)
    monkeypatch.setitem(solver.CHUNK, "cpu", (1, 7))
    assert (whole - solver.images_on_support(matrix, target, support)).norm() < 5e-3 * whole.norm()


def test_hopeless_systems_are_reported(products, monkeypatch):
    monkeypatch.setattr(solver, "MAX_ITERATIONS", 10)
    with pytest.raises(ObrError, match="not converged in 10 iterations; use a larger damp"):
        solver.images_on_support(*problem(condition=1e6))


def test_the_dtype_of_products_is_what_the_cpu_has():
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert solver.product_dtype("cpu") == (torch.bfloat16 if native else torch.float32)
