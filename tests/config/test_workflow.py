"""The configuration: what is refused, and in which words."""

import json

import pytest
import yaml

from helpers.configs import OBR_A4, RAW, replaced
from helpers.paths import ROOT
from helpers.workflow_runs import CONFIG
from obr.config.config_files import layered
from obr.config.effects import ALL_FIGURES, FIGURES, TABLES
from obr.config.quantizer import QuantizerSettings
from obr.config.recipe import Recipe
from obr.config.workflow import Config, check_paths, check_widths, objection
from obr.errors import ObrError

SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())


def raw(**changes):
    return replaced(RAW, **changes)


def test_a_checkpoint_is_evaluated_under_the_schemes_of_its_rows():
    config = Config(raw())
    evaluated = config.evaluated("obr", "a4")
    assert evaluated.setting == "W4A4KV16" and evaluated.method == "obr_gptq"
    assert config.evaluation_entry("obr", "a4") != config.evaluation_entry("obr", "a16")
    assert config.rows(config.raw["tables"]["t"]) == [("dense", "a16"), ("obr", "a4")]
    assert list(config.artefacts(config.raw["tables"]["t"]))[:4] == [
        "evaluations/small/dense/a16.json",
        "manifests/small/dense.json",
        "evaluations/small/obr/a4.json",
        "manifests/small/obr.json",
    ]


def test_quantised_hessians_see_the_scheme_that_their_recipe_names():
    recipe = {**RAW["recipes"]["obr"], "hessian_inputs": "quantised", "activations": "a4"}
    config = Config(raw(recipes__seen=recipe, tables__t__rows=["seen", {"recipe": "seen", "activations": "a16"}]))
    assert json.loads(config.weight_entry("seen"))["activations"]["bits"] == 4
    assert config.rows(config.raw["tables"]["t"]) == [("seen", "a4"), ("seen", "a16")]
    assert config.evaluated("seen", "a16").activations.bits == 16
    with pytest.raises(
        ObrError, match=r"recipes.seen.activations is 'a4', which nothing reads: activations is of rec"
    ):
        Config(raw(recipes__seen={**recipe, "hessian_inputs": "plain"}))
    with pytest.raises(ObrError, match=r"recipes.seen.activations is 'gone', which activations does not define"):
        Config(raw(recipes__seen={**recipe, "activations": "gone"}))


def test_a_scheme_may_set_the_precision_of_the_evaluation():
    schemes = {"own": {"dtype": None, "online": "float32"}, "same": {}}
    recipe = {**RAW["recipes"]["obr"], "dtype": "bfloat16", "online": "model"}
    config = Config(raw(activations=schemes, recipes__obr=recipe, tables__t__rows=["obr"]))
    assert (config.evaluated("obr", "own").dtype, config.evaluated("obr", "own").online) == (None, "float32")
    assert (config.evaluated("obr", "same").dtype, config.evaluated("obr", "same").online) == ("bfloat16", "model")


def test_labels_and_spelt_out_defaults_do_not_change_a_checkpoint():
    spelt = Config(raw(recipes__obr={**RAW["recipes"]["obr"], "alpha": 0.5, "bits": 4, "label": "other"}))
    assert spelt.weight_entry("obr") == Config(raw()).weight_entry("obr")
    changed = Config(raw(recipes__obr={**RAW["recipes"]["obr"], "alpha": 0.25}))
    assert json.loads(changed.weight_entry("obr"))["alpha"] == 0.25


def test_an_allocation_takes_its_options_from_the_config():
    options = {"mixed": [{"method": "gptq", "bits": 3}, {"method": "joint", "pattern": "8:16"}]}
    recipe = {"method": "joint", "calibration": "c", "allocation": {"bits": 3.0, "options": "mixed"}}
    rows = ["mixed", {"recipe": "mixed", "activations": "a4"}]
    more = {"mixed": recipe}
    changes = {"layer_options": options, "recipes": {**RAW["recipes"], **more}, "tables__t__rows": rows}
    config = Config(raw(**changes, figures__f={"kind": "allocation", "models": ["large"], "rows": rows}))
    assert config.evaluated("mixed", "a4").options == config.parsed["mixed"].options
    assert config.options_of("mixed") == "mixed"
    assert [option["bits"] for option in json.loads(config.weight_entry("mixed"))["allocation"]["options"]] == [3, 4]
    assert "allocations/large/mixed.json" in set(config.artefacts(config.raw["figures"]["f"]))
    assert config.measured_blocks("mixed", "none", "c") is None
    part = Config(raw(**changes, recipes__mixed={**recipe, "blocks": "0:2"}))
    assert (
        part.measured_blocks("mixed", "none", "c") == "0:2" and part.measured_blocks("mixed", "quarot", "c") is None
    )
    assert config.patterns_of("small") == {"mixed, gptq, 3 bits": None, "mixed, joint, 4 bits, 8:16": "8:16"}
    with pytest.raises(ObrError, match=r"figures.f draws allocations, but recipe 'obr' has none"):
        Config(raw(**changes, figures__f={"kind": "allocation", "models": ["large"], "rows": ["obr"]}))
    with pytest.raises(ObrError, match=r"allocation.options is 'mixed', which layer_options does not define"):
        Config(raw(recipes=changes["recipes"]))


def test_only_models_limits_tables_and_figures():
    config = Config(raw(only_models=["small"]))
    assert config.raw["tables"]["t"]["models"] == ["small"] and not config.raw["figures"]
    with pytest.raises(
        ObrError, match="only_models is 'tiny', which models does not define; it defines small, large"
    ):
        Config(raw(only_models=["tiny"]))
    with pytest.raises(ObrError, match="only_models is large, of which no table or figure is"):
        Config(raw(only_models="large", tables__t__models=["small"], figures={}))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"recipes__obr__rotation": "twist"}, "recipes.obr.rotation is 'twist', which rotations does not define"),
        ({"recipes__obr__calibration": "d"}, "recipes.obr.calibration is 'd', which calibrations does not define"),
        ({"recipes__obr__calibration": None}, "recipes.obr: method obr_gptq reads activations; name one of"),
        ({"recipes__obr__sparsity": 1.2}, "recipes.obr.sparsity is 1.2; it must lie between 0 and 0.95"),
        ({"recipes__obr__pattern": "4:2"}, "Pattern '4:2' must keep"),
        ({"recipes__obr__nonsense": 1}, "recipes.obr has the unknown key 'nonsense'; known are activations"),
        ({"tables__t__rows": [{**OBR_A4, "activations": "a3"}]}, "tables.t.rows: activations of obr is 'a3', which"),
        ({"activations__a4__bits": 3}, "a key of activations.a4 is 'bits'; choose one of activations"),
        ({"activations__a4__activations": {"bits": 1}}, "activations.a4.activations: bits 1 is out of range"),
        ({"calibrations__d": {"mix": ["c", "gone"]}}, "calibrations.d.mix is 'gone', which calibrations does not"),
        (
            {"calibrations__d": {"mix": ["c", "c"], "seqlen": 64}},
            "calibrations.d takes 64 windows of 64 tokens from 'c'",
        ),
        (
            {"calibrations__d": {"generated": {}, "sampling": "documents"}},
            "calibrations.d.sampling is 'documents', but its windows are of no text; drop it, or give text",
        ),
        ({"calibrations__d": {"nsamples": 4}}, "calibrations.d has no source; give one of text, generated and mix"),
        ({"calibrations__d": {"text": "train", "generated": {}}}, "calibrations.d has text and generated; give one"),
        ({"calibrations__c__text": "gone"}, "calibrations.c.text is 'gone', which texts does not define"),
        ({"tables__t__rows": ["gone"]}, "tables.t.rows is 'gone', which recipes does not define"),
        ({"tables__t__models": ["gone"]}, "tables.t.models is 'gone', which models does not define"),
        ({"tables__t__zero_shot": ["gone"]}, "tables.t.zero_shot is 'gone', which zero_shot does not define"),
        ({"figures__f__perplexity": "gone"}, "figures.f.perplexity is 'gone', which perplexity does not define"),
    ],
)
def test_invalid_config_names_key_and_value(changes, sentence):
    with pytest.raises(ObrError) as error:
        Config(raw(**changes))
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"recipes__../x": {"method": "dense"}}, "recipes: '../x' cannot be a name; use letters, digits, '.', '_'"),
        ({"recipes": []}, "recipes: [] is not of type 'object'; the schema"),
        ({"recipes__x": {"method": 3}}, "recipes.x.method: 3 is not of type 'string'"),
        ({"recipes__x": {"method": "dense", "nonsense": 1}}, "recipes.x: Additional properties are not allowed"),
        ({"results": "../../etc\n"}, "results: "),
        ({"models": None}, "models: None is not of type 'object'"),
    ],
)
def test_schema_violations_are_reported_in_one_sentence(changes, sentence):
    config = replaced(CONFIG, **changes)
    told = objection(config, SCHEMA)
    assert told.startswith(sentence) and "\n" not in told, told


def test_recipe_parse_applies_defaults_of_method():
    assert Recipe.parse({"method": "dense"}).bits == 16
    assert Recipe.parse({"method": "gptq", "calibration": "c"}).sparsity == 0
    assert Recipe.parse({"method": "wanda", "calibration": "c"}).mask == "wanda"
    assert Recipe.parse({"method": "wanda", "mask": "wanda_harmonic", "calibration": "c"}).mask == "wanda_harmonic"
    assert Recipe.parse({"method": "obr_rtn", "pattern": "1:4", "calibration": "c"}).sparsity == 0.75
    recipe = Recipe.parse({"method": "rtn", "keys": {"bits": 4}, "values": {"bits": 8}})
    assert recipe.setting == "W4A16K4V8" and recipe.keys == QuantizerSettings(4)
    assert Recipe.parse(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"method": "dense", "bits": 4}, "recipe.bits is 4, but with method dense it is 16; leave bits out"),
        ({"method": "gptq", "sparsity": 0.5}, "sparsity is 0.5, but with method gptq no weights are removed; leave"),
        ({"method": "rtn", "pattern": "2:4"}, "pattern is '2:4', but with method rtn no weights are removed"),
        ({"method": "wanda", "mask": "random"}, "mask is 'random', but with method wanda it is 'wanda'"),
        ({"method": "wanda", "pattern": "2:4", "sparsity": 0.6}, "sparsity is 0.6, but with pattern 2:4 it is 0.5"),
    ],
)
def test_a_value_that_a_method_does_not_take_is_refused(entry, sentence):
    with pytest.raises(ObrError, match=sentence):
        Recipe.parse({"calibration": "c", **entry})


def test_a_checked_recipe_is_accepted_again():
    for entry in (
        {"method": "gptq"},
        {"method": "magnitude"},
        {"method": "wanda", "pattern": "1:3", "sparsity": 0.667},
    ):
        recipe = Recipe.parse({"calibration": "c", **entry})
        assert Recipe.parse(recipe.to_dict()) == recipe


def test_widths_are_checked_against_a_model():
    config = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 200}
    check_widths(config, {"a": "4:8", "b": None}, "tiny")
    with pytest.raises(
        ObrError, match=r"8:16 does not divide the 200 input columns of down_proj of tiny \(recipe a\)"
    ):
        check_widths(config, {"a": "8:16"}, "tiny")


def test_paths_are_checked_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "there.txt").write_text("text")
    check_paths({"a": {"source": "path", "path": "$HERE/there.txt"}, "b": {"source": "hub"}}, "texts")
    with pytest.raises(ObrError, match=r"texts.a: .*gone.txt does not exist"):
        check_paths({"a": {"source": "path", "path": "$HERE/gone.txt"}}, "texts")
    with pytest.raises(ObrError, match=r"zero_shot.a: \$NOWHERE/x names an environment variable that is not set"):
        check_paths({"a": {"source": {"source": "path", "file": "$NOWHERE/x"}}}, "zero_shot")


@pytest.mark.parametrize(
    "entry, sentence",
    [
        ({"generated": {}, "bos": "window"}, None),
        ({"generated": {}, "bos": None}, None),
        (
            {"generated": {}, "bos": False},
            "calibrations.o.bos is false, which is of windows of a text; leave it out, or",
        ),
        (
            {"mix": ["c", "c"], "bos": "window"},
            'calibrations.o.bos is "window", which is of windows of a text; leave it',
        ),
    ],
)
def test_bos_of_generated_and_mixed_windows_is_checked(entry, sentence):
    changes = raw(calibrations={"c": {"text": "train"}, "o": entry})
    if sentence is None:
        assert Config(changes).raw["calibrations"]["o"] == entry
    else:
        with pytest.raises(ObrError, match=sentence):
            Config(changes)


@pytest.mark.parametrize("section, key, values", [
    ("perplexity", "wikitext2", (None, True, False, "window")),
    ("calibrations", "wikitext2", (None, True, False, "window")),
    ("zero_shot", "piqa", (None, True, False, "tokenizer")),
])  # fmt: skip
def test_the_schema_knows_every_bos_and_no_other(section, key, values):
    config = layered({})
    for value in (*values, "text", 2):
        config[section][key]["bos"] = value
        told = objection(config, SCHEMA)
        assert (told is None) == (value in values), (value, told)
        assert told is None or told.startswith(f"{section}.{key}.bos: ")


QUOTING = {"recipe": "obr", "published": {}}
OVERRIDES = {"models": ["small"], "calibrations": {}, "perplexity": ["wiki"], "zero_shot": ["piqa"]}
FIGURE = {"kind": "perplexity_bits", "models": ["large"], "rows": ["obr"], "perplexity": "wiki"}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"tables__t__rows": [{"recipe": "obr", "published": {}, "published_bits": 3}]},
            "tables.t.rows[0].published_bits is 3, which nothing reads: published_bits is of rows with published in",
        ),
        ({"tables__t__rows": [{"recipe": "obr", "seeds": [1]}]}, "rows[0].seeds is [1], which nothing reads"),
        ({"tables__t__mean": True, "tables__t__zero_shot": []}, "tables.t.mean is True, which nothing reads"),
        ({"figures__g": {**FIGURE, "x": "bits"}}, "figures.g.x is 'bits', which nothing reads: x is of figures"),
        ({"figures__g": {**FIGURE, "panels": ["time"]}}, "panels is of figures of kind kernels; remove it"),
        ({"figures__g": {**FIGURE, "rows": [{"recipe": "obr", "published_bits": 3}]}}, "published_bits is 3"),
        ({"figures__g": {**FIGURE, "kind": "layer_error"}}, "figures.g.perplexity is 'wiki', which nothing reads"),
        (
            {"figures__g": {"kind": "layer_error", "models": ["large"], "rows": [QUOTING]}},
            "figures.g.rows[0].published is {}, which nothing reads: published is of tables and of figures",
        ),
        ({"rotations__quarot__alpha": 0.7}, "rotations.quarot.alpha is 0.7, which nothing reads: alpha is of"),
        ({"rotations__quarot__format": "awq"}, "rotations.quarot.format is 'awq', which nothing reads"),
        (
            {"rotations__r": {"kind": "file", "source": {"source": "path", "path": "x"}, "seed": 3}},
            "rotations.r.seed is 3, which nothing reads: seed is of drawn and learned rotations",
        ),
        ({"calibrations__d": {"text": "train", "sampling": "sequential", "seed": 2}}, "calibrations.d.seed is 2"),
        ({"calibrations__d": {"generated": {}, "reversed": True}}, "calibrations.d.reversed is True, which nothing"),
        ({"recipes__obr__method": "gptq", "recipes__obr__alpha": 0.9}, "recipes.obr.alpha is 0.9, which nothing"),
        ({"recipes__obr__sweeps": 10}, "recipes.obr.sweeps is 10, which nothing reads: sweeps is of the method"),
        ({"recipes__r": {"method": "rtn", "mask": "random"}}, "recipes.r.mask is 'random', which nothing reads"),
        ({"recipes__r": {"method": "rtn", "damp": 0.1}}, "recipes.r.damp is 0.1, which nothing reads"),
        ({"recipes__r": {"method": "rtn", "bits": 16, "refit": True}}, "recipes.r.refit is True, which nothing"),
        ({"recipes__obr__hessian_inputs": "quantised"}, "hessian_inputs is of recipes that name activations"),
        ({"tables__t__both_orders": True}, "tables.t.both_orders is True, which nothing reads: both_orders is of"),
        (
            {"zero_shot__z": {"source": {"source": "hub", "task": "piqa"}, "text": "train"}},
            "zero_shot.z.text is 'train', which nothing reads: text is of tasks of source cloze",
        ),
        (
            {"overrides": {"models": ["small"], "calibrations": {"gone": "c"}, "perplexity": [], "zero_shot": []}},
            "overrides.calibrations.gone is 'c', which nothing reads",
        ),
        (
            {
                "overrides": {
                    "models": ["small"], "calibrations": {}, "perplexity": [], "zero_shot": [], "without": ["gone"],
                }
            },
            "overrides.without is 'gone', which nothing reads: without is of tables and figures of this config",
        ),
        (
            {"overrides": {**OVERRIDES, "tables": {"t": {"titel": "x"}}}},
            "overrides.tables.t.titel is 'x', which nothing reads: titel is of no tables",
        ),
        (
            {"overrides": {**OVERRIDES, "figures": {"f": {"x": "bits"}}}},
            "overrides.figures.f.x is 'bits', which nothing reads: x is of no figures of kind perplexity_bits",
        ),
        ({"overrides": {**OVERRIDES, "zero_shot": ["gone"]}}, "overrides.zero_shot is 'gone', which zero_shot does"),
        (
            {"overrides": {**OVERRIDES, "calibrations": {"c": "gone"}}},
            "overrides.calibrations.c is 'gone', which calibrations does not define",
        ),
    ],
)  # fmt: skip
def test_unread_keys_are_refused(changes, sentence):
    with pytest.raises(ObrError) as error:
        Config(raw(**changes))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_read_keys_and_defaults_are_accepted():
    """Snakemake fills defaults in; a second config file may have a rotation learned that the first reads."""
    learned = {"kind": "smoothquant", "learn": {"calibration": "c"}, "format": "awq", "source": {}, "alpha": 0.5}
    row = {"recipe": "obr", "published": {}, "published_bits": 3}
    changes = {"rotations__r": learned, "figures__g": {**FIGURE, "rows": [row]}}
    assert "r" in Config(raw(**changes)).raw["rotations"]


def test_overrides_know_the_keys_of_tables():
    assert set(SCHEMA["properties"]["tables"]["additionalProperties"]["properties"]) == TABLES


def test_figure_keys_of_schema_are_read_by_some_kind():
    figure = SCHEMA["properties"]["figures"]["additionalProperties"]["properties"]
    assert set(figure["kind"]["enum"]) == set(FIGURES)
    assert set(figure) == ALL_FIGURES.union(*FIGURES.values())
