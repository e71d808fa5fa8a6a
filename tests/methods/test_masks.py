"""Masks."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obr.config.pattern import Pattern
from obr.errors import ObrError
from obr.methods.masks import check_mask, mask_from_ranks, mask_from_scores
from obr.methods.registry import SCORES

PATTERNS = ["2:4", "4:8", "8:16", "paired 4:8", "1:4"]


@given(rows=st.integers(1, 5), groups=st.integers(1, 4), text=st.sampled_from(PATTERNS), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_patterns_keep_the_highest_of_each_group(rows, groups, text, seed):
    pattern = Pattern.parse(text)
    scores = torch.rand(rows, groups * pattern.group, generator=torch.Generator().manual_seed(seed))
    mask = mask_from_scores(scores, 0.5, pattern)
    check_mask(mask, pattern.sparsity, pattern, "test")
    for kept, group in zip(mask.view(-1, pattern.group), scores.view(-1, pattern.group), strict=True):
        if pattern.paired:
            kept, group = kept[::2], group.view(-1, 2).sum(1)
        assert group[kept].min() > group[~kept].max()


@given(rows=st.integers(1, 5), columns=st.integers(1, 40), sparsity=st.floats(0, 0.95), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_unstructured_removes_the_same_number_from_every_row(rows, columns, sparsity, seed):
    scores = torch.randint(0, 4, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    mask = mask_from_scores(scores, sparsity)
    assert (mask.sum(1) == columns - int(columns * sparsity)).all()
    for kept, row in zip(mask, scores, strict=True):
        if kept.any() and not kept.all():
            assert row[kept].min() >= row[~kept].max()


def test_equal_scores_prune_first_columns():
    assert mask_from_scores(torch.zeros(1, 4), 0.5).tolist() == [[False, False, True, True]]


@given(rows=st.integers(1, 5), groups=st.integers(1, 4), text=st.sampled_from(PATTERNS), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_equal_scores_in_group_prune_first_columns(rows, groups, text, seed):
    pattern, generator = Pattern.parse(text), torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (rows, groups * pattern.group), generator=generator).float()
    kept, units = pattern.units
    for group, mask in zip(
        scores.view(-1, pattern.group), mask_from_ranks(scores, pattern).view(-1, pattern.group), strict=True
    ):
        of = group.view(units, -1).sum(1).tolist()
        stays = sorted(sorted(range(units), key=lambda i: (of[i], i))[units - kept :])
        assert mask.view(units, -1).all(1).nonzero()[:, 0].tolist() == stays


def test_mask_scores_match_formulas():
    weight, diagonal = torch.tensor([[1.0, -2.0]]), torch.tensor([9.0, 1.0])
    factor = torch.tensor([0.5, 4]).diag()
    hessian = SimpleNamespace(diagonal=diagonal, harmonic=diagonal.flip(0), inverse_factor=factor)
    scores = {name: score(weight, hessian, 3) for name, score in SCORES.items()}
    random = scores.pop("random")
    assert {name: score.tolist() for name, score in scores.items()} == {
        "magnitude": [[1, 2]], "wanda": [[3, 2]], "wanda_harmonic": [[1, 6]], "sparsegpt": [[4, 0.25]],
    }  # fmt: skip
    assert torch.equal(random, SCORES["random"](weight, None, 3))
    assert not torch.equal(random, SCORES["random"](weight, None, 4))


def test_a_width_that_the_group_does_not_divide_is_refused():
    with pytest.raises(ObrError, match=r"4:8 does not divide the 12 input columns"):
        mask_from_scores(torch.rand(2, 12), 0.5, Pattern.parse("4:8"))


@pytest.mark.parametrize("text", ["4:2", "0:4", "3/4", "paired 3:8", "4:4"])
def test_nonsense_patterns_are_refused(text):
    with pytest.raises(ObrError, match=r"Pattern"):
        Pattern.parse(text)


def test_a_mask_of_a_layer_has_the_sparsity_of_the_layer_alone():
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    check_mask(mask, 0.5, None, "layer", "layer")
    for wrong in (mask | mask.flip(0), mask & mask.flip(0)):  # more weights are kept, or fewer
        with pytest.raises(ObrError, match="does not have the asked sparsity"):
            check_mask(wrong, 0.5, None, "layer", "layer")


def test_a_wrong_mask_is_noticed():
    mask = torch.tensor([[True, False, True, False, True, True, True, False]])
    with pytest.raises(ObrError, match="does not have the asked sparsity"):
        check_mask(mask, 0.5, Pattern.parse("2:4"), "layer")
    with pytest.raises(ObrError, match="does not have the asked sparsity"):
        check_mask(mask, 0.5, None, "layer")
