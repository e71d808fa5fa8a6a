"""Configuration files as YAML: keys that stand twice, keys that are no text, names that nothing has."""

import pytest

from obr.config.config_files import check_overridden, layered, read_yaml
from obr.errors import ObrError


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("recipes:\n  a: {method: rtn, bits: 3, bits: 4}\n", "line 2: 'bits' is there twice; leave one of them out"),
        ("recipes:\n  a: {method: rtn}\nrecipes:\n  b: {method: rtn}\n", "line 3: 'recipes' is there twice"),
        ("recipes:\n  no: {method: rtn}\n", "line 2: YAML reads the key no as no text; put it in quotes"),
        ("recipes:\n  2024: {method: rtn}\n", "line 2: YAML reads the key 2024 as no text"),
    ],
)
def test_keys_that_stand_twice_or_are_no_text_are_refused(text, sentence, tmp_path):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ObrError, match=sentence):
        read_yaml(tmp_path / "c.yaml")


def test_keys_of_different_mappings_and_quoted_keys_are_read(tmp_path):
    (tmp_path / "c.yaml").write_text("a: {b: 1, 'no': 2}\nc: [{b: 1}, {b: 2}]\n", encoding="utf-8")
    assert read_yaml(tmp_path / "c.yaml") == {"a": {"b": 1, "no": 2}, "c": [{"b": 1}, {"b": 2}]}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"calibrations": {"c": {"text": "wikitext2_train", "nsamples": 4.0}}}, "4.0 .* write it without a point"),
        ({"calibrations": {"c": {"generated": {"temperature": float("nan")}}}}, "nan is not of type 'number'"),
        ({"calibrations": {"c": {"mix": ["wikitext2", "wikitext2"]}}}, "has non-unique elements"),
        ({"recipes": {"r": {"method": "rtn", "pattern": 124}}}, "put it in quotes, since YAML reads 2:4 as 124"),
        ({"only_models": []}, "only_models: .* should be non-empty"),
    ],
)
def test_values_that_yaml_makes_of_other_spellings_are_refused(changes, sentence):
    with pytest.raises(ObrError, match=sentence):
        layered(changes)


def test_overrides_of_a_table_that_no_experiment_has_are_refused():
    check_overridden({"overrides": {"tables": {"table5": {"note": "x"}}}, "tables": {}})  # of an experiment
    with pytest.raises(ObrError, match=r"overrides.tables is 'tabel5', which the config and its experiments' tables"):
        check_overridden({"overrides": {"tables": {"tabel5": {"note": "x"}}}, "tables": {}})
