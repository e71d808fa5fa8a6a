"""Half precision: constants of online transforms and of models are not rounded to it."""

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, LlamaConfig

import obr
from helpers.family_models import TOKENS, random_model
from obr.config.quantizer import QuantizerSettings
from obr.config.recipe import Recipe
from obr.models.blocks import Blocks, StreamedBlocks
from obr.models.fake_quant import fake_quantize
from obr.models.hadamard import Kronecker, block_hadamard, hadamard, known_hadamard, sylvester
from obr.models.layers import set_quantizers
from obr.models.online_transforms import Range, Shift
from obr.rotations.flatquant import random_invertible

WIDTHS = (14336, 28672, 18944, 11008, 13824, 8960, 17920, 27648)  # of down_proj's inputs
HEADS = (28, 40, 52, 12)
HALF = (torch.bfloat16, torch.float16)
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
ONCE = 0.45  # of EPSILON: the relative error that one rounding to nearest leaves, root mean square


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def over_heads(count: int) -> Kronecker:
    return Kronecker([*hadamard(count, seeded()).factors(), 128])


def errors(transform: Kronecker, dtype: torch.dtype) -> tuple[float, float]:
    """(mean error of the scale, root mean square error over that of the output) for random activations."""
    x = torch.randn(max(16, 200_000 // transform.columns), transform.columns, generator=seeded(1)).to(dtype)
    transform.precision = torch.float64
    exact = transform(x.double())
    stored = transform.held_in(torch.float32)  # as in a block
    stored.precision = None
    found = stored(x)
    assert found.dtype == dtype
    found = found.double()
    return float((found * exact).sum() / exact.square().sum()) - 1, float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("size", [*WIDTHS, *(f"{count} heads" for count in HEADS)])
def test_online_hadamard_matrices_leave_no_error_of_scale(size, dtype):
    transform = hadamard(size, seeded()) if isinstance(size, int) else over_heads(int(size.split()[0]))
    scale, error = errors(transform, dtype)
    assert abs(scale) < 5e-5
    assert error < 1.4142 * 1.01 * ONCE * EPSILON[dtype]  # two roundings: 2.4e-3 in bfloat16


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "transform",
    [
        over_heads(9), over_heads(14), hadamard(231 * 128, seeded()), hadamard(4096, seeded()),
        block_hadamard(1536, 64), Kronecker([random_invertible(64, seeded()), random_invertible(86, seeded())]),
        Kronecker([known_hadamard(28), known_hadamard(12)]),
    ],
    ids=["9 heads", "14 heads", "29568", "4096", "blocks of 64", "FlatQuant", "two matrices of ±1"],
)  # fmt: skip
def test_composite_factors_are_multiplied_in_float32(transform, dtype):
    scale, error = errors(transform, dtype)
    assert abs(scale) < 5e-5 and error < 1.02 * ONCE * EPSILON[dtype]


@pytest.mark.parametrize("columns, order", [(14336, 28), (11008, 172), (40, 20)])
def test_half_precision_transform_equals_released_formula(columns, order):
    """The power-of-two part times 1/√n in float32, rounded; then the product with the matrix of ±1."""
    transform = hadamard(columns, seeded()).held_in(torch.float32)
    transform.precision = None
    x = torch.randn(8, columns, generator=seeded(2)).bfloat16()
    power = columns // order
    inner = (x.double().view(8, order, power) @ sylvester(power).mul(order**-0.5)).float().bfloat16()
    signs = known_hadamard(order).sign()
    expected = (signs @ inner.double()).view(8, columns)
    difference = (transform(x).double() - expected).abs()
    assert float((difference > 2**-7 * expected.abs() + 1e-3).double().mean()) < 1e-3  # other roundings of `inner`
    assert float(difference.norm() / expected.norm()) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("columns", [14336, 28, 231 * 128, 1536])
def test_wide_precision_is_the_product_of_the_stored_factors_to_the_last_bit(columns, dtype):
    transform = hadamard(columns, seeded()).held_in(torch.float32)
    x = torch.randn(4, columns, generator=seeded(3)).to(dtype)
    work = x.to(torch.promote_types(dtype, torch.float32)).reshape(-1, *transform.sizes)
    for axis, factor in enumerate(transform.factors(), start=1):
        factor = factor.to(work)
        if axis == work.ndim - 1:
            work = work @ factor.T
        else:
            work = factor @ work if work.ndim == 3 else (work.movedim(axis, -1) @ factor.T).movedim(-1, axis)
    assert torch.equal(transform(x), work.reshape(x.shape).to(dtype))


def test_transforms_of_checkpoints_are_stored_as_normalised_factors():
    """The format: a file written by hand from the formula is read with the same meaning."""
    factors = [known_hadamard(12).sign() / 12**0.5, sylvester(128)]
    tensors = {f"t.factor{i}": factor.float() for i, factor in enumerate(factors)}
    read = Kronecker.from_spec({"sizes": [12, 128], "dense": [True, True], "signs": False}, tensors, "t.")
    made = hadamard(1536, seeded()).held_in(torch.float32)
    assert made.spec() == read.spec() and made.state_dict().keys() == read.state_dict().keys()
    read.precision = made.precision = None
    x = torch.randn(4, 1536, generator=seeded()).bfloat16()
    assert torch.equal(read(x), made(x))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_cuda_transform_gives_the_same_scale(dtype, monkeypatch):
    """The optional kernel, in whose place its definition stands here, takes the last Sylvester factor."""
    x = torch.randn(64, 14336, generator=seeded()).to(dtype)
    transform = hadamard(14336, seeded()).held_in(torch.float32)
    transform.precision = None
    dense = transform(x)
    called = []

    def kernel(values, scale=1.0):
        called.append(values.dtype)
        n = values.shape[-1]
        return values @ (sylvester(n) * n**0.5).to(values) * scale

    monkeypatch.setattr(Kronecker, "_fast_transform", lambda self, values: kernel)
    fast = transform(x)
    assert called == [torch.float32]
    assert float((fast.double() * dense).sum() / dense.double().square().sum()) == pytest.approx(1, abs=1e-5)


def test_queries_and_keys_are_transformed_in_float32_whatever_online_says():
    config = LlamaConfig(hidden_size=96, intermediate_size=192, num_attention_heads=4)
    model = obr.rotate(random_model(config), "quarot")
    blocks = Blocks(model)
    for online, expected in (("model", torch.float32), ("float32", torch.float32), ("float64", torch.float64)):
        block = blocks.load(0)
        set_quantizers(block, blocks.layout, Recipe.parse({"method": "rtn", "online": online}))
        assert block.self_attn.key_value_quantizer.transform.precision == expected
        assert block.mlp.down_proj.transform.precision == (None if online == "model" else expected)


def test_offsets_are_subtracted_exactly():
    offset = 3.0078  # half-way between 3 and 3.0156, its neighbours in bfloat16
    x = torch.randn(500, 64, generator=seeded()).bfloat16()
    expected = (x.double() - offset).bfloat16()
    assert (Shift(torch.full((64,), offset))(x) == expected).double().mean() > 0.999


def quantised_in_its_dtype(x: torch.Tensor, settings: QuantizerSettings) -> torch.Tensor:
    """The formulas of `fake_quantize` with every intermediate result in the dtype of x."""
    values = x.unflatten(-1, (-1, settings.group_size or x.shape[-1]))
    levels = 2 ** (settings.bits - settings.symmetric) - 1
    if settings.symmetric:
        scale = values.abs().amax(-1, keepdim=True) / levels
        return ((values / scale).round() * scale).flatten(-2)
    low, high = values.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / levels
    zero = (-low / scale).round()
    return (((values / scale).round() + zero).clamp(0, levels) - zero).mul(scale).flatten(-2)


@pytest.mark.parametrize(
    "settings, least, most",
    [
        (QuantizerSettings(4), 0.999, 1.001),
        (QuantizerSettings(4, symmetric=False, group_size=128), 0.999, 1.001),
        (QuantizerSettings(8), 1.02, 1.03),
        (QuantizerSettings(8, symmetric=False, group_size=128), 1.09, 1.12),
    ],
)
def test_quantisers_compute_in_float32(settings, least, most):
    """Errors of bfloat16 arithmetic relative to float32, as in docs/explanation/differences-from-the-paper.md."""
    x = torch.randn(256, 4096, generator=seeded()).bfloat16()
    ours, theirs = (
        float((quantise(x, settings).double() - x.double()).norm())
        for quantise in (fake_quantize, quantised_in_its_dtype)
    )
    assert least < theirs / ours < most


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)])
def test_casting_a_model_rounds_no_constant(cast):
    transform = hadamard(28 * 64, seeded()).held_in(torch.float32)
    factors = [factor.clone() for factor in transform.factors()]
    shift, bounds = Shift(torch.tensor([0.1])), Range(torch.tensor([0.9]), torch.tensor([0.8]))
    cast(nn.ModuleList([transform, shift, bounds, nn.Linear(2, 2)]))
    assert all(torch.equal(now, then) for now, then in zip(transform.factors(), factors, strict=True))
    assert shift.offset.dtype == bounds.low.dtype == bounds.high.dtype == torch.float32


def test_gemmas_constant_is_the_same_streamed_and_whole(tmp_path):
    """√96 is 9.798, in bfloat16 9.8125."""
    config = GemmaConfig(
        hidden_size=96, intermediate_size=96, num_attention_heads=4, num_key_value_heads=1, head_dim=32
    )
    random_model(config, torch.bfloat16).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        streamed, _ = StreamedBlocks(tmp_path, None, dtype, "cpu").embed(TOKENS)
        whole = StreamedBlocks(tmp_path, None, dtype, "cpu").whole().model.embed_tokens(TOKENS)
        assert torch.equal(torch.cat(list(streamed)), whole)
