"""Grids of weights and the fake-quantisation of activations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obr.config.quantizer import QuantizerSettings
from obr.methods import native
from obr.methods.grid import Grid
from obr.models.fake_quant import fake_quantize


@given(bits=st.integers(2, 8), seed=st.integers(0, 99), clip=st.sampled_from(["minmax", "mse"]))
@settings(deadline=None, max_examples=40)
def test_rounding_goes_to_the_nearest_of_the_levels(bits, seed, clip):
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
    grid = Grid.fit(weight, bits, clip)
    levels = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) * grid.scale  # (r, levels)
    nearest = (weight[:, :, None] - levels[:, None]).abs().amin(-1)
    assert torch.allclose((grid.round(weight) - weight).abs(), nearest, atol=1e-5)
    assert torch.equal(grid.codes(weight) * grid.scale, grid.round(weight))
    assert grid.contains(grid.round(weight)) and 0 in grid.codes(torch.zeros_like(weight))


def test_minmax_scale_is_the_largest_weight_over_the_largest_level():
    weight = torch.tensor([[1.0, -3.5, 2.0], [0.0, 0.0, 0.0]])
    assert Grid.fit(weight, 4, "minmax").scale.tolist() == [[0.5], [1.0]]


def test_the_clip_search_equals_a_plain_one():
    weight = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    found = Grid.fit(weight, 4, "mse").scale
    for row, scale in zip(weight, found, strict=True):
        errors = []
        for i in range(80):
            trial = row.abs().max() / 7 * (1 - i / 100)
            errors.append(((trial * (row / trial).round().clamp(-8, 7) - row).abs() ** 2.4).sum())
        best = int(torch.stack(errors).argmin())
        assert scale.item() == pytest.approx((row.abs().max() / 7 * (1 - best / 100)).item(), rel=1e-6)
    assert (found < Grid.fit(weight, 4, "minmax").scale).any()


@pytest.mark.parametrize("group", [None, 100])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_by_the_hessian_weighs_columns_by_its_diagonal(bits, group):
    """Against every shrink factor in float64, row by row and group by group."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(7, 300, generator=generator)
    importance = torch.rand(300, generator=generator).mul_(6).exp_()
    found = Grid.fit(weight, bits, "hessian", group, importance).scale.double()
    largest = 2 ** (bits - 1) - 1
    pieces = zip(weight.split(group or 300, 1), importance.split(group or 300), found.unbind(1), strict=True)
    for part, its, scales in pieces:
        trials = [part.double().abs().amax(1) / largest * (1 - i / 100) for i in range(80)]
        errors = [
            (
                (trial[:, None] * (part / trial[:, None]).round().clamp(-largest - 1, largest) - part).square() * its
            ).sum(1)
            for trial in trials
        ]
        best = torch.stack(trials).gather(0, torch.stack(errors).argmin(0)[None])[0]
        assert torch.allclose(scales, best, rtol=1e-3 if group else 1e-5)
    plain = Grid.fit(weight, bits, "mse", group, importance).scale
    assert torch.equal(plain, Grid.fit(weight, bits, "mse", group).scale) and not torch.equal(plain, found.float())


def test_off_grid_values_are_noticed():
    weight = torch.randn(3, 8)
    grid = Grid.fit(weight, 4)
    assert not grid.contains(grid.round(weight) + 0.01)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 8])
def test_activations_are_rounded_token_by_token(symmetric, group):
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1)) + 0.5
    settings = QuantizerSettings(4, symmetric, group)
    y = fake_quantize(x, settings)
    for part in y.unflatten(-1, (-1, group or 32)).flatten(0, -2):
        assert len(part.unique()) <= 16
    assert torch.equal(fake_quantize(x[:1, :1], settings), y[:1, :1])  # no token depends on another
    span = x.abs().amax() if symmetric else x.amax() - x.amin()
    assert (y - x).abs().max() <= span / (14 if symmetric else 30) * 1.01
    assert (fake_quantize(x, QuantizerSettings(8, symmetric, group)) - x).abs().max() < (y - x).abs().max() / 8


@pytest.mark.parametrize("sign", [1, -1])
def test_grids_with_zero_points_contain_zero(sign):
    """Where all values have one sign, the range still begins at zero."""
    x = sign * torch.tensor([[10.0, 11.0, 12.0, 13.0, 6.0, 7.0, 9.0, 9.0]])
    step = torch.tensor([13.0, 9.0]).repeat_interleave(4) / 3
    y = fake_quantize(x, QuantizerSettings(2, symmetric=False, group_size=4))
    torch.testing.assert_close(y, (x / step).round() * step)


def test_sixteen_bits_change_nothing_and_clipping_shrinks_the_range():
    x = torch.randn(4, 16)
    assert fake_quantize(x, QuantizerSettings()) is x
    assert fake_quantize(x, QuantizerSettings(4, clip_ratio=0.5)).abs().max() < x.abs().max() * 0.6
    assert torch.equal(fake_quantize(torch.zeros(2, 4), QuantizerSettings(4)), torch.zeros(2, 4))


def test_the_compiled_clip_search_finds_the_same_scales(monkeypatch):
    if native.library() is None:
        pytest.skip("there is no C++ compiler")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 700, generator=generator) * torch.rand(40, 1, generator=generator).exp()
    weight[:10] *= (torch.rand(10, 700, generator=generator) > 0.99) * 20 + 1  # rows with outliers
    weight[10:12] = weight[10:12].round()  # many equal errors
    weight[12] = 0
    importance = torch.rand(700, generator=generator).mul_(6).exp_()
    kinds = [(bits, clip) for bits in (2, 3, 4, 8) for clip in ("mse", "hessian")]
    compiled = {kind: Grid.fit(weight, *kind, None, importance).scale for kind in kinds}
    monkeypatch.setattr(native, "library", lambda: None)
    for kind, scale in compiled.items():
        assert torch.equal(scale, Grid.fit(weight, *kind, None, importance).scale), kind


def test_missing_compiler_gives_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("OBR_CACHE", str(tmp_path))
    native.library.cache_clear()
    with pytest.warns(UserWarning, match="cannot be built"):
        assert native.library() is None
    native.library.cache_clear()
