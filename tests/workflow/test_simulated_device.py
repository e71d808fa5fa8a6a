"""Stages on a simulated GPU: results of the CPU, no tensor on the wrong device, bounded transfers, waits and memory.

helpers/simulated_device.py says what is simulated. Each run is a process of its own, in which the GPU cannot be taken
away again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import simulated_device
from helpers.paths import HELPERS
from obr.config.methods import METHODS
from obr.config.rotations import LEARNED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not simulated_device.can_be_built(), reason="no C++ compiler builds the simulated device"),
]
BLOCKS = 2  # of the tiny model
# Largest difference beside the largest value, where a sum has another order on a GPU: of gradients, refinement's too;
# of learned rotations, whose held-out losses are compared; and of the joint method, whose error is. All other stages
# have the same bytes as on the CPU; joint with a pattern, of which the error alone is compared, the same error.
CLOSE = {
    "gradients": 1e-5, "in memory": 0.05, "compress gptq refined": 1e-3, "learn spinquant rounded": 0.15,
    "learn ostquant": 0.1, "learn ostquant klt": 0.15, "learn flatquant": 0.05, "learn flatquant direct": 0.05,
    "learn omniquant": 0.05, "compress joint": 0.05, "compress joint layer": 0.05, "compress joint 16 bits": 0.05,
}  # fmt: skip
# At most so many (copies to the device, times that the host waits for it) in a block, for the windows and steps of
# helpers/device_stages.py. Nothing in them grows with the rows and columns of a layer.
LIMITS = {
    "hessian": (25, 32), "gradients": (40, 26), "sensitivity": (410, 400), "evaluate": (75, 45),
    "verify": (80, 125), "generate": (15, 30), "in memory": (400, 510),
    "compress dense": (20, 45), "compress rtn": (20, 85), "compress rtn groups": (20, 95),
    "compress magnitude": (20, 85), "compress wanda": (30, 115), "compress wanda harmonic 2:4": (30, 115),
    "compress gptq refined": (135, 220),
    "compress gptq": (30, 125), "compress gptq groups": (30, 135), "compress sparsegpt_gptq": (30, 120),
    "compress sparsegpt_gptq 2:4": (30, 125), "compress obr_rtn": (30, 195), "compress obr_gptq": (70, 220),
    "compress obr_gptq random": (35, 200), "compress obr_gptq asymmetric": (95, 240),
    "compress joint": (105, 165), "compress joint 2:4": (105, 165), "compress joint paired": (105, 175),
    "compress sparsegpt_then_gptq": (30, 120), "compress gptq whole block": (40, 140),
    "compress joint groups": (105, 170), "compress joint layer": (110, 180), "compress joint 16 bits": (105, 190),
    "learn spinquant": (110, 80), "learn spinquant rounded": (130, 95), "learn ostquant": (165, 155),
    "learn ostquant klt": (205, 165), "learn flatquant": (150, 260), "learn flatquant direct": (65, 40),
    "learn omniquant": (125, 85), "learn smoothquant": (45, 30), "learn awq": (60, 35),
}  # fmt: skip
RATIO = 1.3


def run(script: str, tiny_folder: Path, folder: Path) -> dict:
    """What the helper writes: {stage: what happened}."""
    command = [sys.executable, HELPERS / script, tiny_folder, folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "report.json").read_text())
    return {name: {"folder": str(folder), **entry} for name, entry in found.items()}


@pytest.fixture(scope="module")
def stages(tiny_folder, tmp_path_factory) -> dict:
    return run("device_stages.py", tiny_folder, tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def memory(tiny_folder, tmp_path_factory) -> dict:
    return run("device_memory.py", tiny_folder, tmp_path_factory.mktemp("memory"))


def test_device_refuses_mixtures_and_counts_as_cuda_does(tmp_path):
    done = subprocess.run(
        [sys.executable, HELPERS / "device_checks.py"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_command_computes_on_the_device(stages, tiny_folder, tmp_path):
    """From the reservation of a GPU on; `stages` has made the calibration, and the same on the CPU."""
    tokens = stages["hessian"]["folder"] + "/tokens.safetensors"
    command = [sys.executable, HELPERS / "simulated_device.py", "hessian", "--model", tiny_folder / "model"]
    command += ["--tokens", tokens, "--out", tmp_path / "hessians", "--device", "cuda", "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    for path in (tmp_path / "hessians").glob("*.safetensors"):
        made = Path(stages["hessian"]["folder"], "hessian/cpu", path.name)
        assert path.read_bytes() == made.read_bytes()
    assert len(list(tmp_path.glob("obr-gpu-*.lock"))) == 1


def test_stages_are_all_methods_and_learners(stages):
    methods = {name.split()[1] for name in stages if name.startswith("compress")}
    read = {"released", "external"}  # of checkpoints of others, on the host
    assert methods == set(METHODS) - read
    assert {name.split()[1] for name in stages if name.startswith("learn")} == set(LEARNED)


def test_stages_run_without_tensors_on_the_wrong_device(stages):
    assert {name: entry["error"] for name, entry in stages.items() if entry["error"]} == {}


def test_results_are_those_of_the_cpu(stages):
    other = {name: entry["difference"] for name, entry in stages.items() if not entry["equal"] and name not in CLOSE}
    assert other == {}
    far = {name: stages[name]["difference"] for name, most in CLOSE.items() if stages[name]["difference"] > most}
    assert far == {}


def test_copies_and_waits_of_a_block_are_bounded(stages):
    assert set(LIMITS) == set(stages)
    beyond = {}
    for name, entry in stages.items():
        watch = entry["watch"]
        found = watch["counts"].get("to device", 0) / BLOCKS, watch["waits"] / BLOCKS
        if any(number > most for number, most in zip(found, LIMITS[name], strict=True)):
            beyond[name] = found, dict(list(watch["places"].items())[:5])
    assert beyond == {}


def test_peak_on_the_device_is_what_the_plan_says(memory):
    """Of an evaluation at most: how much of the next block is there when depends on two threads."""
    ratios = {name: entry["peak"] / entry["planned"] for name, entry in memory.items()}
    low = {name: ratio for name, ratio in ratios.items() if ratio < 1 / RATIO and name != "evaluate"}
    assert low | {name: ratio for name, ratio in ratios.items() if ratio > RATIO} == {}


def test_peak_on_the_device_does_not_grow_with_depth(memory):
    """The ends of the deeper model are the same, and so is all else that a stage may hold."""
    deep = {name: entry["deep"] / entry["peak"] for name, entry in memory.items() if "deep" in entry}
    assert len(deep) == 3 and {name: ratio for name, ratio in deep.items() if ratio > 1.02} == {}
