"""Timing of kernels has a bound whatever the processor: caches of any size, products of any slowness."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from helpers.paths import ROOT
from obr.kernels import benchmark, cpu_caches, products, stopwatch
from obr.kernels.cpu_caches import Caches
from obr.kernels.stopwatch import LEAST, Budget

MB = 1 << 20


class Clock:
    """A clock that moves only when something is said to take time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float, calls: list | None = None):
        def call(*_):
            self.now += seconds
            if calls is not None:
                calls.append(self.now)

        return call


def filler_of(clock: Clock, seconds: float):
    return SimpleNamespace(sum=clock.taking(seconds))


# --- Budgets ------------------------------------------------------------------------------------------

SECONDS = st.floats(1e-6, 100)


@given(budget=SECONDS, each=SECONDS, first=SECONDS, filling=st.floats(0, 10), repeats=st.integers(1, 50))
def test_runs_end_with_the_budget_or_the_least_number(budget, each, first, filling, repeats):
    clock, calls = Clock(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopwatch, "clock", clock)
        limits = Budget(budget, repeats, warmup=3)
        # The first run of a kernel may take longer than those that follow, not less.
        times = stopwatch.cpu_times(clock.taking(each, calls), filler_of(clock, filling), limits, max(first, each))
    assert times == pytest.approx([1e3 * each] * len(times))
    least = min(repeats, 1 if max(first, each) > budget else LEAST)
    assert least <= len(times) <= repeats
    assert len(calls) - len(times) <= 3
    one = each + filling
    assert clock.now <= (max(budget, budget / 4 + least * one) + one) * (1 + 1e-9)
    if clock.now < budget:
        assert len(times) == repeats


def test_a_quick_kernel_has_all_its_runs_and_a_slow_one_a_single_run(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stopwatch, "clock", clock)
    limits = Budget(1.0, 20, 3)
    calls: list[float] = []
    assert len(stopwatch.cpu_times(clock.taking(0.001, calls), filler_of(clock, 0.01), limits, 0.001)) == 20
    assert len(calls) == 23
    calls.clear()
    assert stopwatch.cpu_times(clock.taking(12.0, calls), filler_of(clock, 0.01), limits, 12.0) == [12000.0]
    assert len(calls) == 1
    calls.clear()
    assert len(stopwatch.cpu_times(clock.taking(0.6, calls), filler_of(clock, 0.01), limits, 0.6)) == LEAST


@pytest.mark.parametrize(("each", "warmups", "count"), [(0.001, 3, 20), (0.1, 1, 7), (0.4, 0, 3), (12.0, 0, 1)])
def test_runs_on_a_gpu_are_counted_beforehand(monkeypatch, each, warmups, count):
    clock, runs, zeroed = Clock(), [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock()

        def elapsed_time(self, stop):
            return 1e3 * (stop.at - self.at)

    monkeypatch.setattr(stopwatch, "clock", clock)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    cache = SimpleNamespace(zero_=lambda: zeroed.append(len(runs)))
    monkeypatch.setattr(
        torch, "empty", lambda size, dtype, device: cache if size == 2 * MB else pytest.fail(str(size))
    )
    times = stopwatch.cuda_times(clock.taking(each, runs), torch.device("cuda"), Budget(1.0, 20, 3), 2 * MB)
    assert times == pytest.approx([1e3 * each] * count)
    assert len(runs) == 1 + warmups + count
    assert zeroed == list(range(len(runs)))  # before each run


# --- Caches -------------------------------------------------------------------------------------------


def processor(folder: Path, cpu: int, sizes: dict[str, tuple[int, str, str]]) -> None:
    for index, (level, size, shared) in sizes.items():
        place = folder / f"cpu{cpu}" / "cache" / index
        place.mkdir(parents=True)
        (place / "level").write_text(f"{level}\n")
        (place / "size").write_text(f"{size}\n")
        (place / "shared_cpu_list").write_text(f"{shared}\n")


def test_the_last_level_counts_once_for_all_that_share_it(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_caches, "CPUS", tmp_path)
    monkeypatch.setattr(cpu_caches, "_usable", lambda: {0, 1, 2, 3})
    for cpu, shared in enumerate(("0-1", "0-1", "2-3", "2-3", "4")):
        own = {"index0": (1, "32K", str(cpu)), "index2": (2, "1024K", str(cpu)), "index3": (3, "32768K", shared)}
        processor(tmp_path, cpu, own)
    assert cpu_caches.size() == 64 * MB  # two of them; the third belongs to a processor that may not be used
    monkeypatch.setattr(cpu_caches, "_usable", lambda: {0, 4})
    assert cpu_caches.size() == 64 * MB
    (tmp_path / "cpu0" / "cache" / "index3" / "size").write_text("480M")
    monkeypatch.setattr(cpu_caches, "_usable", lambda: {0})
    assert cpu_caches.size() == 480 * MB


def test_unreported_cache_sizes_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_caches, "CPUS", tmp_path / "none")
    monkeypatch.setattr(cpu_caches, "_usable", lambda: {0})
    assert cpu_caches.size() is None
    monkeypatch.setattr(cpu_caches, "CPUS", tmp_path)
    processor(tmp_path, 0, {"index0": (1, "unknown", "0"), "index1": (2, "0K", "0")})
    (tmp_path / "cpu0" / "cache" / "index2").mkdir()
    assert cpu_caches.size() is None


@pytest.mark.parametrize(
    ("found", "buffer", "cleared", "caution"),
    [
        (MB, 4, True, ""),
        (32 * MB, 128, True, ""),
        (64 * MB, 256, True, ""),
        (128 * MB, 256, True, ""),
        (129 * MB, 256, False, "weights may stay in the cache: 129 MB of cache, 256 MB read before each run"),
        (480 * MB, 256, False, "weights may stay in the cache: 480 MB of cache, 256 MB read before each run"),
        (2048 * MB, 256, False, "weights may stay in the cache: 2048 MB of cache, 256 MB read before each run"),
        (None, 256, True, "the system reports no cache size, 64 MB assumed"),
    ],
)
def test_the_buffer_has_a_limit_and_says_what_it_leaves(monkeypatch, found, buffer, cleared, caution):
    monkeypatch.setattr(cpu_caches, "size", lambda: found)
    known = Caches.of_this_machine(256 * MB)
    assert (known.buffer, known.cleared, known.caution) == (buffer * MB, cleared, caution)
    if buffer <= 4:
        assert known.filler().nbytes == known.buffer


# --- The demo's stage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("megabytes", [1, 32, 480, 2048, None])
def test_the_kernels_of_the_demo_take_less_than_a_minute_on_any_processor(tmp_path, monkeypatch, megabytes):
    """By a clock on which memory gives 5 GB/s and PyTorch's emulations take seconds, as slow processors' do."""
    entry = yaml.safe_load((ROOT / "config" / "experiments" / "demo.yaml").read_text())["kernels"]
    clock, used = Clock(), []
    slow = {"fp8": 12.0, "int8": 1.2, "fp16": 0.6, "bf16": 0.6}
    small = torch.eye(4)

    def fake(name):
        def kernel(x, weight):
            if name == "fp8":
                return products.KERNELS[name](x, weight)
            sparse = name.endswith("2:4") and not name.startswith("packed")
            if sparse or name.endswith(("(CUTLASS)", "16-bit")) or name.startswith("nvfp4"):
                raise products.Lacking("a GPU's")
            clock.now += 0.2  # to lay the weight out
            takes = slow.get(name, 0.005) if x.shape[0] > 1 else 0.005
            return products.Case(lambda: (clock.taking(takes)(), small)[1], small, small, (small,))

        return kernel

    def filler(self):
        used.append(self.buffer)
        return SimpleNamespace(sum=clock.taking(self.buffer / 5e9), nbytes=self.buffer)

    monkeypatch.setattr(stopwatch, "clock", clock)
    monkeypatch.setattr(cpu_caches, "size", lambda: megabytes and megabytes * MB)
    monkeypatch.setattr(products, "_multiplies_fp8", lambda: False)
    monkeypatch.setattr(benchmark, "KERNELS", {name: fake(name) for name in products.KERNELS})
    monkeypatch.setattr(benchmark.Caches, "filler", filler)
    monkeypatch.setattr(
        benchmark.packed_weight, "read_memory", lambda memory, threads: clock.taking(memory.nbytes / 5e9)()
    )
    benchmark.benchmark(entry, "cpu", tmp_path / "cpu.csv")
    times = pd.read_csv(tmp_path / "cpu.csv")
    assert len(times) == len(entry["shapes"]) * len(products.KERNELS)
    assert (times[times["kernel"] == "fp8"]["status"].str.startswith("skipped: ")).all()
    timed = times[times["status"] == "ok"]
    assert len(timed) == 3 * 11 and timed["repeats"].between(1, 20).all()
    assert max(used) <= 256 * MB
    assert clock.now <= 45  # seconds; imports and a compilation take the rest of the minute
