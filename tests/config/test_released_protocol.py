"""Each quoted number stands beside the recipe that the released code would run for it, in every field."""

from dataclasses import asdict, replace

import pytest

from helpers.configs import merged
from helpers.paths import PUBLISHED
from obr.config.recipe import Recipe
from obr.config.workflow import Config
from obr.report import published, table_rows

HEADS = {"symmetric": False, "group_size": "head"}  # a zero point, one scale per head
LEARNED = {"clip_ratio": "learned"}
# Fields of a recipe by the rotation of a published row: the arguments of OBR's three front ends.
FRONT_ENDS = {
    "quarot": {"online": "model", "calibration": "wikitext2", "mask": "wanda_harmonic"},
    "spinquant": {"online": "model", "calibration": "wikitext2", "mask": "wanda", "dtype": "bfloat16"},
    "flatquant": {
        "online": "model", "calibration": "wikitext2_full", "mask": "wanda_harmonic",
        "clip": "learned", "hessian_inputs": "quantised",
    },
}  # fmt: skip
# Quantisers by front end; bits come from the published row.
QUANTISERS = {
    "none": {"activations": {}, "keys": {}, "values": {}},
    "quarot": {"activations": {}, "keys": {}, "values": {}},
    "spinquant": {"activations": {"symmetric": False}, "o_inputs": HEADS, "keys": HEADS, "values": HEADS},
    "flatquant": {"activations": LEARNED, "keys": HEADS | LEARNED, "values": HEADS | LEARNED},
    # Of OSTQuant's table: QuaRot and OmniQuant as in their own papers.
    "QuaRot": {
        "activations": {"clip_ratio": 0.9},
        "keys": HEADS | {"clip_ratio": 0.95},
        "values": HEADS | {"clip_ratio": 0.95},
    },
    "OmniQuant": {"activations": {"symmetric": False}, "queries": HEADS, "keys": HEADS, "values": HEADS},
}
METHODS = {
    "FP16": {"method": "dense"},
    "BF16": {"method": "dense"},
    "GPTQ": {"method": "gptq"},
    "RTN": {"method": "rtn"},
    "SparseGPT+GPTQ": {"method": "sparsegpt_gptq"},
    "OBR_RTN": {"method": "obr_rtn"},
    "OBR_GPTQ": {"method": "obr_gptq"},
    "OBR": {"method": "obr_gptq"},
    "OBR+RTN (quantisation only)": {"method": "obr_rtn", "sparsity": 0.0},
    **{f"OBR_RTN alpha={alpha:.2f}": {"method": "obr_rtn", "alpha": alpha} for alpha in (0.2, 0.25, 0.5, 0.75)},
    "OBR_GPTQ, magnitude mask": {"method": "obr_gptq", "mask": "magnitude"},
    "OBR_GPTQ, SparseGPT mask": {"method": "obr_gptq", "mask": "sparsegpt"},
    "OBR_GPTQ, Wanda mask": {"method": "obr_gptq"},
    **{f"{name}(quant-only)": {"method": "rtn"} for name in ("QuaRot", "SpinQuant", "FlatQuant")},
    **{f"{name}+Wanda": {"method": "wanda"} for name in ("QuaRot", "SpinQuant", "FlatQuant")},
}
# Of OSTQuant's table: a recipe's fields by method, and the rotation's name where it depends on the bit setting.
OSTQUANT = {
    "RTN": {"method": "rtn"},
    "GPTQ": {"method": "gptq"},
    "SmoothQuant": {"method": "rtn", "rotation": "smoothquant"},
    "AWQ": {"method": "rtn", "rotation": "awq", "clip": "learned"},
    "OmniQuant": {"method": "rtn", "rotation": "omniquant", "clip": "learned"},
    "QuaRot": {"method": "gptq", "rotation": "quarot", "online": "model"},
    "SpinQuant": {"method": "gptq", "rotation": "spinquant_learned", "online": "model", "dtype": "bfloat16"},
    "OSTQuant": {"method": "gptq", "rotation": "ostquant", "online": "float32", "dtype": "bfloat16"},
}
EVALUATED = ("bits", "sparsity", "pattern", "rotation", "online", "activations", "o_inputs", "keys", "values")
BY_BITS = {"16": "_w", "4": "_a4kv16"}
LEARNED_FOR = {"OmniQuant": {"16": "_w"}, "SpinQuant": BY_BITS, "OSTQuant": BY_BITS}


def released(line) -> Recipe:
    """The recipe, quantisers included, by which the released code makes a line of the published numbers."""
    if line.method in ("FP16", "BF16"):
        return Recipe.parse({"method": "dense"})
    if line.source == "ostquant":
        fields = {"bits": int(line.w_bits), "calibration": "wikitext2", **OSTQUANT[line.method]}
        if line.kv_bits == "16" and line.method in LEARNED_FOR:
            fields["rotation"] += LEARNED_FOR[line.method][line.a_bits]
        turned = "spinquant" if line.method in ("SpinQuant", "OSTQuant") else line.method
    else:
        turned = "quarot" if line.rotation == "not stated" else line.rotation
        fields = {"rotation": turned, "bits": int(line.w_bits), **FRONT_ENDS[turned], **METHODS[line.method]}
        if "calibration set c4" in line.note:
            fields["calibration"] = "c4"
        if (line.table, line.method) == ("OBR Table 2", "QuaRot(quant-only)"):
            fields["bits"] = 3  # printed as W4; see the table's note
        fields |= {"pattern": line.sparsity} if ":" in line.sparsity else {}
    bits = {"activations": line.a_bits, "o_inputs": line.a_bits, "queries": line.a_bits}
    grids = {part: {"bits": int(bits.get(part, line.kv_bits)), **grid} for part, grid in _grids(turned).items()}
    return Recipe.parse(fields | {part: grid for part, grid in grids.items() if grid["bits"] < 16})


def _grids(turned: str) -> dict:
    return QUANTISERS.get(turned, QUANTISERS["none"])


@pytest.fixture(scope="module")
def config() -> Config:
    return Config(merged())


QUOTING = [name for name, entry in merged()["tables"].items() if entry.get("published")]


@pytest.mark.parametrize("name", [*QUOTING, "alpha"])
def test_quoted_rows_have_the_arguments_of_the_released_code(config, name):
    raw = config.raw
    entry = raw["tables"].get(name) or raw["figures"][name]
    rows = [row for row in table_rows.resolve_rows(entry, raw) if row.published is not None and row.recipe]
    quotes, compared = published.Quotes(entry, raw["models"], rows, PUBLISHED), 0
    for model in entry["models"]:
        for row in rows:
            for line in quotes.printed[model, row.key].itertuples():
                wanted, ours = released(line), row.recipe
                if name == "time":  # of compression, in which nothing but weights is quantised
                    wanted = replace(wanted, activations=ours.activations, keys=ours.keys, values=ours.values)
                if ours.method == "released":  # the authors' own weights: evaluated alike, and as sparse
                    wanted = replace(ours, **{field: getattr(wanted, field) for field in EVALUATED})
                assert _fields(ours) == _fields(wanted), (model, row.key, line.method)
                compared += 1
    assert compared


def _fields(recipe: Recipe) -> dict:
    """All that decides a number: the mask only where one is chosen."""
    return {key: value for key, value in asdict(recipe).items() if key != "label"} | {"mask": recipe.chosen_mask}


def test_evaluation_is_that_of_each_front_end(config):
    """Text with a BOS token in front, but for SpinQuant's; prompts without one; whole test splits, no examples."""
    raw, whole = config.raw, {"text": "wikitext2_test", "seqlen": 2048, "tokens": None}
    assert raw["perplexity"]["wikitext2"] == {**whole, "bos": None}
    assert raw["perplexity"]["wikitext2_no_bos"] == {**whole, "bos": False}
    for name in QUOTING:
        entry = raw["tables"][name]
        columns = {m.published: m.key for m in table_rows.metrics_of(entry) if m.kind == "perplexity"}
        if not entry.get("time"):
            text = "wikitext2_no_bos" if name == "table3" else "wikitext2"
            assert columns.pop("wikitext2_ppl") == text and set(columns) <= {"none"}, name
        tasks = {"ostquant": published.OSTQUANT_TASKS, "seeds": (), "time": ()}.get(name, published.PAPER_TASKS)
        assert set(entry.get("zero_shot", [])) == set(tasks), name
        assert not tasks or entry["mean"], name
    for task in published.OSTQUANT_TASKS:
        asked = {key: value for key, value in raw["zero_shot"][task].items() if key != "batch_tokens"}
        assert asked == {"source": {"source": "hub", "task": task}, "limit": None, "bos": None}, task


def test_calibration_draws_are_those_of_the_released_code(config):
    raw = config.raw
    draws = {"nsamples": 128, "seqlen": 2048, "seed": 0, "reversed": False, "bos": None}
    assert raw["calibrations"]["wikitext2"] == {"text": "wikitext2_train", "sampling": "random", **draws}
    assert raw["calibrations"]["wikitext2_full"] == {"text": "wikitext2_train_full", "sampling": "random", **draws}
    assert raw["calibrations"]["c4"] == {"text": "c4_train", "sampling": "documents", **draws}
    rows = {"source": "hub", "column": "text", "join": "\n\n"}
    for name, strip in (("wikitext2_train", False), ("wikitext2_train_full", True), ("wikitext2_test", False)):
        text = {key: value for key, value in raw["texts"][name].items() if key != "revision"}
        wanted = {"repo": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": name.split("_")[1]}
        assert text == {**rows, **wanted, "strip": strip}, name
    c4 = {key: value for key, value in raw["texts"]["c4_train"].items() if key != "revision"}
    shard = {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train", "strip": False}
    assert c4 == {**rows, "repo": "allenai/c4", **shard}
