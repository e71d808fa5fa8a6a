"""Answers that share a context have the likelihoods that they have alone, and the context is computed once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.answer_likelihoods import VOCABULARY, alone, tiny
from obr.config.recipe import Recipe
from obr.evaluation.likelihood import log_likelihoods
from obr.models.architectures import layout_of
from obr.models.layers import ATTENTION, set_quantizers, wrap_block


@pytest.fixture(scope="module")
def model():
    return tiny()


def requests_of(contexts: list[list[int]], answers: list[list[list[int]]]):
    return [("", context, answer) for context, several in zip(contexts, answers) for answer in several]


TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(
    questions=st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=4),
    max_length=st.integers(9, 20),
    batch_size=st.integers(1, 9),
)
def test_likelihoods_equal_those_of_answers_scored_alone(model, questions, max_length, batch_size):
    asked = [("", context, answer) for context, answers in questions for answer in answers]
    found = log_likelihoods(model, asked, max_length, batch_size)
    for (_, context, answer), (likelihood, greedy) in zip(asked, found, strict=True):
        wanted, likeliest = alone(model, context, answer, max_length)
        assert likelihood == pytest.approx(wanted, rel=1e-5, abs=1e-4) and greedy == likeliest


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "smollm3"])
def test_answers_scored_together_equal_answers_scored_alone_in_every_family(family):
    model = tiny(family)
    asked = requests_of([[5, 6, 7, 8], [9, 9]], [[[1, 2, 3], [1, 2], [4]], [[1, 2, 3], [3]]])
    found = log_likelihoods(model, asked, 64, 8)
    for (_, context, answer), (likelihood, _) in zip(asked, found, strict=True):
        assert likelihood == pytest.approx(alone(model, context, answer)[0], rel=1e-5, abs=1e-4)


def test_a_question_beyond_the_window_of_attention_is_scored_answer_by_answer():
    model = tiny("mistral", sliding_window=8)
    asked = requests_of([[5, 6, 7, 8, 9, 1, 2], [9, 9]], [[[1, 2, 3], [1, 2]], [[1, 2, 3], [3]]])
    found = log_likelihoods(model, asked, 64, 8)
    for (_, context, answer), (likelihood, _) in zip(asked, found, strict=True):
        assert likelihood == pytest.approx(alone(model, context, answer)[0], rel=1e-5, abs=1e-4)


def test_greedy_flag_is_set_for_generated_answer_only(model):
    context = [3, 1, 4]
    answer = model.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False)[0, 3:].tolist()
    other = [*answer[:-1], (answer[-1] + 1) % VOCABULARY]
    found = log_likelihoods(model, requests_of([context], [[answer, other]]), 64)
    assert [greedy for _, greedy in found] == [True, False]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_activations_keys_and_values_are_rounded_token_by_token(bits):
    model = tiny()
    model.set_attn_implementation(ATTENTION)
    layout = layout_of(model.config)
    settings = {"bits": bits}
    recipe = Recipe.parse({"method": "dense", "activations": settings, "keys": settings, "values": settings})
    for block in model.model.layers:
        wrap_block(block, layout)
        set_quantizers(block, layout, recipe)
    asked = requests_of([[5, 6, 7, 8], [9, 2]], [[[1, 2, 3], [1, 2], [4]], [[1, 2, 3], [3, 8]]])
    found = log_likelihoods(model, asked, 64, 2)
    for (_, context, answer), (likelihood, _) in zip(asked, found, strict=True):
        assert likelihood == pytest.approx(alone(model, context, answer)[0], rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(("batch_size", "passes"), [(1, 3), (4, 3), (5, 2), (12, 1), (99, 1)])
def test_contexts_are_computed_once_and_only_answers_reach_the_head(model, batch_size, passes):
    seen, kept = [], []
    reading = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    heading = model.lm_head.register_forward_pre_hook(lambda _, args: kept.append(args[0].shape[1]))
    contexts = [[i, *range(1, 11)] for i in range(3)]
    answers = [[[i, 7, 7], [i, 8, 8], [i, 9, 9], [i, 9, 8]] for i in range(3)]
    try:
        log_likelihoods(model, requests_of(contexts, answers), 64, batch_size)
    finally:
        reading.remove()
        heading.remove()
    assert len(seen) == passes
    assert sum(seen) == 3 * (11 + 1 + 3)  # the answers share their first token, and two of them their second
    assert sum(kept) == 3 * (1 + 1 + 3)  # behind the context, behind the token shared, behind three others
