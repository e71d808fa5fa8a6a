"""What restoring a layer holds at once is counted, and is what plans say; results do not depend on what is reused."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.live_bytes import peak_bytes
from obr.config.methods import METHODS, Method
from obr.errors import ObrError
from obr.methods import conjugate_gradient, grid, joint, row_products
from obr.methods.layer_hessian import Hessian
from obr.methods.restore import restore
from obr.models.architectures import Dimensions
from obr.planning import memory, tensor_sizes
from obr.rotations import fold, registry

COLUMNS, ROWS, PART = 1024, 292, 73  # as 28,672 columns, 8,192 rows, and parts of 2,048
RECIPES = [
    ("rtn", {}),
    ("gptq", {}),
    ("gptq", {"group": 128}),
    ("gptq", {"column_order": "hessian"}),
    ("gptq", {"group": 128, "column_order": "hessian"}),
    ("sparsegpt_gptq", {"sparsity": 0.5}),
    ("sparsegpt_gptq", {"sparsity": 0.5, "column_order": "hessian"}),
    ("obr_rtn", {"sparsity": 0.5}),
    ("obr_gptq", {"sparsity": 0.5}),
    ("obr_gptq", {"sparsity": 0.5, "column_order": "hessian"}),
    ("sparsegpt_then_gptq", {"sparsity": 0.5}),
    ("joint", {"sparsity": 0.5, "sweeps": 1}),
    ("joint", {"sparsity": 0.0, "sweeps": 1}),
    ("joint", {"sparsity": 0.5, "sweeps": 1, "group": 128}),
]


def layer(rows: int, columns: int):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    matrix = inputs.T @ inputs / columns
    return torch.randn(rows, columns, generator=generator), (matrix + matrix.T) / 2


@pytest.mark.parametrize("method, options", RECIPES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_method_holds_as_much_as_plans_say(method, options, monkeypatch):
    """With products in bfloat16, as on a GPU, and in parts as small, beside the layer, as a GPU's."""
    for module in (conjugate_gradient, joint):
        monkeypatch.setattr(module, "product_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(conjugate_gradient, "SCALED_ROWS", 32)
    monkeypatch.setattr(grid, "_CHECKED_ROWS", 16)
    monkeypatch.setitem(row_products.PART, "cpu", PART)
    weight, hessian = layer(ROWS, COLUMNS)
    counted = peak_bytes(lambda: restore(weight, hessian, method, bits=4, **options)) + 4 * COLUMNS**2
    solver = memory.solver_of(method, "group" in options)
    planned = memory.solver_bytes(solver, ROWS, COLUMNS, PART, "column_order" in options)
    assert 0.75 * planned < counted < 1.03 * planned


def test_a_solver_that_plans_do_not_know_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(METHODS, "new", Method("New", "1", "new", solver="obr"))
    assert memory.solver_of("new") == memory.solver_of("obr_rtn") == "obr"
    monkeypatch.setitem(METHODS, "new", Method("New", "1", "new", solver="newton"))
    with pytest.raises(ObrError, match="Method 'new' has the solver 'newton', which plans have no memory for"):
        memory.solver_of("new")
    with pytest.raises(TypeError, match="solver"):
        Method("New", "1", "new")


def ends_of(vocabulary: int, is_tied: bool) -> nn.Module:
    """A model of nothing but the ends, of random numbers in float32."""
    torch.manual_seed(0)
    model = nn.Module()
    model.embed, model.norm = nn.Embedding(vocabulary, 64), nn.LayerNorm(64, bias=False)
    model.head = nn.Linear(64, vocabulary, bias=False)
    nn.init.normal_(model.norm.weight)
    if is_tied:
        model.head.weight = model.embed.weight
    model.config = SimpleNamespace(tie_word_embeddings=is_tied)
    return model.requires_grad_(False)


@pytest.mark.parametrize("is_tied", [True, False])
def test_rotating_the_ends_holds_as_much_as_plans_say_and_is_the_same_in_parts(is_tied, monkeypatch):
    vocabulary, part = 5000, 64 * 333
    layout = SimpleNamespace(embed="embed", head="head", final_norm="norm", norm_offset=0.0)
    sizes = tensor_sizes.Sizes(64, 128, 64, 64, 2, vocabulary)
    rotation = registry.draw("quarot", Dimensions(64, 128, 4, 4, 16, 2), 0)
    models = []

    def rotated() -> None:
        models.append(ends_of(vocabulary, is_tied))
        rotation.fold_ends(models[-1], layout)

    whole = peak_bytes(rotated)
    assert 0.75 * memory.reading_ends(sizes) < whole < 1.03 * memory.reading_ends(sizes)
    monkeypatch.setattr(fold, "END_PART", part)
    monkeypatch.setattr(memory, "END_PART", part)
    counted = peak_bytes(rotated)
    assert 0.75 * memory.reading_ends(sizes) < counted < 1.03 * memory.reading_ends(sizes)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert models[1].head.weight is not models[1].embed.weight


def test_the_largest_layer_of_a_70b_model_fits_24_gb():
    for vocabulary in (32000, 128256):
        sizes = tensor_sizes.Sizes(8192, 28672, 8192, 1024, 80, vocabulary)
        for method in ("gptq", "sparsegpt_gptq", "obr_rtn", "obr_gptq"):
            assert memory.compressing(sizes, method, 2048, on_gpu=True) < 24e9


def test_factors_are_made_in_place_and_are_the_same():
    _, matrix = layer(4, 200)
    apart, alone = Hessian(matrix), Hessian(matrix)
    inverse = apart.inverse
    expected = torch.cholesky_inverse(torch.linalg.cholesky(apart.damped()))
    assert torch.equal(inverse, expected)
    factor = torch.linalg.cholesky_ex(expected, upper=True)[0]
    assert torch.equal(apart.factor(), factor) and torch.equal(alone.factor(), factor)
    assert torch.equal(apart.inverse, expected), "the inverse was asked for, and must stay"
    assert torch.equal(apart.matrix, matrix) and torch.equal(alone.inverse, expected)
    tail = torch.cholesky_inverse(torch.linalg.cholesky(apart.damped(64)))
    assert torch.equal(apart.tail_inverse(64), tail)
    assert torch.allclose(apart.factor(64), factor[64:, 64:], atol=1e-4)
