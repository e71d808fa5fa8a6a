"""One configuration made of another: other models, less data, several seeds; and the paper's own, complete."""

import pytest

from helpers.configs import OBR_A4, RAW, SMALL, merged, replaced
from helpers.paths import ROOT
from obr.config.workflow import Config
from obr.errors import ObrError
from obr.report import published


def seeded(**changes) -> Config:
    table = {**RAW["tables"]["t"], "seeds": [0, 1]}
    return Config(replaced(RAW, tables__t=table, **changes))


def test_seeds_become_recipes_with_their_own_windows_and_rotations():
    config = seeded()
    rows = config.raw["tables"]["t"]["rows"]
    assert rows[0]["variants"] == ["dense"]
    assert rows[1]["variants"] == ["obr", "obr-seed1"] and rows[1]["activations"] == "a4"
    other = config.parsed["obr-seed1"]
    assert (other.calibration, other.rotation) == ("c-seed1", "quarot-seed1")
    assert config.raw["calibrations"]["c-seed1"] == {"text": "train", "seed": 1}
    assert config.raw["rotations"]["quarot-seed1"]["seed"] == 1
    assert config.evaluated("obr-seed1", "a4").activations.bits == 4
    made = list(config.artefacts(config.raw["tables"]["t"]))
    assert "manifests/small/obr-seed1.json" in made and "evaluations/large/obr-seed1/a4.json" in made
    assert "obr-seed1" in config.recipes_of("small")


def test_a_mixture_of_another_seed_mixes_windows_of_that_seed():
    parts = {"c": {"text": "train"}, "own": {"generated": {}}, "both": {"mix": ["c", "own"]}}
    config = seeded(calibrations=parts, recipes__obr__calibration="both")
    assert config.raw["calibrations"]["both-seed1"] == {"mix": ["c-seed1", "own-seed1"], "seed": 1}
    assert config.raw["calibrations"]["own-seed1"] == {"generated": {}, "seed": 1}


def test_a_row_may_have_seeds_of_its_own():
    table = {**RAW["tables"]["t"], "seeds": [0, 1], "rows": ["dense", {"recipe": "obr", "seeds": [0]}, OBR_A4]}
    rows = Config(replaced(RAW, tables__t=table)).raw["tables"]["t"]["rows"]
    assert [row["variants"] for row in rows] == [["dense"], ["obr"], ["obr", "obr-seed1"]]


def test_reversed_windows_give_every_seed_a_second_rounding():
    table = {**RAW["tables"]["t"], "seeds": [0, 1], "both_orders": True}
    config = Config(replaced(RAW, tables__t=table))
    names = ["obr", "obr-reversed", "obr-seed1", "obr-seed1-reversed"]
    assert [row["variants"] for row in config.raw["tables"]["t"]["rows"]] == [["dense"], names]
    other = config.parsed["obr-seed1-reversed"]
    assert (other.calibration, other.rotation) == ("c-seed1-reversed", "quarot-seed1")
    assert config.raw["calibrations"]["c-seed1-reversed"] == {"text": "train", "seed": 1, "reversed": True}


def test_losses_of_options_are_measured_in_one_order_of_the_windows():
    mixed = {"label": "m", "method": "joint", "calibration": "c", "allocation": {"bits": 3, "options": "o"}}
    table = {**RAW["tables"]["t"], "rows": ["m"], "seeds": [0, 1], "both_orders": True}
    options = {"o": [{"method": "gptq", "bits": 2}, {"method": "gptq", "bits": 4}]}
    config = Config(replaced(RAW, recipes__m=mixed, tables__t=table) | {"layer_options": options})
    found = {key: config.measured_calibration(key) for key in config.parsed if key.startswith("m")}
    assert found == {"m": "c", "m-reversed": "c", "m-seed1": "c-seed1", "m-seed1-reversed": "c-seed1"}


def test_random_masks_have_the_seed_and_files_of_rotations_do_not():
    config = seeded(
        recipes__obr={**RAW["recipes"]["obr"], "mask": "random"},
        rotations__quarot={"kind": "file", "source": {"source": "path", "path": "x"}},
    )
    assert config.parsed["obr-seed1"].seed == 1 and config.parsed["obr-seed1"].rotation == "quarot"


def test_seeds_of_an_unknown_recipe_are_refused_in_a_sentence():
    with pytest.raises(ObrError, match=r"tables.t.rows is 'gone', which recipes does not define"):
        Config(replaced(RAW, tables__t={**RAW["tables"]["t"], "rows": ["gone"], "seeds": [0, 1]}))


def test_quick_limits_data_and_writes_to_separate_folder():
    config = Config(replaced(RAW, quick="true", calibrations__c={"text": "train", "nsamples": 4, "seqlen": 2048}))
    assert config.results == config.raw["results"] == "results-quick"
    assert config.raw["calibrations"]["c"] == {"text": "train", "nsamples": 4, "seqlen": 256}
    assert config.raw["perplexity"]["wiki"]["tokens"] == 2048 and config.raw["zero_shot"]["piqa"]["limit"] == 8
    assert config.parsed["obr"].blocks == "0:4" and config.parsed["dense"].blocks is None
    assert "first four blocks" in config.raw["tables"]["t"]["note"]
    assert Config(replaced(RAW, quick="false")).results == "results"


PAPER = {f"table{n}" for n in range(1, 11)} | {"time", "hessians", "seeds", "ostquant"}


def test_the_paper_is_complete_and_every_filter_finds_its_numbers():
    config = Config(merged())
    assert set(config.raw["tables"]) >= PAPER and set(config.raw["figures"]) >= {
        "fig1a",
        "fig1b",
        "fig4",
        "fig5",
        "fig7",
    }
    numbers = published.load(ROOT / "workflow" / "published" / "results.csv")
    quoted = 0
    for entry in [*config.raw["tables"].values(), *config.raw["figures"].values()]:
        for row in entry.get("rows", []):
            filters = (
                {**(entry.get("published") or {}), **(row.get("published") or {})} if isinstance(row, dict) else {}
            )
            if isinstance(row, dict) and row.get("published"):
                quoted += len(published.select(numbers, **filters))
        for filters in entry.get("mentions", []):
            assert len(published.select(numbers, **filters))
    assert quoted > 800


def test_the_papers_masks_and_texts_are_those_of_each_front_end():
    """QuaRot's and FlatQuant's code weigh sequences by 1/i, SpinQuant's does not; C4's windows are in documents."""
    config = Config(merged())
    masks = {
        name: {config.parsed[row].chosen_mask for row, _ in config.rows(entry)} - {None}
        for name, entry in config.raw["tables"].items()
    }
    both = {"wanda", "wanda_harmonic", "magnitude", "sparsegpt", "random"}
    wanted = {f"table{n}": {"wanda_harmonic"} for n in (1, 2, 4, 6, 8, 9, 10)} | {"table3": {"wanda"}, "table5": both}
    wanted |= {
        "table7": set(),
        "seeds": {"wanda_harmonic"},
        "time": {"wanda_harmonic"},
        "released_7b": {"wanda_harmonic"},
    }
    assert {name: masks[name] for name in wanted} == wanted
    for name, found in masks.items():
        assert name in wanted or name.startswith(("table1_", "released", "hardware")) or found <= {"wanda"}, name
    assert config.raw["calibrations"]["c4"]["sampling"] == "documents"
    assert "rows" not in config.raw["texts"]["c4_train"]
    assert {r.calibration for k, r in config.parsed.items() if k.endswith("-c4")} == {"c4"}
    full = config.raw["texts"]["wikitext2_train_full"]
    assert full["strip"] is True and "min_chars" not in full


def test_an_edition_renames_masks():
    small = Config(merged(SMALL))
    assert not any(recipe.needs_harmonic for recipe in small.parsed.values())
    assert small.parsed["obr_gptq-w4s50-quarot"].mask == small.parsed["wanda-w4s50-quarot"].mask == "wanda"
    assert small.parsed["obr_gptq-w4s50-quarot-sparsegpt"].mask == "sparsegpt"


def test_tables_with_pruned_4_bit_rows_hold_dense_rivals():
    """Of equal storage, dense 3 bits by GPTQ; and, except where time or one kernel's layout is the matter, 4 bits."""
    config, checked = Config(merged()), set()
    for name, entry in config.raw["tables"].items():
        rows = [config.evaluated(*row) for row in config.rows(entry)]
        if any(r.bits == 4 and r.sparsity == 0.5 for r in rows) and not name.startswith(("released", "hardware")):
            settings = {r.setting[2:] for r in rows if r.bits == 4 and r.sparsity == 0.5}
            checked.add(name)
            for setting in settings:
                assert any(r.method == "gptq" and r.setting == f"W3{setting}" for r in rows), (name, setting)
            partial = ("time", "table9", "joint_seeds", "equal_storage_other_text", "equal_storage_refined")
            assert name in partial or any(r.method == "gptq" and r.bits == 4 for r in rows), name
        assert name == "ostquant" or entry["details"], name
    assert {"table1", "table5", "joint"} <= checked


def test_quick_learns_in_two_steps():
    rotation = {"kind": "ostquant", "learn": {"calibration": "c", "steps": 100}}
    assert Config(replaced(RAW, quick="true", rotations__r=rotation)).raw["rotations"]["r"]["learn"]["steps"] == 2


def test_the_quick_small_edition_leaves_windows_to_learn_from():
    small = Config(merged(SMALL, quick="true"))
    learned = {name: rotation["learn"] for name, rotation in small.raw["rotations"].items() if rotation.get("learn")}
    assert {"ostquant", "flatquant"} <= set(learned)
    for name, learn in learned.items():
        assert learn.get("held_out", 4) < small.raw["calibrations"][learn["calibration"]]["nsamples"], name


def test_an_edition_renames_rotations_of_recipes_and_figures():
    small = Config(merged(SMALL))
    assert small.parsed["gptq-w4-spinquant_learned_w"].rotation == "spinquant"
    assert small.raw["figures"]["learning"]["rotations"] == ["spinquant", "ostquant", "flatquant"]


def test_table_defined_by_edition_is_unchanged():
    config = Config(merged(SMALL, "config/experiments/small-wikitext.yaml"))
    own = config.raw["tables"]["joint_margin"]
    assert own["perplexity"] == ["wikitext2_longer"] and len(own["rows"][1]["variants"]) == 3
    assert config.raw["tables"]["joint_seeds"]["perplexity"] == ["wikitext2_file"]


@pytest.mark.slow
def test_the_small_edition_has_every_table_and_quotes_nothing_of_other_models():
    small = Config(merged(SMALL))
    released = {"released_7b", "released_70b", "released_qwen_7b"}
    assert set(small.raw["tables"]) == set(Config(merged()).raw["tables"]) - released
    assert set(small.raw["figures"]) >= {"fig1a", "fig1b", "fig4", "fig5", "fig7"}
    for entry in [*small.raw["tables"].values(), *small.raw["figures"].values()]:
        assert entry.get("models", ["smollm2-135m"]) == ["smollm2-135m"]
        assert ("mentions" in entry) == (entry.get("device") == "cuda")  # products are the same of any model
    assert "published" not in small.raw["models"]["smollm2-135m"]
    made = {p for e in small.raw["tables"].values() for p in small.artefacts(e)}
    assert not any("wikitext2" in path or "piqa" in path for path in made)
    used = {small.parsed[r].calibration or "" for e in small.raw["tables"].values() for r, _ in small.rows(e)}
    assert {name.removesuffix("-reversed") for name in used} <= {
        "", "sotu_20th", "sotu_19th", "sotu_20th-seed1", "sotu_20th-seed2",
        "sotu_few", "sotu_many", "generated", "mixed",
    }  # fmt: skip


def test_rows_without_their_local_files_are_left_out_and_named(tmp_path):
    (tmp_path / "large.safetensors").touch()
    source = {"source": "path", "path": str(tmp_path / "{model}.safetensors")}
    rotation = {"kind": "file", "source": source}
    changes = {
        "rotations__mine": rotation,
        "recipes__turned": {"method": "rtn", "bits": 4, "rotation": "mine"},
        "tables__t__rows": ["dense", "turned"],
        "tables__alone": {"title": "A", "models": ["small"], "rows": ["turned"], "perplexity": ["wiki"]},
        "tables__there": {"title": "B", "models": ["large"], "rows": ["turned"], "perplexity": ["wiki"]},
    }
    kept = Config(replaced(RAW, **changes)).raw["tables"]
    assert kept["t"]["rows"] == ["dense", "turned"] and "alone" in kept
    found = Config(replaced(RAW, **changes, skip_missing=True)).raw["tables"]
    assert found["t"]["rows"] == ["dense"] and found["there"]["rows"] == ["turned"] and "alone" not in found
    assert found["t"]["note"].endswith(f"Left out, files not found: turned ({tmp_path}/small.safetensors).")
