"""4-bit kernels: whole numbers exact in every layout, shape and level of instructions; scales; sizes; mistakes."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obr.config.pattern import Pattern
from obr.config.quantizer import QuantizerSettings
from obr.errors import ObrError
from obr.kernels.int4 import packed_weight
from obr.models.fake_quant import fake_quantize
from obr.runtime import compiler

PATTERNS = ("dense", "unstructured", "2:4", "4:8", "8:16", "paired 4:8", "1:4")
ACTIVATIONS = (
    QuantizerSettings(bits=8),
    QuantizerSettings(bits=4, clip_ratio=0.9),
    QuantizerSettings(bits=4, symmetric=False),
    QuantizerSettings(bits=8, symmetric=False, clip_ratio=0.95),
    QuantizerSettings(bits=2),
)


def drawn(pattern: str, rows: int, columns: int, seed: int, kept: float = 0.5):
    """Codes, scale, mask and pattern of a random layer; extreme codes are frequent, rows differ in their zeros."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-12, 12, (rows, columns), generator=generator).clamp(-8, 7).to(torch.int8)
    scale = torch.rand(rows, 1, generator=generator) + 0.1
    if pattern == "dense":
        return codes, scale, None, None
    if pattern == "unstructured":
        share = kept + 0.3 * (torch.rand(rows, 1, generator=generator) - 0.5)
        return codes, scale, torch.rand(rows, columns, generator=generator) < share, None
    parsed = Pattern.parse(pattern)
    chosen, units = parsed.units
    groups = torch.rand(rows * columns // parsed.group, units, generator=generator).argsort(1) < chosen
    mask = groups.repeat_interleave(parsed.group // units, 1).reshape(rows, columns)
    return codes, scale, mask, parsed


def tokens_of(tokens: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    return x * 10 ** torch.randint(-3, 4, (tokens, 1), generator=generator)


@pytest.mark.parametrize("level", packed_weight.levels())
@given(
    pattern=st.sampled_from(PATTERNS),
    rows=st.integers(1, 40),
    width=st.integers(1, 480),
    tokens=st.one_of(st.integers(1, 9), st.integers(10, 70), st.integers(71, 512)),
    threads=st.integers(1, 3),
    activations=st.sampled_from(ACTIVATIONS),
    kept=st.sampled_from([0.0, 0.2, 0.5, 0.9]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_integer_products_are_exact(level, pattern, rows, width, tokens, threads, activations, kept, seed):
    """In every width that the pattern divides, whole groups of 64 or not."""
    columns = width if pattern in ("dense", "unstructured") else -width % Pattern.parse(pattern).group + width
    codes, scale, mask, parsed = drawn(pattern, rows, columns, seed, kept)
    weight = packed_weight.Weight.pack(codes, scale, mask, parsed)
    rounded = packed_weight.quantize(tokens_of(tokens, columns, seed), activations, level=level)
    kept_codes = (codes if mask is None else codes * mask).long()
    exact = (rounded.q[:, :columns].long() - rounded.zero[:, None]) @ kept_codes.T
    assert torch.equal(weight.integers(rounded, level, threads).long(), exact)
    out = weight.multiply(rounded, torch.full((rows,), 0.3), level, threads)
    assert torch.equal(out, exact.float() * (rounded.scale[:, None] * scale[:, 0]) + 0.3)  # at every level


@pytest.mark.parametrize("level", packed_weight.levels())
@pytest.mark.parametrize("pattern", PATTERNS)
def test_wide_layers_and_long_batches(level, pattern):
    """Wider than what is unpacked at a time, all at the ends of their ranges, 1 to 512 tokens."""
    rows, columns = 11, 4096 + 4096 + 80
    codes, scale, mask, parsed = drawn(pattern, rows, columns, seed=1)
    codes = codes.sign() * 8
    codes = codes.clamp(-8, 7).to(torch.int8)
    weight = packed_weight.Weight.pack(codes, scale, mask, parsed)
    x = torch.randn(512, columns, generator=torch.Generator().manual_seed(2)).sign()
    kept_codes = (codes if mask is None else codes * mask).double()
    for tokens in (1, 2, 3, 64) if level == "portable" else (1, 2, 3, 64, 512):
        rounded = packed_weight.quantize(x[:tokens], QuantizerSettings(bits=8))
        exact = (rounded.q[:, :columns].double() - rounded.zero[:, None]) @ kept_codes.T
        assert torch.equal(weight.integers(rounded, level, threads=2).double(), exact)


@given(
    tokens=st.integers(1, 5),
    columns=st.integers(1, 200),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    clip_ratio=st.sampled_from([1.0, 0.9, 0.37, "learned"]),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=100)
def test_tokens_are_rounded_as_in_simulation(tokens, columns, bits, symmetric, clip_ratio, seed):
    """The very same floats as fake_quantize gives, at every level."""
    activations = QuantizerSettings(bits=bits, symmetric=symmetric, clip_ratio=clip_ratio)
    bounds = None
    if clip_ratio == "learned":
        bounds = type("Bounds", (), {"low": torch.tensor([0.83]), "high": torch.tensor([0.71])})
    x = tokens_of(tokens, columns, seed)
    x[0, ::3] = 0
    simulated = fake_quantize(x, activations, bounds)
    for level in packed_weight.levels():
        rounded = packed_weight.quantize(x, activations, bounds, level)
        back = (rounded.q[:, :columns].int() - rounded.zero[:, None]) * rounded.scale[:, None]
        assert torch.equal(back, simulated), level
        assert not rounded.q[:, columns:].any()


def test_zero_tokens_give_zeros_and_non_finite_ones_nan():
    x = torch.zeros(4, 100)
    x[1, 3], x[2, 5], x[3, 7] = float("nan"), float("inf"), float("-inf")
    weight = packed_weight.Weight.pack(*drawn("unstructured", 9, 100, 0))
    for level in packed_weight.levels():
        out = weight.multiply(packed_weight.quantize(x, QuantizerSettings(bits=4), level=level), level=level)
        assert (out[0] == 0).all() and out[1:].isnan().all()


@pytest.mark.parametrize(
    ("pattern", "layout", "bits"),
    [
        ("dense", "dense", 4.0),
        ("unstructured", "bitmask", 3.0),
        ("8:16", "bitmask", 3.0),
        ("4:8", "4:8", 2.875),
        ("2:4", "2:4", 2.75),
        ("paired 4:8", "paired 4:8", 2.375),
        ("1:4", "bitmask", 2.0),
    ],
)
def test_stored_bits_per_weight_match_formula(pattern, layout, bits):
    """What the codes and masks take, and not much more for scales, sums and places."""
    rows, columns = 512, 4096
    codes, scale, mask, parsed = drawn(pattern, rows, columns, 0)
    if pattern == "unstructured":
        mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)).argsort(1) < columns // 2
    weight = packed_weight.Weight.pack(codes, scale, mask, parsed)
    assert weight.layout == layout
    data = 8 * (weight.data.nbytes - packed_weight.OVERREAD) / (rows * columns)
    assert bits <= data < bits * 1.001
    assert data < weight.bits_per_weight < data + 0.05


def test_bitmask_stores_any_mask_and_equal_rows_share_size():
    codes, scale, mask, parsed = drawn("2:4", 16, 128, 0)
    rounded = packed_weight.quantize(tokens_of(2, 128, 0), QuantizerSettings(bits=8))
    named = packed_weight.Weight.pack(codes, scale, mask, parsed)
    assert torch.equal(
        packed_weight.Weight.pack(codes, scale, mask, layout="bitmask").integers(rounded), named.integers(rounded)
    )
    uneven = torch.zeros(16, 128, dtype=torch.bool)
    uneven[::2] = True  # neighbours differ as much as they can
    weight = packed_weight.Weight.pack(codes, scale, uneven)
    assert weight.data.nbytes == 2 * 2 * 8 * 8 + 4 * 128 + packed_weight.OVERREAD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "3:7"}, "'3:7' is unknown"),
        ({"codes": torch.full((8, 64), 8)}, "to 8 are not 4-bit"),
        ({"layout": "2:4"}, "not of pattern 2:4"),
        ({"layout": "paired 4:8"}, "not of pattern paired 4:8"),
    ],
)
def test_invalid_weights_are_named(change, message):
    codes, scale, mask, _ = drawn("unstructured", 8, 64, 0)
    with pytest.raises(ObrError, match=message):
        packed_weight.Weight.pack(**({"codes": codes, "scale": scale, "mask": mask} | change))


def test_invalid_tokens_are_named():
    weight = packed_weight.Weight.pack(*drawn("dense", 8, 64, 0))
    with pytest.raises(ObrError, match="128 channels do not fit a weight of 64"):
        weight.multiply(packed_weight.quantize(torch.ones(1, 128), QuantizerSettings(bits=8)))
    for settings_ in (QuantizerSettings(bits=9), QuantizerSettings(bits=8, group_size=32)):
        with pytest.raises(ObrError, match="one scale a token"):
            packed_weight.quantize(torch.ones(1, 64), settings_)
    with pytest.raises(ObrError, match="on meta cannot meet packed weights"):
        packed_weight.quantize(torch.ones(1, 64, device="meta"), QuantizerSettings(bits=8))
    with pytest.raises(ObrError, match="'sse' is not one this processor has"):
        packed_weight.library("sse")


def test_product_with_zero_tokens_is_empty():
    weight = packed_weight.Weight.pack(*drawn("unstructured", 9, 64, 0))
    for level in packed_weight.levels():
        assert weight.multiply(packed_weight.quantize(torch.ones(0, 64), ACTIVATIONS[0]), level=level).shape == (0, 9)


def test_missing_compiler_raises_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("OBR_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ObrError, match="No C\\+\\+ compiler"):
        compiler.build(packed_weight.SOURCES, [*packed_weight.FLAGS, "-DNEVER_BUILT_BEFORE"])
    monkeypatch.setenv("CXX", "/bin/false" if os.path.exists("/bin/false") else "false")
    with pytest.raises(ObrError, match=r"kernels\.cpp cannot be built"):
        compiler.build(packed_weight.SOURCES, [*packed_weight.FLAGS, "-DNEVER_BUILT_BEFORE"])


@pytest.mark.slow
def test_threads_survive_a_fork():
    """A child of a process that has multiplied in two threads can do so too."""
    code = (
        "import os, torch; from obr.config.quantizer import QuantizerSettings\n"
        "from obr.kernels.int4 import packed_weight as int4\n"
        "w = int4.Weight.pack(torch.ones(64, 64, dtype=torch.int8), torch.ones(64, 1))\n"
        "x = int4.quantize(torch.ones(1, 64), QuantizerSettings(bits=8))\n"
        "right = lambda: bool((w.integers(x, threads=2) == 64 * 127).all())\n"
        "assert right()\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if right() else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
