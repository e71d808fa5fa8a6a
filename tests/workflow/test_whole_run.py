"""The whole workflow on a tiny trained model: results, reruns, refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

from helpers.configs import replaced
from helpers.paths import ROOT
from helpers.workflow_runs import CONFIG, SMOKE, snakemake
from obr.data.sampling import document_windows
from obr.data.token_windows import load_tokens

pytestmark = pytest.mark.workflow


def jobs(folder: Path, config: dict, *arguments: str, **options) -> dict[str, int]:
    """What a dry run lists: jobs by rule."""
    run = snakemake(folder, config, "--dry-run", *arguments, **options)
    assert run.returncode == 0, run.stdout
    table = re.search(r"^Job stats:\n.*?^total", run.stdout, re.M | re.S)
    found = re.findall(r"^(\w+) +(\d+)$", table[0], re.M) if table else []
    return {rule: int(count) for rule, count in found if rule != "all"}


def changed(**changes) -> dict:
    """The config with some values replaced, their places written with double underscores."""
    return replaced(CONFIG, **changes)


def test_second_run_does_nothing(finished):
    for table in CONFIG["tables"]:
        for kind in (".csv", ".md", ".tex"):
            assert (finished / SMOKE / "tables" / f"{table}{kind}").stat().st_size
    for figure in CONFIG["figures"]:
        for kind in (".pdf", ".png"):
            assert (finished / SMOKE / "figures" / f"{figure}{kind}").stat().st_size > 1000
    assert jobs(finished, CONFIG) == {}
    assert "Nothing to be done" in snakemake(finished, CONFIG).stdout


def test_json_files_are_valid_json(finished):
    """Infinity and NaN are not, though Python reads them."""
    files = list((finished / SMOKE).rglob("*.json"))
    for path in files:
        json.loads(path.read_text(), parse_constant=lambda word, path=path: pytest.fail(f"{path} holds {word}"))
    assert len(files) > 30


def test_evaluations_name_their_special_tokens(finished):
    notes = {name: (finished / SMOKE / "tables" / f"{name}.md").read_text() for name in ("zero_shot", "last_word")}
    assert "Zero-shot prompts: no special tokens." in notes["zero_shot"]
    assert "dropped; no special tokens;" in notes["zero_shot"]  # of perplexity: the tokenizer adds none
    assert "Zero-shot prompts: a BOS token before each prompt." in notes["last_word"]
    scores = json.loads((finished / SMOKE / "evaluations/tiny/dense/a16.json").read_text())
    score = scores["zero_shot"]["last_word"]
    assert score["output_type"] == "loglikelihood" and score["n"] == 12 and score["perplexity"] > 1


def test_changed_special_tokens_rerun_dependent_jobs(finished):
    found = jobs(finished, changed(zero_shot__last_word__bos=False))
    assert found == {"evaluate": 1, "table": 3, "figure": 1}  # each that reads the scores of that checkpoint
    found = jobs(finished, changed(calibrations__train__bos="window"))
    assert found["calibrate"] == 1 and found["hessian"] == 3 and "evaluate" in found
    assert set(jobs(finished, changed(perplexity__heldout__bos="window"))) == {"evaluate", "table", "figure"}


def test_the_orderings_of_the_table(finished):
    table = pd.read_csv(finished / SMOKE / "tables" / "smoke.csv")
    column = next(c for c in table.columns if "heldout" in c and "ours" in c)
    value = table.set_index(["recipe", "activations"])[column]
    assert value["obr_gptq", "a16"] < value["obr_gptq", "a4kv4"]
    value = value.xs("a16", level="activations")
    assert value["dense"] == value.min() and value["dense"] < 150
    assert value["obr_gptq"] < value["obr_gptq_2_4"] and value["obr_gptq"] < value["wanda"]
    # Windows of which the model wrote half serve at least half as well.
    assert value["obr_gptq_mixed"] - value["obr_gptq"] < 0.5 * (value["wanda"] - value["obr_gptq"])
    assert value["obr_gptq_sequential"] < value["wanda"]


def test_changing_alpha_reruns_that_recipe_only(finished):
    assert jobs(finished, changed(recipes__obr_rtn__alpha=0.25)) == {
        "compress": 1, "evaluate": 1, "table": 1, "figure": 2,
    }  # fmt: skip


def test_changing_activation_bits_reruns_that_evaluation_only(finished):
    assert jobs(finished, changed(activations={"a4kv4": {"keys": {"bits": 5}}})) == {"evaluate": 1, "table": 1}


def test_changing_a_pattern_reruns_that_recipe_only(finished):
    assert jobs(finished, changed(recipes__obr_gptq_2_4__pattern="4:8")) == {
        "compress": 1, "evaluate": 1, "table": 1, "figure": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "first", "untouched"),
    [
        ("heldout.txt", "download_text", "compress"),
        ("train.txt", "download_text", "download_model"),
        ("model/config.json", "download_model", "download_text"),
    ],
)
def test_a_local_source_that_changes_reruns_what_reads_it(finished, tiny_folder, tmp_path, name, first, untouched):
    copy = tmp_path / "tiny"
    shutil.copytree(tiny_folder, copy)
    assert jobs(finished, CONFIG, OBR_TINY=str(copy)) == {}  # the same contents under another modification time
    with (copy / name).open("a", encoding="utf-8") as file:
        file.write("\n")
    os.utime(copy / name, (0, 0))  # older than every result
    found = jobs(finished, CONFIG, OBR_TINY=str(copy))
    assert found[first] == 1 and "table" in found and untouched not in found, found


def test_a_new_label_compresses_nothing(finished):
    assert set(jobs(finished, changed(recipes__obr_gptq__label="other"))) == {"table", "figure"}


def test_adding_a_task_runs_its_evaluations_only(finished):
    config = changed(tables__zero_shot__zero_shot=["continuation", "another"])
    config["zero_shot"]["another"] = {**config["zero_shot"]["continuation"]}
    config["zero_shot"]["another"]["source"] = {"source": "cloze", "task": "another", "n": 10, "seed": 1}
    found = jobs(finished, config)
    assert found["download_task"] == 1 and found["evaluate"] == 2 and "compress" not in found


def test_scoring_more_examples_fetches_nothing(finished):
    found = jobs(finished, changed(zero_shot__continuation__limit=8))
    assert found["evaluate"] == 2 and set(found) == {"evaluate", "table", "figure"}


def test_another_seed_of_the_rotation_reruns_what_is_rotated(finished):
    found = jobs(finished, changed(rotations__quarot__seed=1))
    assert found["download_rotation"] == 1 and found["hessian"] == 2
    assert found["compress"] == 7 and found["gradients"] == found["sensitivity"] == found["allocate"] == 1
    assert "calibrate" not in found and "download_model" not in found


def test_another_budget_is_allocated_from_the_same_measurements(finished):
    found = jobs(finished, changed(recipes__allocated__allocation={"bits": 2.5, "options": "few"}))
    assert found == {"allocate": 1, "compress": 1, "evaluate": 1, "table": 1, "figure": 2}
    fewer = CONFIG["layer_options"]["few"][1:]
    found = jobs(finished, changed(layer_options__few=fewer))
    assert found["sensitivity"] == found["allocate"] == found["compress"] == 1 and "gradients" not in found


def test_layers_get_what_was_allocated_to_them(finished):
    told = json.loads((finished / SMOKE / "allocations/tiny/allocated.json").read_text())
    layers = pd.read_csv(finished / SMOKE / "compressed/tiny/allocated/layers.csv")
    assert list(layers["bits"]) == [told["options"][layer["option"]]["bits"] for layer in told["layers"]]
    assert told["bits_per_weight"] <= 3.0 and told["loss"] <= min(
        alike["loss"] for alike in told["uniform"].values() if alike["bits_per_weight"] <= 3.0
    )
    manifest = json.loads((finished / SMOKE / "compressed/tiny/allocated/manifest.json").read_text())
    assert manifest["bits_per_weight"]["theoretical"] == pytest.approx(told["bits_per_weight"])


def test_a_lost_result_is_rebuilt_with_its_tables(finished):
    lost = finished / SMOKE / "evaluations/tiny/wanda/a16.json"
    whole = lost.read_bytes()
    lost.unlink()
    try:
        assert jobs(finished, CONFIG) == {"evaluate": 1, "table": 1, "figure": 1}
    finally:
        lost.write_bytes(whole)
        run = snakemake(finished, CONFIG, "--touch")
        assert run.returncode == 0


def test_editing_code_reruns_what_depends_on_it(finished, tmp_path):
    """In a copy of the source: the restoration's code leaves Hessians alone, comments leave everything alone."""
    source = tmp_path / "source"
    for part in ("workflow", "config"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("Snakefile", "config.yaml"):
        shutil.copy(ROOT / part, source)
    module = source / "workflow" / "obr" / "methods" / "restore.py"
    text = module.read_text()

    module.write_text(text + "\n# A comment.\n")
    untouched = jobs(finished, CONFIG, source=source)
    assert not {"compress", "hessian", "evaluate"} & set(untouched)

    module.write_text(text + "\nSOMETHING_NEW = 1\n")
    found = jobs(finished, CONFIG, source=source)
    assert found["compress"] == 9 and found["evaluate"] == 10 and found["sensitivity"] == 1
    assert not {"hessian", "gradients", "calibrate", "download_model", "download_rotation"} & set(found)


def test_target_or_only_models_limits_jobs(finished):
    fresh = finished / "fresh"
    fresh.mkdir(exist_ok=True)
    found = jobs(fresh, CONFIG, str(SMOKE / "tables/zero_shot.csv"))
    assert found["compress"] == 2 and found["evaluate"] == 2 and found["table"] == 1
    two = changed(models__other=CONFIG["models"]["tiny"], tables__smoke__models=["tiny", "other"])
    assert jobs(fresh, two)["download_model"] == 2
    assert jobs(fresh, two, "--config", "only_models=[other]")["download_model"] == 1


def test_the_printed_command_is_the_recipe(finished):
    """A rule's shell line, run by hand, makes the same artefact."""
    target = finished / SMOKE / "evaluations/tiny/obr_gptq/a16.json"
    before = json.loads(target.read_text())
    shown = snakemake(finished, CONFIG, "--dry-run", "--printshellcmds", "--forcerun", "evaluate").stdout
    command = next(
        c for c in re.findall(r"^Shell command: (obr evaluate .*)$", shown, re.M) if "/obr_gptq/a16.json" in c
    )
    command = re.sub(r">\S+ 2>&1", "", command).replace(str(SMOKE / "evaluations"), "by_hand")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(command, shell=True, check=True, cwd=finished, env={**os.environ, "PATH": path})
    again = json.loads((finished / "by_hand/tiny/obr_gptq/a16.json").read_text())
    for kind, name in (("perplexity", "heldout"), ("zero_shot", "continuation")):
        assert again[kind][name]["value"] == pytest.approx(before[kind][name]["value"], rel=1e-6)


def test_the_report_is_one_file(finished):
    run = snakemake(finished, CONFIG, "--report", "report.html")
    assert run.returncode == 0, run.stdout[-3000:]
    page = (finished / "report.html").read_text()
    assert "A tiny model" in page and "layers/tiny/obr_gptq.csv" in page


def test_the_crate_has_every_job_and_the_files_between_them(finished):
    run = snakemake(finished, CONFIG, "--reporter", "fairscape", "--report-fairscape-path", "crate.json")
    assert run.returncode == 0, run.stdout[-3000:]
    graph = json.loads((finished / "crate.json").read_text())["@graph"]
    names = {entity["@id"]: entity.get("name", "") for entity in graph}
    computed = [e for e in graph if "https://w3id.org/EVI#Computation" in e["@type"]]
    (compression,) = [e for e in computed if "compress" in e["name"] and "recipe=obr_gptq)" in e["name"]]
    made = {names[entity["@id"]] for entity in compression["generated"]}
    read = {names[entity["@id"]] for entity in compression["usedDataset"]}
    assert "obr compress --recipe method=obr_gptq" in compression["command"]
    assert {"obr_gptq", "obr_gptq.json", "obr_gptq.csv"} <= made and {"source.json", "tiny.safetensors"} <= read
    assert len(computed) > 10


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"nonsense": 1}, "nonsense"),
        ({"recipes__obr_rtn__sparsity": 1.2}, "1.2"),
        ({"recipes__obr_rtn__method": "magic"}, "magic"),
        ({"zero_shot__last_word__bos": "window"}, "zero_shot.last_word.bos"),
        ({"calibrations__generated__bos": True}, "calibrations.generated.bos is true, which is of windows of a text"),
        ({"tables__smoke__models": ["gone"]}, "tables.smoke.models is 'gone', which models does not define"),
        (
            {"only_models": ["gone"]},
            "only_models is 'gone', which models does not define; it defines tiny, llama-2-7b",
        ),
        ({"texts__train__path": "$OBR_TINY/gone.txt"}, "gone.txt does not exist; correct the path"),
        ({"models__tiny__source__path": "$UNSET_FOLDER/model"}, "names an environment variable that is not set"),
        (
            {"recipes__allocated__allocation__options": "gone"},
            "is 'gone', which layer_options does not define; it defi",
        ),
        ({"recipes__obr_rtn__pattern": "7:14"}, "Pattern 7:14 does not divide the 96 input columns"),
        ({"models": {"../evil": CONFIG["models"]["tiny"]}}, "../evil"),
    ],
)
def test_bad_configs_are_refused_before_any_job(finished, changes, sentence):
    run = snakemake(finished, changed(**changes))
    assert run.returncode != 0 and sentence in run.stdout, run.stdout[-3000:]
    assert "Traceback" not in run.stdout and "localrule" not in run.stdout


def test_a_calibration_of_documents_reads_a_texts_rows_kept_apart(finished, tiny_folder):
    spec = {"text": "train", "sampling": "documents", "nsamples": 4, "seqlen": 64, "seed": 0}
    target = SMOKE / "calibration/apart/tiny.safetensors"
    config = changed(calibrations__apart=spec)
    assert jobs(finished, config, str(target)) == {"download_documents": 1, "calibrate": 1}
    run = snakemake(finished, config, str(target))
    assert run.returncode == 0, run.stdout[-3000:]
    tokens, about = load_tokens(finished / target)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    text = (tiny_folder / "train.txt").read_text()
    assert torch.equal(tokens, document_windows(tokenizer, [text], 4, 64, seed=0)) and about["documents"] == 1
    assert jobs(finished, changed(calibrations__apart=spec, texts__train__strip=True), str(target)).keys() >= {
        "download_documents", "calibrate",
    }  # fmt: skip


def test_a_pattern_that_does_not_fit_stops_before_the_hessians(finished, tmp_path):
    """Even if the model's sizes are only known once it is downloaded."""
    run = snakemake(tmp_path, changed(recipes__obr_rtn__pattern="7:14"), "--until", "check_model")
    assert run.returncode != 0 and "7:14 does not divide the 96 input columns of q, k, v" in run.stdout
    assert not (tmp_path / SMOKE / "hessians").exists()


HUB = {"source": "hub", "repo": "nobody/nothing", "revision": "main"}


def test_a_hub_out_of_reach_is_told_in_a_sentence(finished):
    run = snakemake(
        finished, changed(models__remote={"source": HUB}), "--retries", "0", str(SMOKE / "models/remote/config.json"),
        HF_ENDPOINT="http://127.0.0.1:9",
    )  # fmt: skip
    assert run.returncode != 0
    sentence = next(line for line in run.stdout.splitlines() if line.strip().startswith("obr: "))
    assert "nobody/nothing" in sentence and "Traceback" not in run.stdout


def test_a_wrong_hash_is_told_and_nothing_else_is_lost(finished, tiny_folder):
    wrong = {**CONFIG["texts"]["train"], "sha256": "0" * 64}
    run = snakemake(finished, changed(texts__wrong=wrong), "--retries", "0", str(SMOKE / "texts/wrong.txt"))
    assert run.returncode != 0 and "sha256" in run.stdout and "Traceback" not in run.stdout
    assert not (finished / SMOKE / "texts/wrong.txt").exists()
    assert jobs(finished, CONFIG) == {}
