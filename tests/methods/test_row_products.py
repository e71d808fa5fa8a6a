"""A row's result does not depend on the rows beside it, nor on its place among them: compared to the last bit."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.layer_samples import golden, layer
from obr.calibration.asymmetric import shifted
from obr.methods import row_products
from obr.methods.grid import Grid
from obr.methods.layer_hessian import Hessian
from obr.methods.restore import restore, restore_together

# Methods that treat rows one by one: not those that rank weights over all rows of a layer.
OPTIONS = [
    {"method": "rtn"},
    {"method": "rtn", "bits": 3, "group": 16},
    {"method": "gptq"},
    {"method": "gptq", "bits": 3, "group": 16},
    {"method": "gptq", "refit": True},
    {"method": "gptq", "bits": 3, "group": 16, "refit": True},
    {"method": "wanda", "pattern": "2:4"},
    {"method": "magnitude"},
    {"method": "sparsegpt_gptq", "pattern": "4:8"},
    {"method": "obr_rtn"},
    {"method": "obr_gptq"},
    {"method": "obr_gptq", "bits": 16},
    {"method": "obr_gptq", "pattern": "paired 4:8", "alpha": 0.25},
    {"method": "joint", "sweeps": 6},
    {"method": "joint", "sweeps": 6, "bits": 16},
    {"method": "joint", "sweeps": 6, "pattern": "2:4"},
]


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same(one, other, some=slice(None)) -> bool:
    """Whether layers are equal to the last bit, `other` in the rows `some`."""
    pairs = ((getattr(one, part), getattr(other, part)) for part in ("weight", "mask", "codes", "scale"))
    return all(a is b is None or torch.equal(a, b[some]) for a, b in pairs)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns, outputs", [(64, 64), (576, 576), (100, 333), (1536, 96), (128, 900)])
def test_a_row_of_a_product_does_not_depend_on_the_others(columns, outputs, dtype, count):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(row_products.PART["cpu"] + 70, columns, generator=generator).to(dtype)
    matrix = torch.randn(columns, outputs, generator=generator).to(dtype)
    with threads(count):
        whole = row_products.product(x, matrix)
        order = torch.randperm(len(x), generator=generator)
        assert torch.equal(row_products.product(x[order], matrix), whole[order])
        for some in (slice(0, 1), slice(3, 5), slice(100, 137), slice(190, None)):
            assert torch.equal(row_products.product(x[some], matrix), whole[some])
    assert torch.allclose(whole.float(), x.float() @ matrix.float(), rtol=0.02, atol=0.02 * columns**0.5)


@pytest.mark.slow
@given(
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 99),
    count=st.integers(2, 24),
    some=st.lists(st.integers(0, 23), min_size=1, max_size=6),
    columns=st.sampled_from([32, 72, 200]),
    number=st.integers(1, 3),
)
@settings(deadline=None, max_examples=60)
def test_a_row_of_a_layer_does_not_depend_on_the_others(options, seed, count, some, columns, number):
    """Restored alone, in another order, or together with other layers."""
    weight, matrix = layer(count, columns, seed)
    other, _ = layer(7, columns, seed + 1)
    some, shared = torch.tensor([i % count for i in some]), Hessian(matrix)
    with threads(number):
        whole = restore(weight, shared, **options)
        assert same(restore(weight[some], shared, **options), whole, some)
        together = restore_together({"other": other, "one": weight}, shared, options)
    assert same(together["one"], whole)


@pytest.mark.parametrize(
    "options", OPTIONS[2:3] + OPTIONS[9:11] + OPTIONS[13:14], ids=lambda options: options["method"]
)
@pytest.mark.parametrize("name", ["up_proj_512", "down_proj_1024", "o_proj_512_unrotated"])
def test_a_row_of_a_real_layer_does_not_depend_on_the_others(real_data, name, options):
    _, weight, matrix, _ = golden(real_data / "golden" / f"{name}.npz")
    shared, some = Hessian(matrix), torch.tensor([30, 5, 6, 17])
    whole = restore(weight, shared, **options)
    assert same(restore(weight[some], shared, **options), whole, some)


@pytest.mark.parametrize("columns", [70, 128, 300])
def test_a_rows_clip_search_does_not_depend_on_the_others(columns):
    """Of rows whose candidates come near each other, and are looked at together."""
    weight, _ = layer(70, columns)
    weight[::3] = (weight[::3] * 3).round()  # many equal errors
    whole = Grid.fit(weight, 3).scale
    for some in (slice(69, 70), slice(5, 40), torch.arange(70).flip(0)):
        assert torch.equal(Grid.fit(weight[some], 3).scale, whole[some])


def test_a_rows_target_does_not_depend_on_the_others():
    weight, matrix = layer(9, 96)
    drift, hessian = layer(96, 96, 1)[0], Hessian(matrix)
    whole = shifted(weight, drift, hessian, 0.5)
    assert torch.equal(shifted(weight[2:4], drift, hessian, 0.5), whole[2:4])
