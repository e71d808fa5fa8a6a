"""Triton kernels: whole numbers exact in every layout, width and batch, by Triton's interpreter or on a device.

`make test-triton` installs Triton and runs them; without it they skip, all but those of the layout.
"""

import importlib.util
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obr.config.pattern import Pattern
from obr.config.quantizer import QuantizerSettings
from obr.errors import ObrError
from obr.kernels import gpu
from obr.kernels.gpu import layout, product
from obr.models.fake_quant import fake_quantize

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed; run make test-triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERNS = ("dense", "unstructured", "2:4", "4:8", "8:16", "paired 4:8", "1:4", "1:2", "3:5")
SYMMETRIC, ASYMMETRIC = QuantizerSettings(bits=8), QuantizerSettings(bits=8, symmetric=False)


def drawn(pattern: str, rows: int, columns: int, seed: int, bits: int = 4, kept: float = 0.5):
    """Codes, mask and pattern of a random layer; extreme codes are frequent, rows differ in their zeros."""
    generator, half = torch.Generator().manual_seed(seed), 2 ** (bits - 1)
    codes = torch.randint(-3 * half // 2, 3 * half // 2, (rows, columns), generator=generator).clamp(-half, half - 1)
    if pattern == "dense":
        return codes.to(torch.int8), None, None
    if pattern == "unstructured":
        share = kept + 0.3 * (torch.rand(rows, 1, generator=generator) - 0.5)
        return codes.to(torch.int8), torch.rand(rows, columns, generator=generator) < share, None
    parsed = Pattern.parse(pattern)
    chosen, units = parsed.units
    groups = torch.rand(rows * columns // parsed.group, units, generator=generator).argsort(1) < chosen
    mask = groups.repeat_interleave(parsed.group // units, 1).reshape(rows, columns)
    return codes.to(torch.int8), mask, parsed


def fitted(pattern: str, width: int) -> int:
    """The next width that the pattern divides."""
    return width if pattern in ("dense", "unstructured") else -width % Pattern.parse(pattern).group + width


def packed(codes, mask, pattern, bits, group, scale=None):
    groups = 1 if group is None else -(-codes.shape[1] // group)
    scale = torch.ones(len(codes), groups) if scale is None else scale
    return layout.Weight.pack(codes, scale, mask, pattern, bits, group).to(DEVICE)


def dense(codes, mask) -> torch.Tensor:
    return (codes if mask is None else codes * mask).double()


def whole_tokens(tokens: int, columns: int, activations: QuantizerSettings, seed: int) -> product.Tokens:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    rounded = product.quantize(x, activations)
    return product.Tokens(rounded.values.to(DEVICE), torch.ones(tokens, device=DEVICE))


layers = {
    "pattern": st.sampled_from(PATTERNS),
    "rows": st.integers(1, 10),
    "width": st.integers(1, 100),
    "bits": st.sampled_from([2, 3, 4]),
    "group": st.sampled_from([None, None, 1, 16, 20, 32, 48, 128]),
    "kept": st.sampled_from([0.0, 0.2, 0.5, 0.9]),
    "seed": st.integers(0, 99),
}


@needs_triton
@pytest.mark.slow
@given(tokens=st.one_of(st.just(1), st.integers(2, 16), st.integers(17, 40)), blocks=st.booleans(), **layers)
@settings(deadline=None, max_examples=30)
def test_products_with_floats_and_whole_numbers_are_exact(
    pattern, rows, width, bits, group, kept, seed, tokens, blocks
):
    """Scales of one: every sum is a whole number that float32 holds. Blocks of two words or the default's."""
    columns = fitted(pattern, width)
    codes, mask, parsed = drawn(pattern, rows, columns, seed, bits, kept)
    weight = packed(codes, mask, parsed, bits, group)
    x = torch.randint(-9, 10, (tokens, columns), generator=torch.Generator().manual_seed(seed)).float().to(DEVICE)
    sizes = {name: (4 if name != "few_tokens" else 16, 4, 4) for name in product.BLOCKS}
    with pytest.MonkeyPatch.context() as patch:
        if blocks:
            patch.setattr(product, "BLOCKS", sizes)
        out = product.multiply(weight, x)
        assert torch.equal(out.cpu().double(), x.cpu().double() @ dense(codes, mask).T)
        for activations in (SYMMETRIC, ASYMMETRIC):
            whole = whole_tokens(tokens, columns, activations, seed)
            found = product.multiply(weight, whole, torch.full((rows,), 0.5, device=DEVICE))
            assert torch.equal(found.cpu().double(), whole.values.cpu().double() @ dense(codes, mask).T + 0.5)


@needs_triton
@pytest.mark.slow
@given(dtype=st.sampled_from(product.DTYPES), first=st.integers(0, 9), **layers)
@settings(deadline=None, max_examples=20)
def test_unpacked_rows_are_codes_times_scales(pattern, rows, width, bits, group, kept, seed, dtype, first):
    columns, first = fitted(pattern, width), min(first, rows - 1)
    codes, mask, parsed = drawn(pattern, rows, columns, seed, bits, kept)
    groups = 1 if group is None else -(-columns // group)
    scale = torch.rand(rows, groups, generator=torch.Generator().manual_seed(seed)) + 0.1
    weight = packed(codes, mask, parsed, bits, group, scale)
    per_column = weight.scale.cpu().float().repeat_interleave(group or columns, 1)[:, :columns]
    found = product.unpacked(weight, dtype, first).cpu()
    exact = (dense(codes, mask).float() * per_column)[first:]
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts off where a device rounds
        assert ((found.float() - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()
    else:
        assert torch.equal(found, exact.to(dtype))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("pattern", ["dense", "unstructured", "8:16", "paired 4:8"])
def test_wide_layers_at_the_ends_of_their_ranges(pattern, group, tokens):
    """Several blocks of words; codes of -8 and 7 by tokens of -128 and 127; scales in the products."""
    rows, columns = 17, 512 + 256 + 80
    codes, mask, parsed = drawn(pattern, rows, columns, seed=1)
    codes = (codes.sign() * 8).clamp(-8, 7).to(torch.int8)
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(rows, 1 if group is None else -(-columns // group), generator=generator) + 0.1
    weight = packed(codes, mask, parsed, 4, group, scale)
    values = (torch.randn(tokens, columns, generator=generator).sign() * 128).clamp(-128, 127).to(torch.int8)
    x_scale = torch.rand(tokens, generator=generator) + 0.1
    per_column = weight.scale.cpu().double().repeat_interleave(group or columns, 1)[:, :columns]
    exact = values.double() @ (dense(codes, mask) * per_column).T * x_scale.double()[:, None]
    found = product.multiply(weight, product.Tokens(values.to(DEVICE), x_scale.to(DEVICE)))
    assert (found.cpu().double() - exact).abs().max() <= 1e-6 * exact.abs().max()
    # Triton's interpreter multiplies matrices of bfloat16 as if their bits were whole numbers.
    for dtype in (torch.float16, torch.bfloat16) if DEVICE == "cuda" or tokens == 1 else (torch.float16,):
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        exact = x.double() @ (dense(codes, mask) * per_column).T
        found = product.multiply(weight, x.to(DEVICE))
        assert found.dtype == dtype
        assert (found.cpu().double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_expansion_moves_each_code_to_its_column():
    """All 256 masks, in words of 2, 3 and 4 bits: the kept fields in order, zeros elsewhere; garbage is dropped."""
    for bits in (2, 3, 4):
        table, field = layout.controls(bits, "cpu").long() & 0xFFFFFFFF, 2**bits - 1
        low = (1 << (4 * bits)) - 1
        for mask in range(256):
            word = sum((j % field + 1) << (bits * j) for j in range(8))  # no field is zero
            moves = [int(table[0, mask]) & ~low, int(table[1, mask]), int(table[2, mask])]
            for step, move in zip(layout.STEPS, moves, strict=True):
                word = (word & ~move) | ((word << (step * bits)) & move)
            word &= int(table[3, mask])
            chosen = [j for j in range(8) if mask >> j & 1]
            assert word == sum((rank % field + 1) << (bits * j) for rank, j in enumerate(chosen))
            assert int(table[0, mask]) & 15 == len(chosen)


@pytest.mark.parametrize(
    ("pattern", "bits", "name", "expected"),
    [
        ("dense", 4, "dense", 4.0),
        ("dense", 3, "dense", 3.0),
        ("dense", 2, "dense", 2.0),
        ("unstructured", 4, "bitmask", 3.0),
        ("unstructured", 3, "bitmask", 2.5),
        ("8:16", 4, "8:16", 2.875),
        ("4:8", 4, "4:8", 2.875),
        ("2:4", 4, "2:4", 2.75),
        ("paired 4:8", 4, "paired 4:8", 2.375),
        ("1:4", 4, "1:4", 1.5),
        ("3:5", 4, "bitmask", 3.4),
    ],
)
def test_stored_bits_per_weight_match_formula(pattern, bits, name, expected):
    """What codes and masks take, and at most 0.03 more for scales, places and the ends of rows."""
    rows, columns = 256, fitted(pattern, 4096)
    codes, mask, parsed = drawn(pattern, rows, columns, 0, bits)
    if pattern == "unstructured":
        mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)).argsort(1) < columns // 2
    weight = packed(codes, mask, parsed, bits, None)
    assert weight.layout == name
    assert expected < weight.bits_per_weight < expected + 0.03
    grouped = packed(codes, mask, parsed, bits, 128)
    assert grouped.layout == name and grouped.scale.dtype == torch.float16


@pytest.mark.parametrize("activations", [SYMMETRIC, ASYMMETRIC, QuantizerSettings(bits=4, clip_ratio=0.9)])
@pytest.mark.parametrize("learned", [False, True])
def test_tokens_are_rounded_as_in_simulation(activations, learned):
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-4], [1], [30], [0], [7]])
    bounds = None
    if learned:
        activations = QuantizerSettings(activations.bits, activations.symmetric, None, "learned")
        bounds = type("Bounds", (), {"low": torch.tensor([0.83]), "high": torch.tensor([0.71])})
    assert torch.equal(product.quantize(x, activations, bounds).floats, fake_quantize(x, activations, bounds))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.full((8, 64), 8)}, "to 8 are not 4-bit"),
        ({"bits": 8}, "Weights of 8 bits"),
        ({"bits": 2}, "are not 2-bit"),
        ({"pattern": Pattern.parse("2:4")}, "not of pattern 2:4"),
        ({"pattern": Pattern.parse("paired 4:8")}, "not of pattern paired 4:8"),
    ],
)
def test_invalid_weights_are_named(change, message):
    codes, mask, _ = drawn("unstructured", 8, 64, 0)
    with pytest.raises(ObrError, match=message):
        layout.Weight.pack(**({"codes": codes, "scale": torch.ones(8, 1), "mask": mask} | change))


def test_invalid_tokens_and_a_missing_triton_are_named(monkeypatch):
    weight = layout.Weight.pack(*drawn("dense", 8, 64, 0)[:1], torch.ones(8, 1))
    with pytest.raises(ObrError, match="128 channels do not fit a weight of 64"):
        product.multiply(weight, torch.ones(1, 128))
    with pytest.raises(ObrError, match=r"torch\.float64 have no packed kernel"):
        product.multiply(weight, torch.ones(1, 64).double())
    with pytest.raises(ObrError, match="on meta cannot meet packed weights on cpu"):
        product.multiply(weight, torch.ones(1, 64, device="meta"))
    for settings_ in (QuantizerSettings(bits=9), QuantizerSettings(bits=8, group_size=32)):
        with pytest.raises(ObrError, match="one scale a token"):
            product.quantize(torch.ones(1, 64), settings_)
    monkeypatch.setitem(sys.modules, "obr.kernels.gpu.programs", None)
    monkeypatch.delattr(gpu, "programs", raising=False)
    product.programs.cache_clear()
    with pytest.raises(ObrError, match=r"need Triton .*obr\[triton\]"):
        product.multiply(weight, torch.ones(1, 64))
    assert product.multiply(weight, torch.ones(0, 64)).shape == (0, 8)


def test_weights_that_were_moved_off_the_gpu_are_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = layout.Weight.pack(*drawn("dense", 8, 64, 0)[:1], torch.ones(8, 1))
    for tokens in (1, 20):
        with pytest.raises(ObrError, match="are on cpu; move the model back to the GPU"):
            product.multiply(weight, torch.ones(tokens, 64))
