"""Tables and the published numbers they quote, on a small fabricated results folder."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from helpers.fabricated_results import (
    CONFIG,
    ENTRY,
    OBR_A16,
    RECIPES,
    TABLE_1,
    TASKS,
    change_scores,
    evaluation,
    fabricate,
    save,
    write_checkpoint,
)
from helpers.paths import PUBLISHED
from obr.errors import ObrError
from obr.report import published, table
from obr.report.table_rows import metrics_of
from obr.runtime.files import finite


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return fabricate(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def numbers() -> pd.DataFrame:
    return published.load(PUBLISHED)


def build(results, **changes):
    return table.build(CONFIG | {"tables": {"main": {**ENTRY, **changes}}}, "main", results, PUBLISHED)


def cell(built, model, recipe, column):
    frame = built.frame
    return frame.loc[(frame["model"] == model) & (frame["recipe"] == recipe), column].item()


# --- Published numbers


def test_published_numbers_all_load(numbers):
    assert len(numbers) == 1554
    assert numbers["value"].dtype == float
    assert numbers["value"].isna().sum() == 6  # printed nan
    assert (numbers["value"] == 1e3).any()
    assert set(numbers["w_bits"]) >= {"4", "1.58", ""}


def test_lookup_finds_one_number_none_or_refuses(numbers):
    asked = {**TABLE_1, "model": "Llama-2-7B", "method": "OBR_GPTQ", "metric": "wikitext2_ppl"}
    assert published.lookup(numbers, **asked) == 8.40
    assert published.lookup(numbers, **{**asked, "w_bits": 4, "sparsity": 0.5}) == 8.40
    assert published.lookup(numbers, **{**asked, "w_bits": 3}) is None
    with pytest.raises(ObrError, match=r"different published values.*add a filter by .*model"):
        published.lookup(numbers, **TABLE_1, method="OBR_GPTQ", metric="wikitext2_ppl")
    with pytest.raises(ObrError, match="OBR_GTPQ"):
        published.lookup(numbers, **{**asked, "method": "OBR_GTPQ"})
    with pytest.raises(ObrError, match="no column 'bits'"):
        published.lookup(numbers, bits=4)


def test_lookup_tells_calibrations_apart_by_their_note(numbers):
    asked = {
        "table": "OBR Table 9",
        "model": "Llama-2-7B",
        "method": "SparseGPT+GPTQ",
        "metric": "wikitext2_ppl",
    }
    with pytest.raises(ObrError, match="note"):
        published.lookup(numbers, **asked)
    assert published.lookup(numbers, **asked, note="calibration set c4") == 18.36
    with pytest.raises(ObrError, match=re.escape("has note 'calibration.*c4'")):  # a text, not a pattern
        published.lookup(numbers, **asked, note="calibration.*c4")


@pytest.mark.parametrize("text", ["source,value\nobr,1\n", None])
def test_a_damaged_file_is_refused(tmp_path, text):
    path = tmp_path / "results.csv"
    path.write_text(text or ",".join(published.COLUMNS) + "\n" + "x," * 10 + '"5,47",\n')
    with pytest.raises(ObrError, match="columns" if text else "not a number"):
        published.load(path)


@pytest.mark.parametrize(
    "column, text, words", [("w_bits", "four", "a number of bits"), ("sparsity", "50", "a fraction below 1 or")]
)
def test_invalid_bit_width_or_sparsity_is_refused(tmp_path, column, text, words):
    line = dict.fromkeys(published.COLUMNS, "") | {"value": "1", column: text}
    path = tmp_path / "results.csv"
    pd.DataFrame([line]).to_csv(path, index=False)
    with pytest.raises(ObrError, match=f"line 2: {column} '{text}' is not {words}"):
        published.load(path)


# --- Building


def test_table_holds_paper_ours_and_difference(results):
    built = build(results)
    assert len(built.frame) == 8
    assert cell(built, "llama", "obr", "wikitext2_paper") == 8.40
    assert cell(built, "llama", "obr", "wikitext2_delta") == pytest.approx(8.1 - 8.40)
    assert cell(built, "llama", "dense", "piqa_paper") == 79.11
    assert cell(built, "llama", "dense", "piqa_ours") == pytest.approx(75.0)
    assert cell(built, "llama", "dense", "piqa_stderr") == pytest.approx(1.0)
    assert cell(built, "llama", "obr", "mean_ours") == pytest.approx(75 - 4 - 2.5)
    assert cell(built, "llama", "obr", "mean_stderr") == pytest.approx(1 / math.sqrt(6))
    assert cell(built, "llama", "obr", "mean_paper") == 53.45
    assert cell(built, "llama", "obr", "bits_per_weight_file") == pytest.approx(3.03)
    assert math.isnan(cell(built, "tiny", "obr", "wikitext2_paper"))  # a model of no paper
    assert math.isnan(cell(built, "llama", "obr_cached", "wikitext2_paper"))  # a row of no paper
    assert cell(built, "llama", "obr", "setting") == "W4A4KV4"
    assert cell(built, "llama", "rtn", "setting") == "W3A4KV4"


def test_notes_come_from_the_artefacts(results):
    notes = "\n".join(build(results).notes)
    for text in (
        "A note of the config.",
        "WikiText-2 perplexity: exp of the mean cross-entropy; 141 windows of 2,048 tokens, 288,768 tokens",
        "sotu perplexity: exp of the mean cross-entropy; 20 windows",
        "PIQA acc of the first 200",
        "PIQA acc of 200",
        "Calibration: wikitext2, 262,144 tokens.",
        "Hessians: sequential, of each block's inputs",
        "Hessians: cached, of the dense model, rotated where the recipe rotates (OBR, cached).",
        "Evaluated on cpu.",
        "Versions: torch 2.13.0.",
        "Llama-2-7B: OBR (GPTQ): the paper prints a mean of 53.45, its six tasks give 57.68; 53.45 is",
        "Figure 1a prints 9.03 for it at 4 bits",
    ):
        assert text in notes
    assert len(set(build(results).notes)) == len(build(results).notes)
    assert "Mask" not in notes


def test_a_note_says_which_norms_wandas_masks_are_from(results, monkeypatch):
    monkeypatch.setitem(RECIPES, "obr_24", {**RECIPES["obr_24"], "mask": "wanda_harmonic"})
    notes = [note for note in build(results, rows=["obr_24", "rtn"]).notes if note.startswith("Mask")]
    released = (
        "Mask wanda_harmonic: norms from a sum in which calibration sequence i counts 1/i, as in the released code"
    )
    assert notes == [f"{released}."]
    notes = [note for note in build(results, rows=["obr_24", "rtn", "obr"]).notes if note.startswith("Mask")]
    mean = "Mask wanda: norms from the mean over calibration sequences (OBR (GPTQ))."
    assert notes == [f"{released} (OBR 2:4).", mean]


def test_the_note_on_times_says_whether_cached_hessians_are_left_out(results):
    for rows, rest in (
        (["obr", "obr_cached"], "; cached Hessians, collected once for all recipes, are not in it"),
        (["obr"], ""),
    ):
        notes = [note for note in build(results, rows=rows, time=True).notes if note.startswith("Compression:")]
        assert notes == [
            f"Compression: wall-clock of a recipe's compression as its run recorded it, here on cpu{rest}."
        ]


def test_rows_of_one_label_keep_their_own_calibrations(results, tmp_path):
    copy = shutil.copytree(results, tmp_path / "results")
    path = copy / "manifests" / "llama" / "obr_24.json"
    save(path, {**json.loads(path.read_text()), "calibration": {"text": "other", "tokens": 9}})
    rows = [{"recipe": "obr", "label": "OBR"}, {"recipe": "obr_24", "label": "OBR"}]
    notes = [note for note in build(copy, rows=rows, models=["llama"]).notes if note.startswith("Calibration:")]
    assert len(notes) == 2 and notes[0].endswith("(OBR).")
    assert "9 tokens of other" in notes[1] and notes[1].endswith("(OBR [obr_24]).")


def test_notes_say_how_many_examples_a_prompt_has(results, tmp_path):
    copy = shutil.copytree(results, tmp_path / "results")
    for path in copy.glob("evaluations/*/*/*.json"):
        change_scores(path, "zero_shot", TASKS[0], num_fewshot=5)
    (note,) = [note for note in build(copy, models=["llama"]).notes if "accuracy in percent" in note]
    assert note.startswith("Tasks: ") and note.count("(5-shot)") == 1
    (note,) = [note for note in build(results, models=["llama"]).notes if "accuracy in percent" in note]
    assert note.startswith("Zero-shot: ") and "shot)" not in note


def test_a_mean_over_seeds_lacks_no_seed():
    records = [{"wiki_ours": 1.0}, {"wiki_ours": math.nan}]
    assert all(map(math.isnan, table._averaged(records).values()))
    assert table._averaged([{"wiki_ours": 1.0}, {"wiki_ours": 3.0}])["wiki_ours"] == 2


def test_the_text_of_a_calibration_of_another_name_is_told(tmp_path):
    for key in ("dense", "obr"):
        shared = {"device": "cpu", "versions": {"torch": "2.13.0"}, "seconds": 1.0}
        write_checkpoint(tmp_path, "llama", key, RECIPES[key], shared)
    path = tmp_path / "manifests" / "llama" / "obr.json"
    manifest = json.loads(path.read_text())
    for text, of in (("wikitext2", ""), ("speeches", " of speeches")):
        save(path, manifest | {"calibration": {"tokens": 262144, "text": text}})
        built = build(tmp_path, models=["llama"], rows=["dense", "obr"], perplexity=[], zero_shot=[], mean=False)
        assert f"Calibration: wikitext2, 262,144 tokens{of}." in built.notes


def test_a_mean_of_other_tasks_is_not_set_against_the_papers(results):
    built = build(results, zero_shot=["piqa", "boolq"])
    assert cell(built, "llama", "obr", "mean_ours") == pytest.approx(75 - 4 - 0.5)
    assert built.frame["mean_paper"].isna().all()
    assert any("not the paper's six tasks" in note for note in built.notes)


def test_a_checkpoint_has_a_row_for_each_activation_scheme(results):
    frame = build(results, rows=["obr", OBR_A16], models=["llama"]).frame
    assert frame["recipe"].tolist() == ["obr", "obr"] and frame["activations"].tolist() == ["a4kv4", "a16"]
    assert frame["setting"].tolist() == ["W4A4KV4", "W4A16KV16"]
    assert frame["wikitext2_ours"].tolist() == [8.1, 7.5]
    assert frame["bits_per_weight_theoretical"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ["obbr"]}, "'obbr' is not in the config"),
        (
            {"rows": [{"recipe": "obr", "activations": "a3"}]},
            "activations of recipe obr is 'a3', which activations do",
        ),
        ({"models": ["lama"]}, "'lama' is not in the config"),
        ({"rows": []}, "no rows"),
        ({"details": ["speed"]}, "'speed' is unknown"),
        ({"zero_shot": []}, "mean of no tasks"),
        (
            {"rows": [{"recipe": "obr", "published": {"method": "OBR_GPTQ", "w_bits": 3}}]},
            "Nothing is published",
        ),
    ],
)
def test_invalid_table_entry_names_key_and_value(results, changes, message):
    with pytest.raises(ObrError, match=message):
        build(results, **changes)


def test_a_missing_artefact_names_its_target(results, tmp_path):
    copy = shutil.copytree(results, tmp_path / "results")
    path = evaluation(copy, "llama", "obr", "a4kv4")
    path.unlink()
    with pytest.raises(ObrError, match=rf"{path} is missing; build it with `snakemake {path}`"):
        build(copy)
    path.write_text('{"value": ')
    with pytest.raises(ObrError, match="not valid JSON"):
        build(copy)
    path.write_text('{"perplexity": {}}')
    with pytest.raises(ObrError, match="has no perplexity wikitext2; build it with"):
        build(copy)


# --- Printing


@pytest.fixture(scope="module")
def written(results, tmp_path_factory) -> Path:
    stem = tmp_path_factory.mktemp("tables") / "main.results"
    table.write(build(results), stem)
    return stem


def test_csv_keeps_all_digits(written, results):
    frame = pd.read_csv(f"{written}.csv")
    expected = build(results).frame
    assert list(frame.columns) == list(expected.columns)
    assert frame["mean_stderr"].tolist() == expected["mean_stderr"].tolist()
    assert not list(written.parent.glob(".*"))


def test_markdown_prints_values_and_dashes(written):
    lines = Path(f"{written}.md").read_text(encoding="utf-8").splitlines()
    rows = {line.split(" | ")[1]: line for line in lines[4:12] if line.startswith("| Llama")} | {
        line.split("|")[2].strip(): line for line in lines[5:8]
    }
    assert "| WikiText-2 ↓ paper | WikiText-2 ↓ ours | WikiText-2 ↓ Δ | sotu ↓ | PIQA ↑ paper |" in lines[2]
    assert "| W4A4KV4 | 50% | **8.40** | **8.10** | −0.30 |" in rows["OBR (GPTQ)"]
    assert "71.00 ± 1.00" in rows["OBR (GPTQ)"]
    assert "3.00 / 3.03 | 2.5 | 0.1000 | 50.10 |" in rows["OBR (GPTQ)"]
    assert "| – | 8.30 | – |" in rows["OBR, cached"]
    assert "**" not in rows["Dense"]  # the best of all, but not compressed


def test_columns_without_values_are_left_out(results, tmp_path):
    table.write(build(results, models=["tiny"], rows=["dense", "rtn"], details=[]), tmp_path / "t")
    heading = (tmp_path / "t.md").read_text().splitlines()[2]
    assert "paper" not in heading and "Δ" not in heading and "Sparsity" not in heading


@pytest.mark.parametrize("value, shown", [(math.inf, "inf | +inf"), (math.nan, "nan | –")])
def test_an_overflown_perplexity_is_printed(results, tmp_path, value, shown):
    copy = shutil.copytree(results, tmp_path / "results")
    path = evaluation(copy, "llama", "obr", "a4kv4")
    change_scores(path, "perplexity", "wikitext2", **finite("value", value))
    assert "Infinity" not in path.read_text() and "NaN" not in path.read_text()
    table.write(build(copy, models=["llama"]), tmp_path / "t")
    assert f"| **8.40** | {shown} |" in (tmp_path / "t.md").read_text()
    assert shown.split()[0] in (tmp_path / "t.html").read_text().split("<tbody>")[1]
    assert shown.split()[0] in (tmp_path / "t.tex").read_text()
    assert pd.read_csv(tmp_path / "t.csv")["wikitext2_ours"][2] == pytest.approx(value, nan_ok=True)


def test_notes_say_how_prompts_were_tokenised_and_what_lacks_bos(results, tmp_path):
    copy = shutil.copytree(results, tmp_path / "results")
    for path in copy.glob("evaluations/llama/*/*.json"):
        change_scores(path, "zero_shot", prompts="no special tokens")
    assert "Zero-shot prompts: no special tokens." in build(copy).notes
    for path in copy.glob("evaluations/tiny/*/*.json"):
        change_scores(path, "zero_shot", prompts="a BOS token before each prompt", note="none there")
        change_scores(path, "perplexity", "sotu", note="19 of 20 windows have none")
    path = copy / "manifests" / "tiny" / "obr.json"
    save(path, {**json.loads(path.read_text()), "calibration": {"tokens": 9, "note": "3 of 4 windows have none"}})
    notes = build(copy).notes
    for text in (
        "Zero-shot prompts: no special tokens (Llama-2-7B).",
        "Zero-shot prompts: a BOS token before each prompt (Tiny_1 & co).",
        "Zero-shot (Tiny_1 & co): none there.",
        "Perplexity (Tiny_1 & co): 19 of 20 windows have none.",
        "Calibration (Tiny_1 & co): 3 of 4 windows have none.",
    ):
        assert notes.count(text) == 1, text


def test_means_stand_beside_the_mean_over_the_same_tasks():
    def name(tasks) -> str:
        return next(m.published for m in metrics_of({"zero_shot": tasks, "mean": True}) if m.key == "mean")

    nine = ["boolq", "hellaswag", "lambada_openai", "openbookqa", "piqa", "social_iqa", "winogrande"]
    assert name(TASKS) == "zeroshot_avg"
    assert name([*nine, "arc_easy", "arc_challenge"]) == "zeroshot9_avg"
    assert name([*TASKS, "lambada_openai"]) == name(TASKS[:5]) == ""


def test_latex_is_whole_and_escaped(written):
    text = Path(f"{written}.tex").read_text(encoding="utf-8")
    assert r"\caption{Main results (50\% \& W4A4KV4)}" in text
    assert r"\label{tab:main.results}" in text
    assert r"Tiny\_1 \& co" in text
    assert r"\multicolumn{3}{c}{WikiText-2 $\downarrow$}" in text
    assert text.count("{") == text.count("}")
    panels = text.split(r"\begin{tabular}{")[1:]
    assert len(panels) == 4
    for panel in panels:
        bodies = [line for line in panel.split(r"\midrule", 1)[1].splitlines() if line.endswith(r"\\")]
        assert len(bodies) == 8
        assert {line.replace(r"\&", "").count("&") + 1 for line in bodies} == {len(panel.split("}")[0])}


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_compiles(written, tmp_path):
    document = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\input{table}\end{document}"
    shutil.copy(f"{written}.tex", tmp_path / "table.tex")
    (tmp_path / "main.tex").write_text(document)
    run = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "main.tex"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
def test_tables_do_not_import_torch():
    code = "import sys, obr.report.published, obr.report.table, obr.report.figures.draw\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("path", sorted(PUBLISHED.parents[1].glob("report/*.rst")), ids=lambda path: path.stem)
def test_report_captions_render(path):
    """As Snakemake does: Jinja with the job's config and wildcards, then reStructuredText."""
    jinja2, core = pytest.importorskip("jinja2"), pytest.importorskip("docutils.core")
    config = CONFIG | {"tables": {"main": ENTRY}}
    config["figures"] = {"bits": {"kind": "perplexity_bits", "title": "Size", "models": ["tiny"]}}
    wildcards = {"table": "main", "figure": "bits", "model": "tiny", "recipe": "obr", "device": "cpu"}
    job = SimpleNamespace(config=config, wildcards=SimpleNamespace(**wildcards))
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(path.read_text()).render(snakemake=job)
    html = core.publish_parts(text, writer="html", settings_overrides={"halt_level": 2})["body"]
    expected = {
        "table": "Main results",
        "figure": "Size",
        "errata": "printed numbers",
        "layers": "obr",
        "kernels": "cpu",
        "workflow": "Optimal Brain Restoration",
    }
    assert expected[path.stem] in html
    assert "{{" not in html and "None" not in html
