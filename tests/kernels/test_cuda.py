"""What the CUDA products read is right by an emulation of the instruction; they run where there is a CUDA device."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import mma_emulation as mma
from helpers.paths import FIXTURES
from obr.config.pattern import Pattern
from obr.errors import ObrError
from obr.kernels.cuda import library, operands
from obr.methods import masks
from obr.methods.layer_hessian import Hessian

PAIRED = Pattern.parse("paired 4:8")


def paired(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes and a mask of the pattern."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    mask = masks.mask_from_scores(torch.rand(rows, columns, generator=generator), 0.5, PAIRED)
    return codes, mask


def emulated(codes, mask, tokens) -> np.ndarray:
    weight, right = operands.sparse(codes, mask), operands.dense(tokens, operands.TOKENS)
    assert (weight.rows % 32, weight.columns % 256, right.rows % 32) == (0, 0, 0) and weight.columns == right.columns
    found = mma.multiply(weight.codes.numpy(), weight.metadata.numpy(), right.codes.numpy())
    assert not found[len(codes) :].any() and not found[:, len(tokens) :].any()
    return found[: len(codes), : len(tokens)].T


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 70), groups=st.integers(1, 70), tokens=st.integers(1, 40), seed=st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_the_instruction_computes_the_masked_product(rows, groups, tokens, seed):
    codes, mask = paired(rows, 8 * groups, seed)
    x = torch.randint(-8, 8, (tokens, 8 * groups), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    assert np.array_equal(emulated(codes, mask, x), x.long() @ (codes * mask).long().T)


def test_operands_of_real_masks_give_masked_product():
    """A real layer's Hessian, Wanda's scores in pairs, codes of its own grid."""
    layer = np.load(FIXTURES / "small.npz")
    weight, hessian = (torch.from_numpy(layer[name]).float() for name in ("weight", "hessian"))
    mask = masks.mask_from_scores(masks.wanda(weight, Hessian(hessian), 0), 0.5, PAIRED)
    codes = (weight / weight.abs().amax(1, keepdim=True) * 7).round().to(torch.int8)
    x = torch.randint(-8, 8, (3, codes.shape[1]), dtype=torch.int8)
    assert np.array_equal(emulated(codes, mask, x), x.long() @ (codes * mask).long().T)


def test_words_of_metadata_are_where_the_threads_look():
    """By hand: row 9, columns 64 to 71 keep pairs 1 and 3; all others 0 and 1."""
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool).repeat(32, 32)
    mask[9, 64:72] = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    words = operands.sparse(torch.ones(32, 256, dtype=torch.int8), mask).metadata.numpy().view(np.uint32)
    changed = np.flatnonzero(words != 0x44444444)
    assert changed.tolist() == [4 * 1 + 2 * 1 + 1] and words[changed[0]] == 0x4444444D  # thread 7 of the first tile


def test_dense_operands_are_two_codes_a_byte():
    codes = torch.tensor([[-8, 7, 1, -1]], dtype=torch.int8)
    operand = operands.dense(codes)
    assert operand.codes.shape == (32, 128) and operand.codes[0, :2].tolist() == [0x78, 0xF1]
    assert np.array_equal(mma.nibbles(operand.codes.numpy())[:1, :4], codes)


@pytest.mark.parametrize(
    ("codes", "mask", "message"),
    [
        (torch.zeros(1, 8), torch.tensor([[1, 0, 1, 0, 1, 0, 1, 0]]), "'paired 4:8' alone"),
        (torch.zeros(1, 8), torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0]]), "'paired 4:8' alone"),
        (torch.zeros(1, 12), torch.ones(1, 12), "no whole number of groups"),
        (torch.full((1, 8), 8), torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0]]), "not of 4 bits"),
    ],
)
def test_unsupported_shapes_and_patterns_are_refused(codes, mask, message):
    with pytest.raises(ObrError, match=message):
        operands.sparse(codes.to(torch.int8), mask.bool())


def test_calls_are_refused_that_would_read_elsewhere():
    weight = operands.dense(torch.zeros(32, 256, dtype=torch.int8))
    with pytest.raises(ObrError, match="Tokens of 128 channels"):
        library.integers(weight, torch.zeros(3, 128, dtype=torch.int8))
    with pytest.raises(ObrError, match="move them to a CUDA device"):
        library.integers(weight, torch.zeros(3, 256, dtype=torch.int8))
    with pytest.raises(ObrError, match="multiples of 8"):
        library.half(torch.zeros(12, 16).half(), torch.zeros(8, 16).half())
    with pytest.raises(ObrError, match="use float16"):
        library.half(torch.zeros(16, 16), torch.zeros(8, 16).half())


def test_a_machine_without_the_compiler_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_packages", lambda: [tmp_path])
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    with pytest.raises(ObrError, match="make kernels"):
        library.headers()
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    monkeypatch.setattr(library, "SYSTEM", tmp_path / "nvcc")
    monkeypatch.delenv("NVCC", raising=False)
    with pytest.raises(ObrError, match="make kernels"):
        library.nvcc()
    monkeypatch.setenv("NVCC", __file__)
    assert library.nvcc() == __file__


@pytest.fixture(scope="module")
def compiled() -> ctypes.CDLL:
    try:
        library.nvcc()
        library.headers()
    except ObrError as error:
        pytest.skip(str(error))
    return library.library()


def test_cuda_library_compiles_and_loads_without_gpu(compiled):
    for name in ("obr_int4_dense", "obr_int4_sparse", "obr_fp16_dense"):
        assert getattr(compiled, name)
    assert library.library() is compiled and library.prepare().startswith("CUDA products for sm_80, sm_86, sm_89")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the products were not run")
@pytest.mark.parametrize("tokens", [1, 33, 128])
def test_products_are_exact_on_the_device(compiled, tokens):
    codes, mask = paired(200, 520, 0)
    x = torch.randint(-8, 8, (tokens, 520), dtype=torch.int8)
    for weight, kept in ((operands.dense(codes), codes), (operands.sparse(codes, mask), codes * mask)):
        found = library.integers(weight.to("cuda"), x.cuda()).cpu()
        assert torch.equal(found.long(), x.long() @ kept.long().T)
    a, b = torch.randn(64, 128).half(), torch.randn(32, 128).half()
    found = library.half(a.cuda(), b.cuda()).cpu().double()
    torch.testing.assert_close(found, a.double() @ b.double().T, rtol=1e-2, atol=1e-2)
