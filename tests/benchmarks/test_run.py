"""The benchmark command: every part runs, at sizes that take seconds; what it says of equality and memory is true."""

import importlib
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers.layer_samples import layer
from helpers.paths import ROOT
from obr.errors import ObrError
from obr.methods.restore import restore

FOLDER = ROOT / "benchmarks"
PARTS = ["restoration", "joint", "scaling", "stages", "memory", "products", "decoding", "zero_shot", "large"]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Results of the quick run of everything."""
    folder = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, FOLDER / "run.py", "--quick", "--threads", "1", "--out", folder]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.fixture
def module(monkeypatch):
    """Imports a module of the benchmarks by name; they import each other as scripts do."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.slow
def test_benchmark_parts_write_tables_and_figures(out):
    page = (out / "benchmarks.md").read_text()
    for part in PARTS:
        frame = pd.read_csv(out / f"{part}.csv")
        assert len(frame) and frame["cpu"].notna().all() and (frame["threads"] == 1).all(), part
        told = frame.drop(columns=["layer", "perplexity"], errors="ignore")  # of made models none is told
        assert not told.isna().any(axis=None), part
    for part in ("restoration", "scaling", "stages", "memory", "products", "decoding"):
        assert (out / f"{part}.pdf").read_bytes().startswith(b"%PDF") and f"({part}.png)" in page
        assert (out / f"{part}.png").stat().st_size > 10_000
    assert not [path for path in out.iterdir() if path.is_dir()], "models made on the way stay behind"


@pytest.mark.slow
def test_ratios_are_of_medians_and_peaks_hold_torch(out):
    for part, sides in (("restoration", ("ours", "loop")), ("scaling", ("time",))):
        frame = pd.read_csv(out / f"{part}.csv")
        for side in sides:
            least, median, most = (frame[f"{side}_{kind}"] for kind in ("min_s", "s", "max_s"))
            assert (least <= median).all() and (median <= most).all(), part
    frame = pd.read_csv(out / "restoration.csv")
    assert frame["ratio"].tolist() == pytest.approx((frame["loop_s"] / frame["ours_s"]).tolist())
    peaks = pd.concat([pd.read_csv(out / f"{part}.csv")["peak_mb"] for part in ("memory", "large")])
    assert peaks.between(100, 4000).all()  # torch alone takes more than the least


@pytest.mark.slow
def test_the_joint_method_is_measured_in_units_of_its_rival(out):
    frame = pd.read_csv(out / "joint.csv").set_index("method")
    assert frame.loc["OBR_GPTQ", ["error_ratio", "time_ratio"]].tolist() == [1, 1]
    errors = frame["error_ratio"].drop("OBR_GPTQ")
    learned = errors.pop("OBR_GPTQ, mask learned")  # on so small a layer no better than Wanda's
    assert (errors < 1).all() and errors["joint, 600 sweeps"] < errors["joint, ADMM alone"] < learned


@pytest.mark.slow
def test_packed_models_write_tokens_in_less_memory(out):
    frame = pd.read_csv(out / "decoding.csv").set_index("weights")
    assert list(frame.index) == ["bfloat16", "INT4, dense", "INT4, 50 %", "INT4, paired 4:8"]
    assert (frame["tokens_s"] * frame["time_s"]).tolist() == pytest.approx(4 * [1])
    megabytes = frame["linear_mb"]
    assert megabytes["bfloat16"] > 3 * megabytes["INT4, dense"]
    assert megabytes["INT4, dense"] > megabytes["INT4, 50 %"] > megabytes["INT4, paired 4:8"]
    bound = frame["weights_mb"] * 1e6 / (frame["read_gb_s"] * 1e9) / frame["time_s"]
    assert frame["of_bound"].tolist() == pytest.approx(bound.tolist())


@pytest.mark.slow
def test_evaluations_that_differ_are_not_compared(module, out):
    frame = pd.read_csv(out / "zero_shot.csv").set_index("evaluation")
    assert list(frame.index) == ["streamed", "in memory", "lm-eval, batch 1", "lm-eval, batch 4"]
    assert frame.loc["streamed", "ratio"] == 1 and frame.loc["streamed", "tokens"] < frame.iloc[-1]["tokens"]
    with pytest.raises(ObrError, match=r"in memory and streamed evaluation are 0\.5 nats apart"):
        module("zero_shot")._check_equal({"streamed": [(-1.0, True)], "in memory": [(-1.5, True)]})


@pytest.mark.slow
def test_products_are_compared_with_the_read_of_memory(out):
    frame = pd.read_csv(out / "products.csv")
    assert set(frame["tokens"]) == {1, 3}
    assert {"fp32", "bf16", "int4", "int4 unstructured", "int4 paired 4:8"} <= set(frame["kernel"])
    for _, row in frame.iterrows():
        bytes_ = row["bits_per_weight"] * row["rows"] * row["columns"] / 8
        assert row["of_bound"] == pytest.approx(bytes_ / row["read_gb_s"] / 1e9 / row["time_s"])
    packed = frame[frame["kernel"] == "int4 unstructured"]
    assert (packed["times_packed"] == 1).all() and (packed["time_s"] > 0).all()


def test_a_wrong_product_is_not_timed(module, monkeypatch):
    products = module("products")
    monkeypatch.setattr(
        products.packed_weight.Weight, "integers", lambda self, tokens: torch.zeros(len(tokens.q), self.rows)
    )
    with pytest.raises(ObrError, match="layout dense is wrong"):
        products.prepare(products.store((8, 64), 1), 1, 1, 1)


@pytest.mark.slow
def test_a_model_with_wrong_products_writes_nothing(module, monkeypatch, tmp_path):
    decoding, models = module("decoding"), module("models")
    folders = decoding.write_stack(tmp_path, {**models.TINY, "num_hidden_layers": 1})
    decoding.check(folders["INT4, 50 %"])
    whole = decoding.packed_weight.Weight.integers
    monkeypatch.setattr(decoding.packed_weight.Weight, "integers", lambda self, tokens: whole(self, tokens) + 1)
    with pytest.raises(ObrError, match="multiplied wrongly"):
        decoding.check(folders["INT4, 50 %"])


def test_missing_llama_cpp_leaves_reason_in_place_of_row(module, monkeypatch, capsys, tmp_path):
    products = module("products")
    monkeypatch.setenv("OBR_GGML", str(tmp_path))
    products.ggml.libraries.cache_clear()
    assert "llama.cpp Q4_0" not in products.prepare(products.store((8, 64), 1), 1, 1, 1)
    assert "has no ggml libraries" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["obr_gptq", "obr_rtn"])
@pytest.mark.parametrize("columns", [96, 320])
def test_the_timed_loop_gives_what_the_library_gives(module, method, columns):
    weight, matrix = layer(8, columns)
    ours = restore(weight, matrix, method)
    loop = getattr(module("published_loop"), method)(weight, matrix, ours.mask, ours.scale)
    assert torch.isclose(loop, ours.weight, atol=1e-6).float().mean() > 0.99


def test_a_loop_timed_on_some_rows_gives_these_rows(module, monkeypatch):
    restoration = module("restoration")
    weight, matrix = module("layers").made_layer(64, 128)
    whole = restoration.compare(weight, matrix, "obr_gptq", 1)
    monkeypatch.setattr(restoration, "LONG_LOOP", 0)
    sampled = restoration.compare(weight, matrix, "obr_gptq", 1)
    assert (whole["loop_rows_timed"], sampled["loop_rows_timed"]) == (64, 32)
    assert sampled["error_ratio"] == pytest.approx(1, abs=1e-3)


def test_unequal_results_are_not_compared(module, monkeypatch):
    restoration = module("restoration")
    monkeypatch.setitem(restoration.FUNCTIONS, "obr_gptq", restoration.FUNCTIONS["wanda"])
    with pytest.raises(ObrError, match="must be equal"):
        restoration.compare(*layer(8, 96), "obr_gptq", 1)


@pytest.mark.slow
def test_a_peak_is_the_stages_own(module):
    """Not that of the process that started it, which holds 800 MB here."""
    held = torch.ones(200_000_000)
    peak = module("peak").run_stage("--help")["peak_mb"]
    assert held.sum() > 0 and 5 < peak < 300


@pytest.mark.slow
def test_failed_stage_shows_error(module):
    with pytest.raises(ObrError, match="nosuch"):
        module("peak").run_stage("calibrate", "--settings", {}, "--model", "nosuch", "--text", "nosuch", "--out", "x")


def test_a_large_model_is_refused_where_there_is_no_room(module, monkeypatch, tmp_path):
    large = module("large")
    monkeypatch.setattr(large.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**9}))
    with pytest.raises(ObrError, match=r"31 GB at .* 1 GB are free"):
        large.measure(tmp_path)
    assert not list(tmp_path.iterdir())
