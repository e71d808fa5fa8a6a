"""The check on a GPU, here on a CPU and a simulated GPU: it keeps budget and findings, and names what is missing."""

import argparse
import csv
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import simulated_device
from helpers.paths import ROOT
from obr.kernels import benchmark

FOLDER = ROOT / "benchmarks"
PROGRAM = [sys.executable, str(FOLDER / "check_gpu.py")]
COMMAND = [*PROGRAM, "--device", "cpu", "--small"]
needs_device = pytest.mark.skipif(
    not simulated_device.can_be_built(), reason="no C++ compiler builds the simulated device"
)
# What a part may do instead of its work, by name: gpu_parts.py of a test.
MADE_UP = """
import os, signal, sys, time
name, out = sys.argv[1], sys.argv[3]
print("began", flush=True)
if name == "kernel_tests":
    raise ValueError("it broke")
if name == "products":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
if name == "large":
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "memory":
    sys.exit(4)
print("found: all is well")
sys.exit({"tiny": 3, "trees": 1}.get(name, 0))
"""


def check(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, "--out", str(out), *arguments], capture_output=True, text=True, check=False)


def simulated(out: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [*PROGRAM, "--simulated", "--small", "--out", str(out), *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def lines(out: Path) -> dict[str, dict]:
    return {row["part"]: row for row in rows(out / "parts.csv")}


def rows(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def models(load):
    """The module of the parts that run models."""
    return load("gpu_models")


@pytest.fixture
def made_up(load, monkeypatch, tmp_path):
    """The module check_gpu with parts that do what MADE_UP says, and short times."""
    module = load("check_gpu")
    (tmp_path / "gpu_parts.py").write_text(MADE_UP)
    for name, value in {"HERE": tmp_path, "LEAST": 0.0, "GRACE": 0.2, "SLACK": 0.0, "SHARE": 2.0}.items():
        monkeypatch.setattr(module, name, value)
    return module


def settings(module, out: Path, name: str):
    return module.Settings(name, out, "cpu", 60, True)


def arguments(out: Path, budget: float) -> argparse.Namespace:
    return argparse.Namespace(out=out, budget=budget, device="cpu", small=True, simulated=False)


def test_dry_run_lists_all_parts_and_does_nothing(tmp_path):
    run = check(tmp_path / "out", "--dry-run", "--budget", "300")
    assert run.returncode == 0, run.stderr
    found = [line.split()[0] for line in run.stdout.splitlines()[1::2]]
    expected = ["device", "kernel_tests", "products", "large", "memory", "tiny", "trees", "gpu_tests", "demo"]
    assert found == expected
    assert "(after the budget" in run.stdout and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_parts_write_their_files_and_the_summary_names_them(tmp_path):
    run = check(tmp_path, "--only", "device", "products", "trees")
    assert run.returncode == 0, run.stdout + run.stderr
    assert {name: row["status"] for name, row in lines(tmp_path).items()} == dict.fromkeys(
        ["device", "products", "trees"], "passed"
    )
    products = {row["kernel"]: row["status"] for row in rows(tmp_path / "products.csv")}
    assert products["packed int4 50 %"] == "ok" and products["fp8 2:4"].startswith("not available")
    assert "Equal scores" in lines(tmp_path)["trees"]["found"]
    assert not list((tmp_path / "work").iterdir())
    summary = (tmp_path / "summary.md").read_text()
    assert "All parts ran to their end and passed." in summary and summary in run.stdout
    assert (tmp_path / "device.log").read_text().splitlines()[-1] == f"found: {lines(tmp_path)['device']['found']}"


@pytest.mark.slow
def test_parts_beyond_the_budget_are_named(tmp_path):
    """Importing PyTorch takes more than the second by which the budget exceeds the least time of a part."""
    run = check(tmp_path, "--only", "device", "memory", "--budget", "6")
    assert run.returncode == 1
    assert lines(tmp_path)["memory"]["status"] == "not reached" and lines(tmp_path)["memory"]["seconds"] == ""
    assert "Not reached or cut short: memory." in run.stdout or "cut short: device, memory." in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_keeps_what_it_has_and_leaves_no_process(tmp_path, number):
    with subprocess.Popen([*COMMAND, "--out", str(tmp_path), "--only", "device", "memory"]) as run:
        while not (tmp_path / "memory.log").exists():
            assert run.poll() is None
            time.sleep(0.1)
        found = subprocess.run(["pgrep", "-f", f"gpu_parts.py memory --out {tmp_path}"], stdout=subprocess.PIPE)
        child = int(found.stdout.split()[0])
        run.send_signal(number)
        assert run.wait() == 130
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert lines(tmp_path)["device"]["status"] == "passed" and lines(tmp_path)["memory"]["status"] == "cut short"
    summary = (tmp_path / "summary.md").read_text()
    assert f"Stopped by {signal.Signals(number).name}." in summary and "cut short: memory." in summary


@pytest.mark.slow
def test_a_killed_run_names_its_part_and_leaves_no_process(tmp_path):
    with subprocess.Popen([*COMMAND, "--out", str(tmp_path), "--only", "memory", "device"]) as run:
        while not (tmp_path / "device.log").exists():
            assert run.poll() is None
            time.sleep(0.1)
        run.kill()
    left = ["pgrep", "-f", f"gpu_parts.py device --out {tmp_path}"]
    while subprocess.run(left, stdout=subprocess.DEVNULL).returncode == 0:  # a process that is gone has no arguments
        time.sleep(0.1)
    summary = (tmp_path / "summary.md").read_text()
    assert "Part device is running; if no process does, the run was killed in it." in summary
    assert "Not reached or cut short: device, memory." in summary


@pytest.mark.parametrize("device, count", [("cuda", 0), ("cuda:99", 0), ("cuda:1", 1)])
def test_a_device_that_is_not_there_is_named(tmp_path, device, count):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))}
    command = [*PROGRAM, "--device", device, "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 2 and not (tmp_path / "out").exists()
    assert f"Device {device!r} is not there, {count} NVIDIA GPUs are visible; use --simulated" in run.stderr


def test_a_gpu_by_number_is_the_only_one_of_the_parts(load, tmp_path, monkeypatch):
    module = load("check_gpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    args = arguments(tmp_path, 60)
    for device, entry in (("cuda", "3"), ("cuda:1", "GPU-5")):
        args.device = device
        assert module.environment_of(args)["CUDA_VISIBLE_DEVICES"] == entry


def test_parts_that_break_or_hang_do_not_stop_the_others(made_up, tmp_path):
    args = arguments(tmp_path, 600)
    found = [made_up.Line(name) for name in made_up.PARTS]
    made_up.run(found, args, dict(os.environ))
    by_name = {line.part: (line.status, line.found) for line in found}
    assert by_name["device"] == by_name["demo"] == by_name["gpu_tests"] == ("passed", "all is well")
    assert by_name["kernel_tests"] == ("failed", "ValueError: it broke")
    assert by_name["products"] == ("cut short", "Ended after 2 s. began")
    assert by_name["large"] == ("failed", "Ended by SIGSEGV. began")
    assert by_name["memory"] == ("cut short", "began")
    assert by_name["tiny"] == ("left out", "all is well") and by_name["trees"][0] == "failed"
    summary = (tmp_path / "summary.md").read_text()
    assert (
        "Failed: kernel_tests, large, trees. Not reached or cut short: products, memory. Left out: tiny." in summary
    )
    assert {row["part"]: row["status"] for row in rows(tmp_path / "parts.csv")} == {
        n: s for n, (s, _) in by_name.items()
    }


def test_a_part_has_what_later_ones_do_not_need(load):
    module = load("check_gpu")
    names = ["products", "large", "demo"]  # 100, 120 and 300 s
    queue = [module.Line(name) for name in names]
    assert module.share(queue, 1000) == 1000 - 420
    assert module.share(queue, 600) == 200  # twice its own
    assert module.share(queue, 150) == 150
    assert module.share([module.Line("device"), *queue], 500) == module.SHARE
    assert module.share(queue[2:], 700) == 700


def test_tiny_model_is_trained_once_in_a_run(load, monkeypatch, tmp_path):
    module, trained = load("gpu_parts"), []

    def train(self, command: list, what: str) -> int:
        trained.append(command[-1])
        Path(command[-1]).mkdir(parents=True)
        Path(command[-1], "heldout.txt").touch()
        return 0

    monkeypatch.setattr(module.Settings, "run", train)
    monkeypatch.setenv("OBR_TINY", "/given")
    assert module.tiny_model(settings(module, tmp_path, "tiny")) == "/given"
    monkeypatch.delenv("OBR_TINY")
    folders = {module.tiny_model(settings(module, tmp_path, name)) for name in ("kernel_tests", "tiny")}
    assert folders == set(trained) and len(trained) == 1


def test_rows_of_a_part_have_the_columns_of_all(load, tmp_path):
    s = settings(load("gpu_parts"), tmp_path, "device")
    for row in ({"a": 1}, {"a": 2}, {"b": 3, "a": 4}):
        s.keep(row)
    assert s.rows() == [{"a": "1", "b": ""}, {"a": "2", "b": ""}, {"a": "4", "b": "3"}]


def product(result=None, error: str = ""):
    """A kernel of the benchmark with this result, or that fails with this error."""

    def run(x, weight):
        if error:
            raise RuntimeError(error)
        return result(x, weight)

    return lambda x, weight: benchmark.Case(lambda: run(x, weight), x, weight, (weight,))


@pytest.mark.parametrize(
    "name, kernel, message",
    [
        ("fp32", product(lambda x, w: x @ w.T + 1), "0 products right and timed, 1 wrong. fp32 is refused"),
        ("fp32", product(lambda x, w: x @ w.T * torch.nan), "0 products right and timed, 1 wrong. fp32 is refused"),
        ("packed int4", product(error="out of resources"), "packed int4 is failed, RuntimeError: out of resources"),
        (
            "fp32",
            product(error="CUDA error: an illegal memory access"),
            "fp32 is failed, .* an illegal memory access",
        ),
    ],
)
def test_wrong_and_broken_products_fail_the_part(load, monkeypatch, tmp_path, name, kernel, message):
    module, right = load("gpu_parts"), benchmark.KERNELS["bf16"]
    monkeypatch.setattr(benchmark, "KERNELS", {name: kernel, "bf16": right})
    with pytest.raises(module.Failed, match=message.replace("0 products", "1 products")):
        module.products(settings(module, tmp_path, "products"))


def test_products_that_this_build_lacks_are_told_and_do_not_fail_the_part(load, monkeypatch, tmp_path):
    module, right = load("gpu_parts"), benchmark.KERNELS["fp32"]

    def lacking(x, weight):
        raise benchmark.Lacking("no such device")

    refused = product(error="no kernel of PyTorch's")
    monkeypatch.setattr(benchmark, "KERNELS", {"fp32": right, "packed int4": lacking, "fp8": refused})
    found = module.products(settings(module, tmp_path, "products"))
    assert found == (
        "1 products right and timed, 0 wrong; 1 not available: no such device; "
        "1 failed, RuntimeError: no kernel of PyTorch's."
    )


@pytest.mark.slow
@needs_device
def test_parts_run_on_the_simulated_gpu_or_say_why_not(tmp_path):
    run = simulated(tmp_path, "--only", "device", "products", "large")
    assert run.returncode == 0, run.stdout + run.stderr
    found = lines(tmp_path)
    assert "name simulated device" in found["device"]["found"]
    products = {row["kernel"]: row["status"] for row in rows(tmp_path / "products.csv")}
    assert [products[name] for name in ("fp32", "fp16", "bf16")] == ["ok"] * 3
    assert all(row["tokens_s"] for row in rows(tmp_path / "large.csv") if row["recipe"] == "decoding")
    assert "planned" in found["large"]["found"]
    assert "Device cuda, simulated on the CPU" in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
@needs_device
def test_a_gpu_with_too_little_memory_is_named(tmp_path):
    run = simulated(tmp_path, "--only", "device", "trees", OBR_SIMULATED_BYTES="20000")
    assert run.returncode == 1, run.stdout + run.stderr
    found = lines(tmp_path)
    assert found["trees"]["status"] == "failed" and "the GPU's memory is full" in found["trees"]["found"]
    assert found["device"]["status"] == "passed"


def test_tables_are_compared_row_by_row(models, tmp_path):
    reference = models._markdown(ROOT / "docs/results/demo.md")
    assert len(reference) == 14 and reference[0]["method"] == "dense"
    assert [models._perplexity(row) for row in reference[:3]] == [18.80, 51.54, 20.46]
    demo = settings(models, tmp_path, "demo")
    assert "14 perplexities, at most 0.00 % apart" in models._beside(demo, reference, reference)
    changed = [{**row, "perplexity": "99"} if row["method"] == "GPTQ" else row for row in reference]
    with pytest.raises(models.Failed, match="14 perplexities, at most 383"):
        models._beside(demo, changed, reference)
    with pytest.raises(models.Failed, match="1 rows have none on one side"):
        models._beside(demo, reference[:-1], reference)
    with pytest.raises(models.Failed, match="0 perplexities"):
        models._beside(demo, [{"other": "1"}], [{"other": "1"}])
    own = models._rows(table_file(tmp_path))
    assert models._perplexity(own[0]) == 46.1


def table_file(folder: Path) -> Path:
    """A table's CSV file as the workflow writes it, in short."""
    path = folder / "table.csv"
    path.write_text("model,label,setting,heldout_paper,heldout_ours\ntiny,dense,W16A16KV16,,46.1\n")
    return path
