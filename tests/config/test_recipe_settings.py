"""A recipe as words of a command: it comes back as it was, for every recipe of the project and odd ones."""

import shlex

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from obr.config.config_files import load_config
from obr.config.recipe import Recipe
from obr.config.recipe_settings import as_arguments, command_line, parse_settings, settings_line
from obr.errors import ObrError


def test_every_recipe_of_the_project_comes_back_from_its_words():
    config = load_config()
    assert len(config.parsed) > 50
    for key, recipe in config.parsed.items():
        words = shlex.split(command_line(recipe.decisive()))
        assert Recipe.parse(parse_settings(words), key).decisive() == recipe.decisive(), words
        for scheme in ("a16", "a4kv4", "spinquant-a4kv4"):
            evaluated = config.evaluated(key, scheme)
            again = Recipe.parse(parse_settings(as_arguments(evaluated.to_dict())), key)
            assert again == evaluated or again.to_dict() | {"label": None} == evaluated.to_dict() | {"label": None}


def test_words_are_short_and_leave_out_defaults():
    recipe = load_config().parsed["obr_gptq-w4s50-quarot"]
    words = command_line({k: v for k, v in recipe.decisive().items() if k != "label"})
    assert words.startswith("method=obr_gptq ") and "sparsity=0.5" in words and "damp" not in words
    assert len(words) < 200 and "{" not in words


@given(st.one_of(st.text(min_size=1), st.booleans(), st.none(), st.integers(), st.floats(allow_nan=False)))
def test_any_value_comes_back_as_it_was(value):
    words = (
        as_arguments({"method": "rtn", "calibration": value})
        if value is not None
        else ["method=rtn", "calibration=null"]
    )
    assert parse_settings(words) == ({"method": "rtn", "calibration": value} if len(words) > 1 else {"method": "rtn"})


def test_a_json_object_is_a_recipe():
    assert parse_settings(['{"method": "rtn", "bits": 3}']) == {"method": "rtn", "bits": 3}


@pytest.mark.parametrize("words", [["rtn"], ["=4"], ["bits=4", "bits=3"], ["keys=4", "keys.bits=4"], ["{"]])
def test_words_that_are_no_settings_are_refused(words):
    with pytest.raises(ObrError, match=r"KEY=VALUE"):
        parse_settings(words)


ENTRIES = [
    (section, name, entry)
    for section, entries in load_config().raw.items()
    if isinstance(entries, dict)
    for name, entry in entries.items()
    if isinstance(entry, dict)
]


@pytest.mark.parametrize("section", sorted({section for section, _, _ in ENTRIES}))
def test_every_entry_of_the_config_comes_back_from_its_words(section):
    for name, entry in ((name, entry) for kind, name, entry in ENTRIES if kind == section):
        line = settings_line(entry)
        assert parse_settings(shlex.split(line)) == entry, name
        assert "\n" not in line and not any(sign in line for sign in ('{"', '["', "[{"))


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=12), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=20,
)


@given(st.dictionaries(st.text(max_size=8), VALUES, min_size=1, max_size=4))
@example({"{": None})
@example({"a": {"{": 1}})
def test_any_settings_come_back_as_they_were(entry):
    assert parse_settings(shlex.split(settings_line(entry))) == entry


@pytest.mark.parametrize("words", [["mix.=4"], [".a=4"], ["a..b=4"], ["a.0=1", "a=[2]"], ["a.b.c=1", "a.b=2"]])
def test_broken_paths_are_refused(words):
    with pytest.raises(ObrError, match=r"KEY=VALUE"):
        parse_settings(words)
