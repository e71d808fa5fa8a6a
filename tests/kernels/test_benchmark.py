"""Kernels are checked before they are timed; what a device lacks is said, not left out."""

from importlib.util import find_spec

import pandas as pd
import pytest
import torch

from helpers import mma_emulation as mma
from obr.errors import ObrError
from obr.kernels import benchmark, cpu_caches, products
from obr.kernels.int4 import packed_weight

SHAPE = {"name": "tiny", "tokens": 20, "columns": 128, "rows": 64}


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    monkeypatch.setattr(cpu_caches, "size", lambda: 1 << 20)


def run(tmp_path, shapes=(SHAPE,), **entry) -> pd.DataFrame:
    out = tmp_path / "kernels" / "cpu.csv"
    benchmark.benchmark({"shapes": list(shapes), "seconds": 60, "repeats": 3, "warmup": 1, **entry}, "cpu", out)
    assert [path.name for path in out.parent.iterdir()] == ["cpu.csv"]
    return pd.read_csv(out)


def test_benchmark_has_line_with_status_per_kernel(tmp_path):
    shapes = [SHAPE, {"tokens": 3, "columns": 128, "rows": 32}]
    times = run(tmp_path, shapes)
    assert list(times.columns) == list(benchmark.COLUMNS)
    assert times.groupby("shape")["kernel"].apply(list).tolist() == [list(products.KERNELS)] * 2
    assert set(times["shape"]) == {"tiny", "3x128x32"}
    ok = times["status"] == "ok"
    assert set(times[ok]["kernel"]) >= {"fp32", "bf16", "fp16", "int8", "int4 weight"}
    packed = list(products.PACKED)
    assert len(packed) == 6 and set(times[ok]["kernel"]) >= set(packed)
    assert times[~ok]["status"].str.startswith(("not available: ", "skipped: ", "failed, ")).all()
    assert times[~ok]["median_ms"].isna().all()
    assert (times[~ok]["kernel"].str.endswith("2:4")).any()
    others = times[times["kernel"].isin(["fp8 2:4", "nvfp4", "nvfp4 paired 4:8", "packed int4 50 %, 16-bit"])]
    assert len(others) == 8 and others["status"].str.contains("on CUDA devices only").all()
    cutlass = times[times["kernel"].isin(["int4 (CUTLASS)", "int4 paired 4:8 (CUTLASS)", "fp16 (CUTLASS)"])]
    assert len(cutlass) == 6 and set(cutlass["status"]) == {
        "not available: INT4 tensor cores are on CUDA devices only"
    }
    assert times["read_gb_s"][ok].nunique() == 1
    assert set(times["repeats"][ok]) == {3} and times["repeats"][~ok].isna().all()
    assert set(times["cache_mb"]) == {1} and set(times["buffer_mb"]) == {4}
    bound = times["weight_bytes"] / times["read_gb_s"] / 1e9 / times["median_ms"] * 1e3
    within, beyond = ok & (bound <= 1), ok & (bound > 1)
    assert times["of_bound"][within].to_list() == pytest.approx(bound[within].to_list())
    assert times["of_bound"][beyond].isna().all()
    assert all(said.startswith("weights may stay in the cache") for said in times["caution"][beyond])
    assert times["caution"][~beyond].isna().all()


def test_benchmark_line_numbers_follow_from_time(tmp_path):
    times = run(tmp_path, kernels=["fp32", "int8", "int4 weight"]).set_index("kernel")
    assert times.loc["int8", "checked"] == 0
    assert 0 < times.loc["fp32", "checked"] < 1e-5
    assert 0 < times.loc["int4 weight", "checked"] < 2e-2
    assert times["bits_per_weight"].to_dict() == {"fp32": 32, "int8": 8, "int4 weight": 4 + 32 / 128}
    assert (times["p25_ms"] <= times["median_ms"]).all() and (times["median_ms"] <= times["p75_ms"]).all()
    tops = 2 * 20 * 128 * 64 / (times["median_ms"] * 1e-3) / 1e12
    assert times["tops_dense"].to_list() == pytest.approx(tops.to_list())
    assert times["tops_executed"].to_list() == times["tops_dense"].to_list()


def test_packed_products_are_exact_and_small(tmp_path):
    names = list(products.PACKED)
    times = run(tmp_path, [{"tokens": 2, "columns": 1024, "rows": 256}], kernels=names).set_index("kernel")
    assert (times["checked"] < 1e-6).all()
    bits = {name: times.loc[f"packed int4{name}", "bits_per_weight"] for name in ("", " 50 %", " 4:8", " paired 4:8")}
    expected = {"": 4, " 50 %": 3, " 4:8": 2.875, " paired 4:8": 2.375}
    assert bits == pytest.approx(expected, abs=0.15)
    assert (times["tops_executed"] / times["tops_dense"]).to_list() == [1] + 5 * [0.5]


@pytest.mark.parametrize("pattern", ["", " paired 4:8"])
def test_products_on_tensor_cores_are_checked_in_whole_numbers(tmp_path, monkeypatch, pattern):
    """With an emulated instruction in the kernel's place: exact; a wrong word of metadata is found."""

    def emulated(weight, tokens):
        parts = [part.numpy() for part in (*weight.stored, tokens.codes)]
        if weight.metadata is None:
            parts = [mma.nibbles(part) for part in parts]
            return torch.from_numpy(parts[0] @ parts[1].T).int()
        return torch.from_numpy(mma.multiply(*parts)).int()

    monkeypatch.setattr(products, "_need_tensor_cores", lambda x: "emulated")
    monkeypatch.setattr(products.library, "multiply", emulated)
    entry = {"shapes": [{"tokens": 5, "columns": 72, "rows": 40}], "kernels": [f"int4{pattern} (CUTLASS)"]}
    line = run(tmp_path, **entry).iloc[0]
    assert (line["status"], line["checked"]) == ("ok, emulated", 0)
    assert line["tops_executed"] == line["tops_dense"] * (0.5 if pattern else 1)
    if pattern:
        order = products.operands.threads_order
        monkeypatch.setattr(products.operands, "threads_order", lambda words: order(words.roll(1, 0)))
        assert run(tmp_path, **entry).iloc[0]["status"].startswith("refused: error")


def test_skipped_kernel_states_missing_shape_or_device(tmp_path, monkeypatch):
    shape = {"tokens": 1, "columns": 100, "rows": 8}
    assert "does not divide the 100" in run(tmp_path, [shape], kernels=["packed int4 8:16"]).iloc[0]["status"]
    monkeypatch.setattr(packed_weight, "library", lambda level: (_ for _ in ()).throw(ObrError("No compiler.")))
    line = run(tmp_path, kernels=["packed int4", "fp32"]).set_index("kernel")
    assert line.loc["packed int4", "status"] == "not available: No compiler."
    assert line.loc["fp32", "status"] == "ok" and pd.isna(line.loc["fp32", "read_gb_s"])


@pytest.mark.slow
def test_sizes_are_known_without_a_gpu(tmp_path):
    """Of the paper's weight as it prints them: 32, 8 and 5 MiB, half the operations in pairs of 4:8; no time."""
    names = [
        "fp16",
        "int8 2:4",
        "int4 (CUTLASS)",
        "int4 paired 4:8 (CUTLASS)",
        "nvfp4",
        "packed int4",
        "packed int4 50 %",
    ]
    entry = {"shapes": [{"name": "paper", "tokens": 65536, "columns": 4096, "rows": 4096}], "kernels": names}
    benchmark.sizes(entry, tmp_path / "cuda.csv")
    lines = pd.read_csv(tmp_path / "cuda.csv").set_index("kernel")
    assert lines.loc[names[-2:], "bits_per_weight"].tolist() == pytest.approx([4, 3], abs=0.04)
    assert lines.loc["nvfp4", "bits_per_weight"] == 4.5  # with a scale of 8 bits for 16 values
    assert set(lines["status"]) == {"not available: there is no CUDA device"}
    assert lines[["median_ms", "tops_dense"]].isna().all(axis=None)
    names = ["fp16", "int4 (CUTLASS)", "int4 paired 4:8 (CUTLASS)"]
    assert (lines.loc[names, "weight_bytes"] / 2**20).tolist() == [32, 8, 5]
    assert lines.loc[names, "gop"].tolist() == pytest.approx([2199.02, 2199.02, 1099.51], abs=0.01)
    assert pd.isna(lines.loc["int8 2:4", "weight_bytes"])  # cuSPARSELt alone can tell


def test_emulated_fp8_is_skipped_with_the_reason_and_native_fp8_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(products, "_multiplies_fp8", lambda: False)
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **b: pytest.fail("an emulated product was run"))
    line = run(tmp_path, kernels=["fp8"]).iloc[0]
    assert line["status"].startswith("skipped: this processor has no FP8 products")
    assert pd.isna(line["median_ms"]) and pd.isna(line["caution"])
    monkeypatch.undo()
    monkeypatch.setattr(products, "_multiplies_fp8", lambda: True)
    assert run(tmp_path, kernels=["fp8"]).iloc[0]["status"] == "ok"


@pytest.mark.parametrize("megabytes", [480, 2048])
def test_weights_that_may_stay_in_a_large_cache_have_no_share_of_the_bound(tmp_path, monkeypatch, megabytes):
    monkeypatch.setattr(cpu_caches, "size", lambda: megabytes << 20)
    times = run(tmp_path, kernels=["fp32", "packed int4", "fp16 2:4"], buffer_mb=2).set_index("kernel")
    assert set(times["cache_mb"]) == {megabytes} and set(times["buffer_mb"]) == {2}
    assert times[["read_gb_s", "of_bound"]].isna().all(axis=None)
    said = times["caution"].dropna().to_dict()
    wanted = f"weights may stay in the cache: {megabytes} MB of cache, 2 MB read before each run"
    assert said == {"fp32": wanted, "packed int4": wanted}


def test_a_cache_of_unknown_size_is_said_to_be_assumed(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_caches, "size", lambda: None)
    line = run(tmp_path, kernels=["fp32"], repeats=1, warmup=0, buffer_mb=128).iloc[0]
    assert (line["cache_mb"], line["buffer_mb"]) == (64, 128)
    assert line["caution"].startswith("the system reports no cache size, 64 MB assumed")


def test_executed_operations_leave_out_zeros():
    case = products.Case(lambda: None, None, None, (torch.zeros(64, 64, dtype=torch.float16),), executed=0.5)
    figures = benchmark._figures(case, [1.0, 2.0, 3.0], SHAPE)
    assert figures["median_ms"] == 2.0
    assert figures["tops_executed"] == figures["tops_dense"] / 2
    assert figures["gop"] == pytest.approx(20 * 128 * 64 / 1e9)
    assert figures["bits_per_weight"] == 8


@pytest.mark.parametrize(
    ("dtype", "spoil"),
    [
        (torch.float32, lambda y: y * 1.001),
        (torch.bfloat16, lambda y: y.roll(1, 0)),
        (torch.float16, lambda y: torch.full_like(y, float("nan"))),
        (torch.int32, lambda y: y + 1),
    ],
)
def test_a_broken_kernel_is_refused_and_not_timed(tmp_path, monkeypatch, dtype, spoil):
    calls = []

    def broken(x, weight):
        x, weight = x.round(), weight.round()  # whole numbers, so that the int32 case has an exact product

        def multiply():
            calls.append(1)
            return spoil((x @ weight.T).to(dtype))

        return products.Case(multiply, x, weight, (weight,))

    monkeypatch.setitem(products.KERNELS, "broken", broken)
    line = run(tmp_path, kernels=["broken"]).iloc[0]
    assert line["status"].startswith("refused: error")
    assert pd.isna(line["median_ms"]) and pd.isna(line["tops_dense"])
    assert len(calls) == 1


def test_a_kernel_that_fails_is_reported_in_its_own_words(tmp_path, monkeypatch):
    def absent(x, weight):
        raise RuntimeError("no such operator\nand a long trace")

    monkeypatch.setitem(products.KERNELS, "absent", absent)
    assert run(tmp_path, kernels=["absent"]).iloc[0]["status"] == "failed, RuntimeError: no such operator"


def test_two_of_four_keeps_the_larger_half():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    kept = products._two_of_four(weight).reshape(8, 4, 4)
    assert ((kept != 0).sum(-1) == 2).all()
    dropped = torch.where(kept == 0, weight.reshape(8, 4, 4), torch.zeros(()))
    smallest_kept = kept.abs().masked_fill(kept == 0, float("inf")).amin(-1)
    assert (dropped.abs().amax(-1) <= smallest_kept).all()


@pytest.mark.parametrize(
    ("entry", "device", "message"),
    [
        ({"shapes": []}, "cpu", "no shapes"),
        ({"shapes": [{"tokens": 2, "columns": 0, "rows": 3}]}, "cpu", "positive whole numbers"),
        ({"kernels": ["fp3"]}, "cpu", "'fp3' is unknown"),
        ({"repeats": 0}, "cpu", "repeats 0"),
        ({"warmup": -1}, "cpu", "no negative warmup"),
        ({"seconds": 0}, "cpu", "seconds 0 is no positive number"),
        ({"seconds": float("inf")}, "cpu", "seconds inf is no positive number"),
        ({"seconds": "1"}, "cpu", "seconds '1' is no positive number"),
        ({"buffer_mb": 0}, "cpu", "buffer_mb 0 is no positive whole number"),
        ({}, "gpu0", "'gpu0' is unknown"),
        ({}, "cuda:99", "'cuda:99' is not there"),
    ],
)
def test_invalid_benchmark_settings_are_named(tmp_path, entry, device, message):
    with pytest.raises(ObrError, match=message):
        benchmark.benchmark({"shapes": [SHAPE], **entry}, device, tmp_path / "k.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_run_on_cuda(tmp_path):
    shape = {"tokens": 256, "columns": 1024, "rows": 512}
    benchmark.benchmark({"shapes": [shape], "repeats": 5}, "cuda", tmp_path / "cuda.csv")
    times = pd.read_csv(tmp_path / "cuda.csv").set_index("kernel")
    assert (times.loc[["fp32", "fp16", "bf16", "int8"], "status"] == "ok").all()
    assert not times["status"].str.startswith("refused").any()
    if find_spec("triton") is not None:
        assert (times.loc[times.index.str.startswith("packed"), "status"] == "ok").all()
    sparse = times[times.index.str.endswith("2:4") & (times["status"] == "ok")]
    assert sparse["tops_executed"].to_list() == (sparse["tops_dense"] / 2).to_list()
