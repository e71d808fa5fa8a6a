"""The solver of all rows at once: against direct solves, in float32 and with bfloat16 products."""

import pytest
import torch

from obr.errors import ObrError
from obr.methods import conjugate_gradient, row_products
from obr.runtime import processor

ROWS, COLUMNS = 40, 96


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def products(request, monkeypatch):
    monkeypatch.setattr(conjugate_gradient, "product_dtype", lambda device: request.param)
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
    image = conjugate_gradient.images_on_support(matrix, target, support, tolerance=1e-3)
    expected = direct(matrix, target, support)
    assert ((image - target) * support).norm() < 2e-3 * target.norm()
    assert (image - expected).norm() < 0.01 * expected.norm()
    assert not image[3].any() and not image[5].any()


def test_tighter_tolerance_comes_closer():
    matrix, target, support = problem()
    expected = direct(matrix, target, support)
    errors = [
        float((conjugate_gradient.images_on_support(matrix, target, support, t) - expected).norm())
        for t in (0.1, 1e-2, 1e-3)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_a_row_does_not_depend_on_the_rows_beside_it(products, monkeypatch):
    """Not on how soon they converge either, nor on whether bfloat16 suffices for them."""
    monkeypatch.setattr(conjugate_gradient, "LOW_ITERATIONS", 8)  # not enough for some of the rows
    matrix, target, support = problem()
    whole = conjugate_gradient.images_on_support(matrix, target, support)
    for some in (slice(0, 1), slice(7, 20), torch.arange(ROWS).flip(0)):
        assert torch.equal(conjugate_gradient.images_on_support(matrix, target[some], support[some]), whole[some])
    monkeypatch.setitem(row_products.PART, "cpu", 16)
    parted = conjugate_gradient.images_on_support(matrix, target, support)
    assert torch.equal(conjugate_gradient.images_on_support(matrix, target[17:18], support[17:18]), parted[17:18])
    assert (whole - parted).norm() < 5e-3 * whole.norm()


def test_rows_that_bfloat16_does_not_suffice_for_go_on_in_float32(monkeypatch):
    monkeypatch.setattr(conjugate_gradient, "product_dtype", lambda device: torch.bfloat16)
    matrix, target, support = problem()
    expected, again = direct(matrix, target, support), []
    monkeypatch.setattr(
        conjugate_gradient,
        "_in_full",
        lambda *given, of=conjugate_gradient._in_full: again.append(given[2]) or of(*given),
    )
    for iterations in (1, 8, 30):
        monkeypatch.setattr(conjugate_gradient, "LOW_ITERATIONS", iterations)
        image = conjugate_gradient.images_on_support(matrix, target, support, tolerance=1e-3)
        assert (image - expected).norm() < 0.01 * expected.norm()
    assert int(again[0].sum()) > int(again[1].sum()) > 0 and len(again) == 2


def test_a_row_whose_exact_residual_is_larger_than_its_running_one_goes_on_in_float32(monkeypatch):
    monkeypatch.setattr(conjugate_gradient, "product_dtype", lambda device: torch.bfloat16)
    matrix, target, support = problem()
    expected, again = direct(matrix, target, support), []
    renew, in_full = conjugate_gradient._Systems.renew, conjugate_gradient._in_full

    def renewed(systems, among=None):
        residuals = renew(systems, among)
        residuals[7] = 2 * conjugate_gradient.RENEW
        return residuals

    monkeypatch.setattr(conjugate_gradient._Systems, "renew", renewed)
    monkeypatch.setattr(conjugate_gradient, "_in_full", lambda *given: again.append(given[2]) or in_full(*given))
    image = conjugate_gradient.images_on_support(matrix, target, support, tolerance=1e-3)
    assert (image - expected).norm() < 0.01 * expected.norm()
    assert [rows.nonzero()[:, 0].tolist() for rows in again] == [[7]]


def test_hopeless_systems_are_reported(products, monkeypatch):
    monkeypatch.setattr(conjugate_gradient, "MAX_ITERATIONS", 10)
    with pytest.raises(ObrError, match="not converged in 10 iterations; use a larger damp"):
        conjugate_gradient.images_on_support(*problem(condition=1e6))


def test_the_dtype_of_products_is_what_the_cpu_has_or_what_is_asked_for(monkeypatch):
    monkeypatch.delenv(processor.VARIABLE, raising=False)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert processor.product_dtype("cpu") == (torch.bfloat16 if native else torch.float32)
    for name, dtype in processor.PRODUCTS.items():
        monkeypatch.setenv(processor.VARIABLE, name)
        assert processor.product_dtype("cpu") == dtype and processor.description("cpu")["products"] == name
    monkeypatch.setattr(processor, "_required", "float32")
    assert processor.product_dtype("cpu") == torch.float32  # a checkpoint's own, whatever the variable says
    monkeypatch.setattr(processor, "_required", None)
    monkeypatch.setenv(processor.VARIABLE, "half")
    with pytest.raises(ObrError, match="OBR_PRODUCTS is 'half'; set it to float32 or bfloat16, or unset it"):
        processor.product_dtype("cpu")
