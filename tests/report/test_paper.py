"""Every table and figure of the experiments, from fabricated artefacts: filters, seeds, rows that only quote."""

import json
import math
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
import pytest

from helpers.configs import merged
from helpers.fabricated_results import evaluation
from helpers.paths import PUBLISHED
from obr.config.recipe import Recipe
from obr.config.workflow import Config
from obr.report import published, table, table_rows
from obr.report.figures import draw, kernels

# Tables that the paper does not have.
NOT_QUOTING = ("hardware", "hessians", "rotations", "rotation_seeds")
NOT_QUOTING += ("equal_storage", "equal_storage_options", "equal_storage_other_text", "equal_storage_refined")
NOT_QUOTING += ("joint", "joint_a4", "joint_rotations", "joint_seeds", "joint_statistics", "joint_zero_shot")
SIX = published.PAPER_TASKS
LAYERS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("up", "gate", "down")]


def chance(name: str) -> float:
    """A number in [0, 1) that belongs to the name."""
    return crc32(name.encode()) / 2**32


def fabricate(config: Config, results: Path) -> Path:
    """Every artefact that some table or figure of the config is made of."""
    entries = [*config.raw["tables"].values(), *config.raw["figures"].values()]
    for path in sorted({path for entry in entries for path in config.artefacts(entry)}):
        (results / path).parent.mkdir(parents=True, exist_ok=True)
        stage, *names = path.split("/")
        if stage == "kernels":
            _kernels(config, names[0].removesuffix(".csv"), results / path)
        elif stage == "allocations":
            choice = _choice(config, names[1].removesuffix(".json"))
            (results / path).write_text(json.dumps(choice))
        elif stage == "rotations":
            (results / path).write_text("step,loss,held_out\n0,,0.6\n10,0.55,0.5\n20,0.5,0.45\n")
        elif stage == "layers":
            _layers(config, names[1].removesuffix(".csv"), results / path)
        elif stage == "evaluations":
            (results / path).write_text(
                json.dumps(_scores(config, names[0], names[1], names[2].removesuffix(".json")))
            )
        else:
            (results / path).write_text(json.dumps(_manifest(config, names[1].removesuffix(".json"))))
    return results


ABOUT = {"device": "cuda", "versions": {"torch": "2.13.0"}}


def _scores(config: Config, model: str, key: str, scheme: str) -> dict:
    recipe = config.evaluated(key, scheme)
    worse = (16 - min(recipe.bits, 8)) / 16 + recipe.sparsity + (16 - recipe.activations.bits) / 24
    asked, scores = config.scores[model, key, scheme], {"perplexity": {}, "zero_shot": {}}
    for text in asked["perplexity"]:
        value = 5 * math.exp(worse + 0.1 * chance(f"{model}{key}{scheme}{text}"))
        sizes = {"windows": 141, "seqlen": 2048, "tokens": 288768}
        scores["perplexity"][text] = ABOUT | {"value": value, "definition": "made up", **sizes}
    for task in asked["zero_shot"]:
        value = 0.8 - worse / 6 + 0.01 * chance(task)
        scores["zero_shot"][task] = ABOUT | {
            "value": value,
            "stderr": 0.01,
            "metric": "acc",
            "n": 1000,
            "limit": None,
        }
    return scores


def _manifest(config: Config, key: str) -> dict:
    recipe, about = config.evaluated(key, "a16"), ABOUT
    manifest = {"recipe": recipe.to_dict(), "seconds": 600 * (1 + chance(key)), "relative_error": 0.02}
    manifest |= {"bits_per_weight": {"theoretical": recipe.bits_per_weight, "file": recipe.bits_per_weight + 0.05}}
    calibration = {"tokens": 262144} if recipe.calibration else None
    return about | manifest | {"file_bytes": 3.2e9, "sparsity": recipe.sparsity, "calibration": calibration}


def _choice(config: Config, recipe: str) -> dict:
    options = config.recipes[recipe]["allocation"]["options"]
    layers = [
        {"block": block, "layer": layer, "option": (block + i) % len(options), "bits_per_weight": 3.0}
        for block in range(32)
        for i, layer in enumerate(LAYERS)
    ]
    return {"options": options, "layers": layers, "bits": 3.0, "bits_per_weight": 3.0, "loss": 0.1, "uniform": {}}


def _layers(config: Config, recipe: str, path: Path) -> None:
    rows = []
    for block in range(32):
        for i, layer in enumerate(LAYERS):
            error = 0.01 * (1 + i) * (1 + block / 8) * (1 + chance(recipe))
            zeros = config.parsed[recipe].sparsity + 0.12 + 0.01 * i + 0.001 * block
            sizes = {"rows": 4096, "columns": 11008 if "down" in layer else 4096}
            rows.append({"block": block, "layer": layer, **sizes, "relative_error": error, "zeros": zeros})
            rows[-1] |= {"sparsity": config.parsed[recipe].sparsity, "bits": config.parsed[recipe].bits}
    pd.DataFrame(rows).to_csv(path, index=False)


def _kernels(config: Config, device: str, path: Path) -> None:
    names = {"fp16": 1.0, "int8": 1.8, "fp16 2:4": 1.6, "int8 2:4": 2.9, "int4 (CUTLASS)": None}
    names |= {"int4 paired 4:8 (CUTLASS)": 5.8}
    rows = []
    for shape in config.raw["kernels"]["shapes"]:
        if shape.get("device", device) == device:
            dense = 2 * shape["tokens"] * shape["columns"] * shape["rows"] / 6e14 * 1000
            for kernel, speed in names.items():
                ms = math.nan if speed is None else dense / speed + 0.01
                row = {"shape": shape["name"], "kernel": kernel, "median_ms": ms, "p25_ms": ms, "p75_ms": 1.1 * ms}
                row |= {"status": "this build has no such kernel" if speed is None else "ok"}
                rows.append(row | {"tops_dense": 2 * shape["tokens"] * shape["columns"] * shape["rows"] / ms / 1e9})
    pd.DataFrame(rows).to_csv(path, index=False)


@pytest.fixture(scope="module")
def paper(tmp_path_factory) -> tuple[Config, Path]:
    config = Config(merged())
    return config, fabricate(config, tmp_path_factory.mktemp("paper"))


QUOTED: dict[int, bool] = {}  # lines of the published numbers that tables quote: whether ours are beside them


@cache
def built(paper, name: str) -> table.Table:
    """One table of the config; the numbers that it quotes are noted in QUOTED."""
    (config, results), rows = paper, published.Quotes.rows

    def noting(quotes, model, row, metric):
        chosen = rows(quotes, model, row, metric)
        if chosen is not None:
            QUOTED.update(dict.fromkeys(chosen.index, row.recipe is not None))
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published.Quotes, "rows", noting)
        return table.build(config.raw, name, results, PUBLISHED)


@pytest.mark.slow
@pytest.mark.parametrize("name", merged()["tables"])
def test_paper_tables_are_built_and_quote_printed_numbers(paper, tmp_path, name):
    made = built(paper, name)
    columns = [column for column in made.frame if column.endswith("_paper")]
    quoting = name not in NOT_QUOTING
    assert made.frame[columns].notna().any().any() == quoting
    table.write(made, tmp_path / name)
    text, page = ((tmp_path / f"{name}.{form}").read_text() for form in ("md", "html"))
    lines = page.split("<tbody>")[1].split("</tbody>")[0].split("</tr>")[:-1]
    assert len(lines) == len(made.frame) and len({line.count("<td") for line in lines}) == 1
    assert text.count("\n| ") >= len(made.frame) and "| nan |" not in text
    assert ("The paper's equations 9 and 10" in text) == (
        name not in ("table7", "ostquant", *NOT_QUOTING) or "OBR+RTN" in text
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", merged()["figures"])
def test_paper_figures_are_drawn(paper, tmp_path, monkeypatch, name):
    config, results = paper
    checked, save = [], draw.save

    def save_and_check(drawn, stem):  # under the style that the figure was drawn in
        save(drawn, stem)
        checked.append(assert_nothing_is_cut(drawn))

    monkeypatch.setattr(draw, "save", save_and_check)
    draw.draw(config.raw, name, results, PUBLISHED, tmp_path / name)
    assert (tmp_path / f"{name}.png").stat().st_size > 5000 and checked


def assert_nothing_is_cut(drawn) -> None:
    """All that is drawn lies on the page, and markers in their panels with all of their size."""
    found, (width, height) = drawn.get_tightbbox(), drawn.get_size_inches()
    assert min(found.x0, found.y0) >= -0.01 and found.x1 <= width + 0.01 and found.y1 <= height + 0.01, found.extents
    for panel in drawn.axes:
        room = panel.bbox.padded(0.1)
        for line in (line for line in panel.get_lines() if line.get_marker() not in ("None", "", None)):
            radius = (line.get_markersize() + line.get_markeredgewidth()) / 2 * drawn.dpi / 72
            for place in panel.transData.transform(np.asarray(line.get_xydata(), dtype=float)):
                if np.isfinite(place).all():
                    assert all(room.contains(*(place + way * radius)) for way in (-1, 1)), (line.get_marker(), place)


def test_figure_1a_draws_published_points_where_the_paper_does(paper, tmp_path, monkeypatch):
    config, results = paper
    drawn = []
    monkeypatch.setattr(draw, "save", lambda sheet, _: drawn.append(sheet))
    draw.draw(config.raw, "fig1a", results, PUBLISHED, tmp_path / "f")
    (panel,) = drawn[0].axes
    hollow = [line for line in panel.get_lines() if line.get_fillstyle() == "none" and line.get_marker() != "None"]
    found = sorted((round(float(x)), float(y)) for line in hollow for x, y in line.get_xydata() if math.isfinite(y))
    assert found == [(3, 8.4), (3, 132.97), (4, 7.7), (4, 9.03), (6, 6.24), (6, 13.36), (8, 6.1), (8, 6.5)]
    assert any(line.get_linestyle() == ":" and line.get_ydata()[0] == 5.5 for line in panel.get_lines())
    (legend,) = drawn[0].legends
    assert "Guesses" in legend.get_title().get_text()


def test_seeds_are_averaged_with_their_spread(paper):
    _, results = paper
    frame = built(paper, "seeds").frame.set_index("recipe")
    key = "obr_gptq-w4s50-quarot"
    files = [evaluation(results, "llama-2-7b", name, "a4kv4") for name in (key, f"{key}-seed1", f"{key}-seed2")]
    found = [json.loads(file.read_text())["perplexity"]["wikitext2"]["value"] for file in files]
    assert frame.loc[key, "wikitext2_ours"] == pytest.approx(np.mean(found))
    assert frame.loc[key, "wikitext2_stderr"] == pytest.approx(np.std(found, ddof=1))
    assert math.isnan(frame.loc["dense", "wikitext2_stderr"])
    assert any("over 3 seeds (0, 1, 2)" in note for note in built(paper, "seeds").notes)


def test_rows_that_only_quote_have_no_ours(paper):
    row = built(paper, "table8").frame.query("label.str.startswith('BitNet')").iloc[0]
    assert row["piqa_paper"] > 0 and math.isnan(row["piqa_ours"]) and math.isnan(row["wikitext2_ours"])


@pytest.mark.slow
def test_ostquant_table_sets_ours_beside_each_number(paper):
    """22 rows, six models, a perplexity and the mean over nine tasks."""
    numbers = published.load(PUBLISHED)
    theirs = numbers[numbers["source"] == "ostquant"]
    frame = built(paper, "ostquant").frame
    assert len(theirs) == 264 and len(frame) == 22 * 6
    for metric, column in (("wikitext2_ppl", "wikitext2"), ("zeroshot9_avg", "mean")):
        assert frame[f"{column}_ours"].notna().all()
        printed = theirs.loc[theirs["metric"] == metric, "value"]
        assert sorted(frame[f"{column}_paper"].dropna()) == sorted(printed.dropna()) and len(printed) == 132
    row = frame[(frame["label"] == "OSTQuant") & (frame["model"] == "llama-2-7b")].iloc[-1]
    assert row["wikitext2_paper"] == 5.91 and row["mean_paper"] == 63.18
    nine = [f"{task}_ours" for task in published.OSTQUANT_TASKS]
    assert row["mean_ours"] == pytest.approx(row[nine].mean()) and len(nine) == 9


@pytest.mark.slow
def test_paper_means_are_over_six_tasks(paper):
    for name in ("table1", "table3", "table10"):
        frame = built(paper, name).frame
        assert frame["mean_ours"].tolist() == pytest.approx(frame[[f"{t}_ours" for t in SIX]].mean(axis=1).tolist())
        assert frame["mean_paper"].notna().any()


@pytest.mark.slow
def test_paper_tables_set_ours_beside_each_number(paper):
    """All of Tables 1 to 11, but for BitNet, which is quoted alone."""
    for name in paper[0].raw["tables"]:
        frame = built(paper, name).frame
        for column in (column for column in frame if column.endswith("_paper")):
            lacking = frame[column].notna() & frame[column.replace("_paper", "_ours")].isna()
            assert all(label.startswith("BitNet") for label in frame.loc[lacking, "label"]), (name, column)
    numbers = published.load(PUBLISHED)
    tables = numbers[(numbers["source"] == "obr") & numbers["table"].str.match(r"OBR Table \d")]
    missing = tables[~tables.index.isin(QUOTED)]
    assert len(tables) == 685 and missing.empty, missing.to_string()
    assert set(tables.loc[[not QUOTED[index] for index in tables.index], "method"]) == {"BitNet b1.58"}


def test_numbers_outside_the_papers_tables_are_in_figures(paper):
    """As a point, a bar of a panel, or a sentence beneath."""
    raw, numbers = paper[0].raw, published.load(PUBLISHED)
    shapes = {shape["name"]: shape.get("published") for shape in raw["kernels"]["shapes"]}
    shown = set()
    for entry in raw["figures"].values():
        for filters in entry.get("mentions", []):
            shown |= set(published.select(numbers, **filters).index)
        if entry["kind"] == "kernels" and "published" in entry:
            found = published.select(numbers, **entry["published"])
            metrics = [kernels.PANELS[panel][3] for panel in entry["panels"]]
            there = found["metric"].isin(metrics) & found["model"].isin([shapes[name] for name in entry["shapes"]])
            shown |= set(found[there].index)
        elif entry.get("rows"):
            rows = [row for row in table_rows.resolve_rows(entry, raw) if row.published]
            for printed in published.Quotes(entry, raw["models"], rows, PUBLISHED).printed.values():
                shown |= set(printed.index)
    outside = numbers[(numbers["source"] == "obr") & ~numbers["table"].str.match(r"OBR Table \d")]
    missing = outside[~outside.index.isin(shown)]
    assert len(outside) == 63 and missing.empty, missing.to_string()


def test_ostquant_bit_settings_have_separate_learned_rotations(paper):
    """Weights are rounded while learning at W4A16KV16 alone; keys and values where the setting quantises them."""
    config, _ = paper
    used = {}
    for row in table_rows.resolve_rows(config.raw["tables"]["ostquant"], config.raw):
        learned = config.raw["rotations"].get(row.recipe.rotation, {"kind": ""})
        if learned["kind"] in ("spinquant", "ostquant"):
            used[learned["kind"], row.recipe.setting] = row.recipe.rotation
            for_ = Recipe.parse({"method": "rtn", "bits": 16, **learned["learn"]["quantise"]})
            assert for_.bits == (4 if row.recipe.activations.bits == 16 else 16)
            for part in ("activations", "o_inputs", "keys", "values"):
                assert getattr(for_, part) == getattr(row.recipe, part), (row.key, part)
    assert len(used) == 6 == len(set(used.values()))


def test_times_stand_in_minutes_beside_the_papers(paper, tmp_path):
    frame = built(paper, "time").frame.set_index(["model", "recipe"])
    assert frame.loc[("llama-2-7b", "obr_gptq-w4s50-quarot"), "minutes_paper"] == 138
    assert 10 <= frame.loc[("llama-2-7b", "obr_gptq-w4s50-quarot"), "minutes_ours"] < 20
    assert any("Compression: wall-clock" in note and "on cuda" in note for note in built(paper, "time").notes)


def test_numbers_in_text_of_paper_are_quoted(paper):
    numbers = published.load(PUBLISHED)
    told = published.mentions(numbers, [{"source": "obr", "metric": "wikitext2_ppl_improvement"}])
    assert (
        told[0].startswith("Printed in OBR Sec. 5.3 text (Fig. 5): Llama-2-7B, Wanda+OBR vs Wanda")
        and "0.53" in told[0]
    )


def test_quant_only_of_table_2_stands_beside_three_bit_weights(paper):
    """The paper heads these rows W4; its other tables have 3-bit weights for quant-only."""
    made = built(paper, "table2")
    frame = made.frame.set_index(["recipe", "activations"])
    quoted = frame[["wikitext2_paper", "mean_paper"]]
    assert quoted.loc[("rtn-w3-quarot", "a8kv8")].tolist() == [80.525, 39.98]
    assert quoted.loc[("rtn-w3-quarot", "a16")].tolist() == [80.25, 40.04]
    assert quoted.loc["rtn-w4-quarot"].isna().all(axis=None) and len(quoted.loc["rtn-w4-quarot"]) == 2
    assert any("quoted beside 3-bit RTN" in note for note in made.notes)


def test_sparse_rows_stand_beside_dense_ones_of_4_and_3_bits(paper):
    """In every table that quotes the paper; by GPTQ, of the same rotation and bits of activations."""
    config, checked = paper[0], set()
    for name, entry in config.raw["tables"].items():
        rows = [row.recipe for row in table_rows.resolve_rows(entry, config.raw) if row.recipe]
        sparse = [recipe for recipe in rows if recipe.sparsity and recipe.bits < 16]
        if entry.get("published") and sparse:
            dense = {(r.rotation, r.setting) for r in rows if r.method == "gptq"}
            wanted = {(r.rotation, f"W{bits}" + r.setting.removeprefix("W4")) for r in sparse for bits in (3, 4)}
            assert wanted <= dense, (name, wanted - dense)
            checked.add(name)
    assert {"table1", "table4", "table5"} <= checked
