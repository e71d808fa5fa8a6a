"""Figures: every kind draws what the artefacts hold, and says what it leaves out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers.configs import merged
from helpers.fabricated_results import (
    CONFIG,
    ENTRY,
    OBR,
    OBR_A16,
    RECIPES,
    TABLE_1,
    change_scores,
    evaluation,
    fabricate,
    save_score,
)
from helpers.paths import PUBLISHED
from obr.config.methods import METHODS
from obr.errors import ObrError
from obr.report.figures import draw
from obr.report.figures.canvas import COLUMN, PAGE, Canvas
from obr.report.figures.layers import LAYER_KINDS

ALPHAS = (0.25, 0.5, 0.75)
SWEEP = {f"alpha_{a}": {**OBR, "label": f"α {a}", "alpha": a} for a in ALPHAS}
SWEEP |= {f"rtn_{a}": {**OBR, "label": f"RTN α {a}", "method": "obr_rtn", "alpha": a} for a in ALPHAS}
ALL = CONFIG | {"recipes": RECIPES | SWEEP}
BITS = {
    "kind": "perplexity_bits",
    "title": "Perplexity and size",
    "models": ["llama", "tiny"],
    "rows": [*ENTRY["rows"], "obr_24", OBR_A16],
    "perplexity": "wikitext2",
    "published": TABLE_1,
}
ALPHA = {
    "kind": "sweep",
    "x": "alpha",
    "models": ["llama"],
    "rows": ["dense", *reversed(SWEEP)],
    "perplexity": ["wikitext2"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    results = fabricate(tmp_path_factory.mktemp("results"))
    for i, key in enumerate(SWEEP):
        save_score((results, "llama", key, "a4kv4"), "perplexity", "wikitext2", {"value": 8.0 + i})
    lines = [
        {"shape": shape, "kernel": kernel, "status": status, "median_ms": ms, "p25_ms": ms, "p75_ms": ms}
        | {"tops_dense": None if ms is None else 0.02 / ms}
        for shape in ("decode", "prefill")
        for kernel, status, ms in (
            ("fp32", "ok", 2.0),
            ("int8", "ok", 0.1),
            ("2:4", "not available: CPU", None),
        )
    ]
    (results / "kernels").mkdir()
    pd.DataFrame(lines).to_csv(results / "kernels" / "cpu.csv", index=False)
    return results


def sheet(entry: dict, results: Path, monkeypatch, tmp_path, shapes=None) -> Canvas:
    """Draw `entry`, look that both files are whole, and hand back what was drawn."""
    drawn = []
    kind = draw.KINDS[entry["kind"]]
    monkeypatch.setitem(draw.KINDS, entry["kind"], lambda source: drawn.append(kind(source)) or drawn[0])
    config = ALL | {"figures": {"f": entry}, "kernels": {"shapes": shapes or []}}
    draw.draw(config, "f", results, PUBLISHED, tmp_path / "out" / "figure.name")
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(files) == {"figure.name.pdf", "figure.name.png"}
    assert files["figure.name.pdf"].startswith(b"%PDF") and files["figure.name.png"].startswith(b"\x89PNG")
    return drawn[0]


def points(panel, hollow=False) -> list[tuple[float, float]]:
    lines = [line for line in panel.get_lines() if line.get_marker() not in ("None", "", None)]
    lines = [line for line in lines if (line.get_fillstyle() == "none") == hollow]
    found = [(x, y) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata())]
    return [(float(x), float(y)) for x, y in found if np.isfinite(y)]


def labels(sheet) -> list[str]:
    return [handle.get_label() for handle in sheet.handles]


@pytest.mark.slow
def test_perplexity_figure_plots_bits_per_weight(results, monkeypatch, tmp_path):
    drawn = sheet(BITS, results, monkeypatch, tmp_path)
    assert [panel.get_title() for panel in drawn.panels] == ["Llama-2-7B", "Tiny_1 & co"]
    ours = points(drawn.panels[0])
    assert [y for _, y in ours] == [140.0, 8.1, 8.3, 13.0, 7.5]
    assert len({x for x, _ in ours}) == 5  # all of 3 bits, yet none hides another
    assert all(abs(x - 3) < 0.5 for x, _ in ours)
    assert [y for _, y in points(drawn.panels[0], hollow=True)] == [132.97, 8.40]
    assert points(drawn.panels[1], hollow=True) == []
    assert drawn.panels[0].get_yscale() == "log"
    assert labels(drawn) == [
        "Dense", "Dense, published", "RTN", "OBR (GPTQ)", "OBR, cached", "OBR 2:4", "A4KV4", "weights only",
        "hollow: published",
    ]  # fmt: skip
    used = {(line.get_marker(), line.get_color()) for line in drawn.panels[1].get_lines()}
    assert len(used) == 6  # five recipes and the dense line, all told apart


def test_seeds_are_a_mean_with_a_bar_in_the_colour_of_their_group(results, monkeypatch, tmp_path):
    seeded = {"recipe": "obr", "variants": ["obr", "alpha_0.25", "alpha_0.75"]}
    entry = {**BITS, "models": ["llama"], "rows": ["dense", "rtn", seeded], "published": None, "group_by": "hessian"}
    (panel,) = (drawn := sheet(entry, results, monkeypatch, tmp_path)).panels
    scores = json.loads(evaluation(results, "llama", "obr", "a4kv4").read_text())
    kept = scores["perplexity"]["wikitext2"]["value"]
    values = [kept, 8.0, 10.0]
    assert any(np.isclose(y, np.mean(values)) for _, y in points(panel))
    bars = [segment for bar in panel.collections for segment in bar.get_segments()]
    assert np.allclose([np.ptp(bar[:, 1]) for bar in bars], 2 * np.std(values, ddof=1))
    assert "sequential" in labels(drawn) or "cached" in labels(drawn)


def test_a_sweep_is_a_line_per_group_in_rising_order(results, monkeypatch, tmp_path):
    drawn = sheet(ALPHA, results, monkeypatch, tmp_path)
    assert labels(drawn) == ["Dense", "OBR (RTN)", "OBR (GPTQ)"]
    assert points(drawn.panels[0]) == [(0.25, 11), (0.5, 12), (0.75, 13), (0.25, 8), (0.5, 9), (0.75, 10)]
    assert [tick.get_text() for tick in drawn.panels[0].get_xticklabels()] == ["0.25", "0.5", "0.75"]
    assert drawn.panels[0].get_yscale() == "linear"
    assert drawn.figure.get_figwidth() == COLUMN


def test_a_sweep_refuses_rows_in_one_place(results, tmp_path):
    entry = {**ALPHA, "rows": ["alpha_0.5", "obr"]}
    with pytest.raises(ObrError, match=r"'alpha_0.5/a4kv4' and 'obr/a4kv4' share alpha 0.5 .*set group_by"):
        draw.draw(ALL | {"figures": {"f": entry}}, "f", results, PUBLISHED, tmp_path / "f")


@pytest.mark.slow
def test_an_infinite_perplexity_is_told(results, monkeypatch, tmp_path):
    copy = shutil.copytree(results, tmp_path / "results")
    path = evaluation(copy, "llama", "alpha_0.5", "a4kv4")
    change_scores(path, "perplexity", "wikitext2", value=None, status="inf")
    drawn = sheet(ALPHA, copy, monkeypatch, tmp_path)
    assert drawn.remarks == ["Llama-2-7B, α 0.5: perplexity inf, not shown"]
    assert drawn.figure.legends[0].get_title().get_text() == drawn.remarks[0]


@pytest.mark.slow
def test_layer_error_figure_has_panel_per_layer_kind(results, monkeypatch, tmp_path):
    copy = shutil.copytree(results, tmp_path / "results")
    path = copy / "layers" / "llama" / "rtn.csv"
    pd.read_csv(path).assign(relative_error=None).to_csv(path, index=False)
    path = copy / "layers" / "llama" / "obr.csv"
    layers = pd.read_csv(path)
    layers.assign(layer="self_attn." + layers["layer"] + "_proj").to_csv(path, index=False)
    entry = {"kind": "layer_error", "models": ["llama"], "rows": ["dense", "rtn", "obr", OBR_A16, "obr_24"]}
    drawn = sheet(entry, copy, monkeypatch, tmp_path)
    titles = [panel.get_title() for panel in drawn.panels if panel.get_title()]
    assert titles == list(LAYER_KINDS)
    assert labels(drawn) == ["RTN", "OBR (GPTQ)", "OBR 2:4"]  # OBR_A16 has obr's weights, dense no error
    assert [len(panel.get_lines()) for panel in drawn.panels[:7]] == [3] * 7
    assert points(drawn.panels[0])[0] == pytest.approx((0, 0.02 * 1.25))
    assert max(x for x, _ in points(drawn.panels[0])) == 5  # the seventh block is left alone
    assert drawn.remarks == ["Llama-2-7B, RTN: compressed without calibration data, no error known"]


def bars(panel) -> list[tuple[str, float, bool]]:
    """(kernel, length, whether it is hatched) of each bar from the top."""
    first = panel.figure.axes[0]  # has the names for all
    rows = {y: label.get_text() for y, label in zip(first.get_yticks(), first.get_yticklabels())}
    found = {bar.get_y() + bar.get_height() / 2: bar for bar in panel.patches}
    lengths = {min(rows, key=lambda row: abs(row - y)): bar for y, bar in found.items()}
    return [(rows[y], float(lengths[y].get_width()), bool(lengths[y].get_hatch())) for y in sorted(lengths)]


def written(panel) -> list[str]:
    return [text.get_text() for text in panel.texts]


@pytest.mark.slow
def test_kernel_figure_lists_untimed_kernels(results, monkeypatch, tmp_path):
    entry = {"kind": "kernels", "device": "cpu", "panels": ["time", "speed"]}
    drawn = sheet(entry, results, monkeypatch, tmp_path)
    assert labels(drawn) == ["PyTorch", "quartiles"]
    assert drawn.remarks == ["2:4 not available: CPU"]
    headed = ["decode", "fp32", "int8", "prefill", "fp32", "int8"]
    assert [label.get_text() for label in drawn.panels[0].get_yticklabels()] == headed
    assert bars(drawn.panels[0]) == [("fp32", 2.0, False), ("int8", 0.1, False)] * 2
    assert [length for _, length, _ in bars(drawn.panels[1])] == pytest.approx([10, 200] * 2)
    assert written(drawn.panels[1]) == ["10", "200"] * 2
    assert "Gop/s" in drawn.panels[1].get_xlabel()
    assert drawn.panels[0].get_xscale() == "log" and "log scale" in drawn.panels[0].get_xlabel()


@pytest.mark.slow
def test_packed_kernels_are_beside_pytorchs_with_spread_and_bytes(results, monkeypatch, tmp_path):
    copy = shutil.copytree(results, tmp_path / "results")
    skipped, refused = "skipped: this processor has no FP8 products", "refused: error 1 is above 0.1"
    rest = "weights may stay in the cache: 480 MB of cache, 256 MB read before each run"
    lines = [
        {
            "shape": shape,
            "kernel": name,
            "status": status,
            "median_ms": ms,
            "p25_ms": ms and ms - 1,
            "p75_ms": ms and 9,
        }
        | {"weight_bytes": mib and mib * 2**20, "of_bound": share, "caution": ms and said}
        for shape, said in (("one", rest), ("many", rest))
        for name, status, ms, mib, share in (
            ("packed int4", "ok", 4.0, 8, 0.5),
            ("fp32", "ok", 7.0, 64, None),
            ("fp8", skipped, None, None, None),
            ("int8", refused if shape == "one" else "ok, emulated", None if shape == "one" else 5.0, 16, None),
        )
    ]
    pd.DataFrame(lines).to_csv(copy / "kernels" / "cpu.csv", index=False)
    drawn = sheet({"kind": "kernels", "device": "cpu"}, copy, monkeypatch, tmp_path)
    times, sizes = drawn.panels
    assert [name for name, _, _ in bars(times)] == ["fp32", "packed int4", "fp32", "int8", "packed int4"]
    assert [length for _, length, _ in bars(sizes)] == [64, 16, 8, 64, 16, 8]
    assert labels(drawn) == ["PyTorch", "this package", "quartiles", "time to read the weight"]
    whiskers = [segment for spread in times.collections for segment in spread.get_segments()]
    assert [(left, right) for (left, _), (right, _) in whiskers] == [(6, 9), (3, 9), (6, 9), (4, 9), (3, 9)]
    ticks = [line for line in times.get_lines() if np.ptp(line.get_ydata()) > 0.5]
    assert [line.get_xdata()[0] for line in ticks] == [2.0, 2.0]  # half of the packed kernel's 4 ms
    tones = {bar.get_facecolor() for bar in times.patches}
    greys = sorted(np.dot(tone[:3], (0.299, 0.587, 0.114)) for tone in tones)
    assert len(greys) == 2 and greys[1] - greys[0] > 0.25 and greys[0] > 0.35  # black whiskers are seen on both
    assert drawn.remarks == [f"fp8 {skipped}", f"int8 (one) {refused}", "int8 (many): emulated", rest]
    assert "weights may stay in the cache" in drawn.figure.legends[0].get_title().get_text()


@pytest.mark.slow
def test_a_caution_that_concerns_some_kernels_names_them(results, monkeypatch, tmp_path):
    copy = shutil.copytree(results, tmp_path / "results")
    times = pd.read_csv(copy / "kernels" / "cpu.csv")
    times["caution"] = [None, "read twice", None, None, None, None]
    times.to_csv(copy / "kernels" / "cpu.csv", index=False)
    drawn = sheet({"kind": "kernels", "device": "cpu"}, copy, monkeypatch, tmp_path)
    assert drawn.remarks[1:] == ["int8 (decode): read twice"]


@pytest.mark.slow
def test_products_that_were_not_run_have_published_times_beside_their_sizes(results, monkeypatch, tmp_path):
    copy = shutil.copytree(results, tmp_path / "results")
    lines = [
        {"shape": "paper", "kernel": kernel, "status": "not available: no CUDA device", "median_ms": None}
        | {"tops_dense": None, "weight_bytes": mib * 2**20, "gop": 1000.0}
        for kernel, mib in (("fp16", 32), ("int4 (CUTLASS)", 8), ("other", 1))
    ]
    pd.DataFrame(lines).to_csv(copy / "kernels" / "cuda.csv", index=False)
    name = "GEMM W 4096x4096, X 32x2048x4096"
    entry = {"kind": "kernels", "device": "cuda", "panels": ["time", "memory"], "kernels": ["fp16", "int4 (CUTLASS)"]}
    entry["published"] = {"source": "obr", "table": "OBR Figure 1b / motivation.jpg"}
    drawn = sheet(entry, copy, monkeypatch, tmp_path, [{"name": "paper", "published": name}])
    times, sizes = ([bar[1:] for bar in bars(panel)] for panel in drawn.panels)
    assert times == [(9.54, True), (2.73, True), (2.02, True)]
    assert sizes == [(32, False), (8, False), (32, True), (8, True), (5, True)]
    assert labels(drawn) == ["PyTorch", "this package", "published"]
    assert drawn.remarks == ["fp16, int4 (CUTLASS) not available: no CUDA device"]
    with pytest.raises(ObrError, match=r"has no kernel 'fp3'; it has fp16, int4 \(CUTLASS\), other"):
        sheet({**entry, "kernels": ["fp3"]}, copy, monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("figure_key", "timed"), [("fig1b", False), ("fig4", True), ("kernels_cpu", True)])
def test_the_papers_figures_of_kernels_fit_a_page(results, monkeypatch, tmp_path, figure_key, timed):
    """As the config has them, from a benchmark of the config's shapes, timed or with sizes alone."""
    copy = shutil.copytree(results, tmp_path / "results")
    config = merged()
    entry, shapes = config["figures"][figure_key], config["kernels"]["shapes"]
    names = entry.get("kernels") or ["fp32", "fp16", "bf16", "int8", "packed int4", "packed int4 50 %"]
    status, measured = "ok" if timed else "not available: no device", ("median_ms", "p25_ms", "p75_ms", "tops_dense")
    lines = [
        {"shape": shape["name"], "kernel": name, "status": status, "weight_bytes": 2**23, "gop": 1.0}
        | dict.fromkeys(measured, shape["tokens"] / 1e4 if timed else None)
        for shape in shapes
        if shape.get("device", entry["device"]) == entry["device"]
        for name in names
    ]
    pd.DataFrame(lines).to_csv(copy / "kernels" / f"{entry['device']}.csv", index=False)
    drawn = sheet(entry, copy, monkeypatch, tmp_path, shapes)
    width, height = drawn.figure.get_size_inches()
    assert width == PAGE and height < 9.5
    hatched = [hatch for panel in drawn.panels for _, _, hatch in bars(panel)]
    assert any(hatched) == (entry["device"] == "cuda")
    ours = [hatch for hatch in hatched if not hatch]
    count = len(entry.get("shapes", [])) or sum(s.get("device", "cpu") == "cpu" for s in shapes)
    per_panel = count * len(names)
    wanted = {"time": timed, "speed": timed, "operations": True, "memory": True, "bound": False}
    assert len(ours) == per_panel * sum(wanted[panel] for panel in entry["panels"])
    sizes = {label.get_fontsize() for panel in drawn.panels for label in panel.get_yticklabels()}
    assert min(sizes) >= 5.5  # points


@pytest.mark.slow
def test_learning_curves_by_step_and_by_block(results, monkeypatch, tmp_path):
    copy = shutil.copytree(results, tmp_path / "results")
    for name, text in {
        "whole": "step,loss,held_out\n0,,2.0\n10,1.5,1.6\n20,1.2,1.4\n",
        "blocks": "block,step,loss,held_out\n0,0,,0.5\n0,7,0.4,0.3\n0,14,0.2,0.2\n1,0,,0.9\n1,14,0.5,0.6\n",
    }.items():
        (copy / "rotations" / name).mkdir(parents=True)
        (copy / "rotations" / name / "llama.csv").write_text(text)
    entry = {"kind": "learning_curve", "models": ["llama"], "rotations": ["whole", "blocks"]}
    drawn = sheet(entry, copy, monkeypatch, tmp_path)
    assert [panel.get_title() for panel in drawn.panels] == ["Llama-2-7B\nwhole", "Llama-2-7B\nblocks"]
    assert points(drawn.panels[0]) == [(10, 1.5), (20, 1.2), (0, 2.0), (10, 1.6), (20, 1.4)]
    assert points(drawn.panels[1]) == [(0, 0.5), (1, 0.9), (0, 0.2), (1, 0.6)]
    assert labels(drawn) == ["learned from", "held out", "held out, before", "held out, after"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"kind": "pie"},
            "'pie' is unknown; choose one of perplexity_bits, sweep, layer_error, natural_sparsity, kernels",
        ),
        ({"kind": "learning_curve", "models": ["llama"]}, "has no rotations; list keys of learned ones"),
        ({**ALPHA, "x": "damp"}, "Sweep over 'damp'"),
        ({**ALPHA, "group_by": "colour"}, "no field 'colour'"),
        ({**ALPHA, "models": []}, "no models"),
        ({**BITS, "models": ["lama"]}, "'lama' is not in the config"),
        ({**ALPHA, "perplexity": ["wikitext2", "sotu"]}, "needs one text"),
        ({**ALPHA, "perplexity": "c4"}, r"evaluations/llama/dense/a16.json has no perplexity c4; build it with"),
        ({"kind": "kernels"}, "names no device"),
        ({"kind": "kernels", "device": "tpu"}, r"kernels/tpu.csv is missing; build it with"),
    ],
)
def test_invalid_figure_entry_names_key_and_value(results, tmp_path, entry, message):
    with pytest.raises(ObrError, match=message):
        draw.draw(ALL | {"figures": {"f": entry}}, "f", results, PUBLISHED, tmp_path / "f")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_drawing_twice_gives_the_same_file(results, tmp_path):
    for name in ("a", "b"):
        draw.draw(ALL | {"figures": {"f": ALPHA}}, "f", results, PUBLISHED, tmp_path / name)
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()


def test_markers_of_methods_differ():
    markers = [method.marker for method in METHODS.values()]
    assert len(set(markers)) == len(markers), "two methods cannot be told apart in a figure"
