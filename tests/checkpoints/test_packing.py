"""The stored form of layers: exact both ways, and as small as promised."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.layer_samples import layer
from obr.checkpoints.device_unpacking import unpacked_weight
from obr.checkpoints.packing import pack, pack_bits, unpack, unpack_bits
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.methods.restore import restore


@given(bits=st.integers(1, 16), values=st.lists(st.integers(0, 2**16 - 1), max_size=50))
@settings(deadline=None)
def test_bit_stream_roundtrip_is_exact(bits, values):
    values = np.array([v % 2**bits for v in values], dtype=np.uint32)
    stream = pack_bits(values, bits)
    assert stream.size == -(-len(values) * bits // 8)
    assert (unpack_bits(stream, bits, len(values)) == values).all()


@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 4),
    bits=st.integers(2, 8),
    pattern=st.sampled_from([None, "2:4", "4:8", "8:16", "paired 4:8", "1:4"]),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_packing_roundtrip_is_exact(rows, groups, bits, pattern, seed):
    weight, hessian = layer(rows, 16 * groups, seed)
    removed = {"pattern": pattern} if pattern else {"sparsity": 0.4}
    restored = restore(weight, hessian, "wanda", bits=bits, **removed)
    back = unpack(pack(restored, torch.float16))
    assert torch.equal(back.weight, restored.weight) and torch.equal(back.codes, restored.codes)
    assert torch.equal(back.mask, restored.mask) and torch.equal(back.scale, restored.scale)
    assert back.bits == bits and str(back.pattern) == str(pattern)


@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 4),
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16]),
    pattern=st.sampled_from([None, "2:4", "4:8", "8:16", "paired 4:8", "1:4"]),
    group=st.sampled_from([None, 16]),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_unpacking_on_a_device_equals_unpacking_on_the_host(rows, groups, bits, pattern, group, seed):
    weight, hessian = layer(rows, 16 * groups, seed)
    options = {"method": "wanda", "pattern": pattern} if group is None else {"method": "gptq", "group": group}
    if bits == 16:
        options.pop("group", None)
    packed = pack(restore(weight, hessian, **options, bits=bits), torch.float16)
    found = unpacked_weight(packed, torch.device("cpu"))
    assert found.dtype == torch.float32 and torch.equal(found, unpack(packed).weight)


@pytest.mark.parametrize("method", ["dense", "rtn", "sparsegpt_gptq", "obr_gptq"])
def test_packing_roundtrip_is_exact_for_other_masks(method):
    weight, hessian = layer(8, 128)
    for bits in (16,) if method == "dense" else (4, 16):
        restored = restore(weight, hessian, method, bits=bits)
        back = unpack(pack(restored, torch.float32))
        assert torch.equal(back.weight, restored.weight) and torch.equal(back.mask, restored.mask)


@pytest.mark.parametrize(
    "options, bits_per_weight",
    [
        ({"method": "obr_gptq"}, 3.0),
        ({"method": "obr_gptq", "pattern": "2:4"}, 2.75),
        ({"method": "obr_gptq", "pattern": "4:8"}, 2.875),
        ({"method": "obr_gptq", "pattern": "8:16"}, 2.875),
        ({"method": "obr_gptq", "pattern": "paired 4:8"}, 2.375),
        ({"method": "gptq", "bits": 3}, 3.0),
        ({"method": "gptq"}, 4.0),
        ({"method": "obr_gptq", "bits": 16}, 9.0),
        ({"method": "dense"}, 16.0),
    ],
)
def test_packed_size_equals_formula(options, bits_per_weight):
    """Scales apart, the bytes are what the recipe says."""
    assert Recipe.parse({"calibration": "c", **options}).bits_per_weight == bits_per_weight
    weight, hessian = layer(16, 256)
    packed = pack(restore(weight, hessian, **options), torch.float16)
    scales = packed.tensors["scale"].nbytes if "scale" in packed.tensors else 0
    assert 8 * (packed.bytes - scales) / weight.numel() == pytest.approx(bits_per_weight)


UNPACKERS = (unpack, lambda packed: unpacked_weight(packed, torch.device("cpu")))


@pytest.mark.parametrize("unpack", UNPACKERS, ids=["host", "device"])
def test_contradictions_are_refused(unpack):
    weight, hessian = layer(8, 64)
    packed = pack(restore(weight, hessian, "obr_gptq"), torch.float16)
    packed.tensors["codes"] = packed.tensors["codes"][:-9]
    with pytest.raises(ObrError, match="not those of 256 numbers of 4 bits"):
        unpack(packed)
    packed = pack(restore(weight, hessian, "obr_gptq"), torch.float16)
    packed.tensors["mask"] = packed.tensors["mask"][:-1]
    with pytest.raises(ObrError, match="not those of 512 numbers of 1 bits"):
        unpack(packed)
    packed = pack(restore(weight, hessian, "obr_gptq", pattern="4:8"), torch.float16)
    packed.tensors["mask"].fill_(255)
    with pytest.raises(ObrError, match="that pattern 4:8 does not have"):
        unpack(packed)


@pytest.mark.parametrize(("pattern", "most"), [(None, 3.05), ("paired 4:8", 2.55)])
def test_narrow_layers_cost_little_more_than_their_codes(pattern, most):
    """All of a file, scales too, for a block of SmolLM2-135M's sizes."""
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    layers = [restore(w, None, "magnitude", pattern=pattern, clip="minmax") for w in weights]
    stored = sum(pack(restored, torch.float16).bytes for restored in layers)
    assert 8 * stored / sum(w.numel() for w in weights) <= most


@pytest.mark.parametrize("unpack", UNPACKERS, ids=["host", "device"])
@pytest.mark.parametrize("count", [1, 31, 64])
def test_values_that_do_not_fill_their_places_are_refused(count, unpack):
    restored = restore(*layer(8, 8), "wanda", sparsity=0.5, bits=16)
    packed = pack(restored, torch.float16)
    assert packed.tensors["values"].numel() == 32
    packed.tensors["values"] = torch.ones(count, dtype=torch.float16)
    with pytest.raises(ObrError, match=f"{count} values for 32 places"):
        unpack(packed)
