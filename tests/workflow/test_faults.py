"""Plugs pulled: kills at random moments, full and read-only disks, two runs at once. Nothing is lost, all is told.

OBR_KILLS says how often the workflow is killed, by default never, in `make test-faults` 25 times. Disks are tmpfs,
for which the tests must run as root, on a machine that lets them mount.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from helpers.random_llama import random_llama
from helpers.workflow_runs import CONFIG, SMOKE, command, digests, environment, snakemake
from obr.checkpoints.verify import verify_checkpoint
from obr.cli import main
from obr.models.blocks import StreamedBlocks
from obr.rotations.obtain import make
from obr.runtime.files import write_text

pytestmark = pytest.mark.workflow

KILLS = int(os.environ.get("OBR_KILLS", "0"))
# With few kills a checkpoint, with many what one table is made of: models, texts and tasks, rotation, windows,
# Hessians, compressions, scores.
TARGET = str(SMOKE / ("tables/zero_shot.csv" if KILLS > 19 else "manifests/tiny/obr_gptq_sequential.json"))
# The stages at which kills are aimed, in turn, and the results that go with each.
STAGES = {
    "download-": "", "calibrate": "calibration", "hessian": "hessians", "compress": "compressed",
    "evaluate": "evaluations",
} if KILLS > 19 else {"compress": "compressed"}  # fmt: skip
ENTRY = json.dumps({"method": "obr_gptq", "rotation": "quarot", "calibration": "c", "hessian": "cached"})


# --- Kills ------------------------------------------------------------------------------------------------


def stages_of(process: psutil.Process, aims: list[str]) -> list[psutil.Process]:
    """Stages of some kinds that a running Snakemake has started: processes of `obr`, not the shells around them."""
    try:
        commands = [(child, child.cmdline()) for child in process.children(recursive=True)]
        return [
            child
            for child, command in commands
            if any(part.endswith("/obr") for part in command[:3])
            and any(part.startswith(tuple(aims)) for part in command)
        ]
    except psutil.Error:
        return []


def pulled(folder: Path, victim: str, aim: str, draw: random.Random) -> str:
    """Start the workflow and kill a stage, Snakemake alone or all processes at once, some time after a stage of the
    kind `aim` began, or a later one where those have ended.

    Returns what was killed, "finished" if run or stage had ended before.
    """
    with open(folder / "output", "a", encoding="utf-8") as output:
        run = subprocess.Popen(
            command(folder, CONFIG, TARGET), stdout=output, stderr=output, env=environment(), start_new_session=True
        )
    process, aims = psutil.Process(run.pid), [*STAGES][[*STAGES].index(aim) :]
    while run.poll() is None and not (stages := stages_of(process, aims)):
        time.sleep(0.05)
    deadline = time.monotonic() + draw.uniform(0, 6)
    while run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if run.poll() is not None:
        return "finished"
    stages = stages_of(process, aims) or stages
    chosen = draw.choice(stages)
    try:
        told = f"{victim}, {next(part for part in chosen.cmdline() if '/' not in part)}"
    except (psutil.Error, StopIteration):  # it has just ended
        told = f"{victim}, none"
    if victim == "stage":
        try:
            chosen.kill()
        except psutil.Error:
            told = "finished"
    elif victim == "Snakemake":
        run.kill()
    else:
        os.killpg(run.pid, signal.SIGKILL)
        for stage in stages:
            if stage.is_running():
                stage.kill()
    run.wait()
    return told


def finish(folder: Path) -> int:
    """Unlock if need be and run until done; returns the number of runs.

    A stage that outlived its Snakemake may still be at work: the next run is told so, and is started again.
    """
    for runs in range(1, 20):
        run = snakemake(folder, CONFIG, TARGET)
        if "--unlock" in run.stdout:
            assert snakemake(folder, CONFIG, "--unlock").returncode == 0
            continue
        if run.returncode == 0:
            return runs
        assert "is being written by process" in run.stdout or "Error in rule" in run.stdout, run.stdout[-5000:]
        assert "Traceback" not in run.stdout, run.stdout[-5000:]
        time.sleep(2)
    raise AssertionError(run.stdout[-5000:])


@pytest.fixture(scope="module")
def undisturbed(tiny_folder, tmp_path_factory) -> Path:
    """A folder in which the target was made in peace."""
    if not KILLS:
        pytest.skip("kills of the workflow take minutes: use make test-faults, or set OBR_KILLS")
    folder = tmp_path_factory.mktemp("undisturbed")
    run = snakemake(folder, CONFIG, TARGET)
    assert run.returncode == 0, run.stdout[-5000:]
    return folder


def test_killed_workflows_go_on_and_end_with_the_same_results(undisturbed, tmp_path):
    draw, killed, started = random.Random(0), Counter(), time.monotonic()
    victims = ["stage", "Snakemake", "all"]
    while sum(killed.values()) < KILLS:
        count = sum(killed.values())
        aim = [*STAGES][count * len(STAGES) // KILLS]
        what = pulled(tmp_path, victims[count % 3], aim, draw)
        if what == "finished":  # or stopped by a stage that outlived its Snakemake
            if complete(tmp_path):  # have it made again from there: a lost stage alone, Snakemake leaves be
                for lost in ((tmp_path / TARGET).parent, tmp_path / SMOKE / STAGES[aim]):
                    shutil.rmtree(lost)
            continue
        killed[what] += 1
        shutil.rmtree(tmp_path / ".snakemake/locks", ignore_errors=True)  # all that --unlock does
        print(f"{time.monotonic() - started:.0f} s: killed {what}", flush=True)
    runs = finish(tmp_path)
    print(f"{sum(killed.values())} kills ({dict(killed)}), then finished in {runs} runs")
    made, whole = digests(tmp_path / SMOKE), digests(undisturbed / SMOKE)
    assert not [name for name in made if name.endswith((".lock", ".tmp", ".old", ".unfinished"))]
    assert made == {name: whole[name] for name in made}
    for manifest in (tmp_path / SMOKE / "compressed").glob("*/*/manifest.json"):
        assert verify_checkpoint(manifest.parent) == []


def complete(folder: Path) -> bool:
    return "Nothing to be done" in snakemake(folder, CONFIG, "--dry-run", TARGET).stdout


def test_a_killed_snakemake_leaves_a_lock_that_explains_itself(tiny_folder, tmp_path):
    """What a second run in the same folder is told, too."""
    (tmp_path / ".snakemake/locks").mkdir(parents=True)
    target = str(SMOKE / "texts/train.txt")
    for kind in ("input", "output"):
        (tmp_path / f".snakemake/locks/0.{kind}.lock").write_text(f"{target}\n")
    run = snakemake(tmp_path, CONFIG, target)
    assert run.returncode != 0 and "Directory cannot be locked" in run.stdout
    assert "no other Snakemake process" in run.stdout and "--unlock" in run.stdout
    assert not (tmp_path / target).exists()
    assert snakemake(tmp_path, CONFIG, "--unlock").returncode == 0
    assert snakemake(tmp_path, CONFIG, target).returncode == 0


# --- Disks ------------------------------------------------------------------------------------------------


class Disk:
    """A small file system of its own."""

    def __init__(self, place: Path):
        self.place = place
        self.mount("size=4m")

    def mount(self, options: str, *more: str) -> None:
        tmpfs = ["mount", "-t", "tmpfs", *more, "-o", options, "tmpfs", str(self.place)]
        done = subprocess.run(tmpfs, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here ({done.stderr.strip()})")

    def leave(self, size: int) -> None:
        """Fill it up, but for so many bytes."""
        (self.place / "filler").unlink(missing_ok=True)
        state = os.statvfs(self.place)
        with open(self.place / "filler", "wb") as file:
            file.write(bytes(max(0, state.f_bavail * state.f_bsize - size)))

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.place)], check=True)


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    disk = Disk(place)
    yield disk
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A random model, its rotation, tokens and Hessians."""
    folder = tmp_path_factory.mktemp("inputs")
    random_llama(3).save_pretrained(folder / "model")
    make({"kind": "quarot"}, folder / "model", folder / "rotation")
    tokens = torch.randint(0, 128, (16, 64), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, folder / "tokens", metadata={"calibration": "{}"})
    assert main.main(stage("hessian", folder, folder / "hessians")) == 0
    return folder


def stage(name: str, inputs: Path, out: Path) -> list[str]:
    """Arguments of a stage that writes to `out`."""
    common = ["--model", inputs / "model", "--rotation", inputs / "rotation", "--out", out]
    if name == "download-model":
        entry = json.dumps({"source": {"source": "path", "path": str(inputs / "model")}})
        found = [name, "--settings", entry, "--out", out]
    elif name == "hessian":
        found = [name, *common, "--tokens", inputs / "tokens"]
    elif name == "rotation":
        found = ["download-rotation", "--settings", '{"kind": "quarot"}', "--model", inputs / "model", "--out", out]
    else:
        found = [name, "--recipe", ENTRY, *common, "--hessians", inputs / "hessians"]
    return [str(argument) for argument in found]


@pytest.mark.parametrize("name", ["download-model", "rotation", "hessian", "compress"])
def test_a_full_disk_is_told_and_leaves_nothing_that_passes_for_whole(name, inputs, disk, tmp_path, capsys):
    """With less and less room, and then with enough: as if it had been there from the start."""
    assert main.main(stage(name, inputs, tmp_path / "there")) == 0
    out, failed = disk.place / "out", 0
    for room in (0, 8, 40, 90, 150, 210, 280):
        disk.leave(room * 1024)
        capsys.readouterr()
        if main.main(stage(name, inputs, out)) == 0:
            shutil.rmtree(out, ignore_errors=True)
            continue
        failed += 1
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("obr: ")]
        assert len(told) == 1 and re.search(r"No space left on device|free the space", told[0]), told
        for sign in ("manifest.json", "hessian.json", "source.json"):
            assert not (out / sign).exists()
        if name == "rotation":
            assert not out.exists()
    assert failed >= 2
    disk.leave(3 << 20)
    assert main.main(stage(name, inputs, out)) == 0
    here, there = (digests(f) if f.is_dir() else f.read_bytes() for f in (out, tmp_path / "there"))
    assert here == there
    assert {path.name for path in disk.place.iterdir()} == {"out", "filler"}


@pytest.mark.parametrize("name", ["rotation", "compress"])
def test_a_disk_that_cannot_be_written_is_told(name, inputs, disk, capsys):
    disk.remount("ro")
    assert main.main(stage(name, inputs, disk.place / "out")) == 1
    error = capsys.readouterr().err.strip()
    assert re.fullmatch(
        r"obr: Read-only file system \(.*out.*\); free the space or correct the path, then rerun\.", error
    )


def test_the_workflow_tells_of_a_full_disk(tiny_folder, disk, tmp_path):
    (tmp_path / "results").symlink_to(disk.place)
    disk.leave(12 * 1024)
    target = str(SMOKE / "texts/train.txt")
    run = snakemake(tmp_path, CONFIG, "--retries", "0", target)
    assert run.returncode != 0 and not (tmp_path / target).exists()
    assert "No space left on device" in run.stdout and "Traceback" not in run.stdout, run.stdout
    disk.leave(3 << 20)
    assert snakemake(tmp_path, CONFIG, target).returncode == 0


def test_the_workflow_tells_of_results_that_cannot_be_written(tiny_folder, disk, tmp_path):
    (tmp_path / "results").symlink_to(disk.place)
    disk.remount("ro")
    run = snakemake(tmp_path, CONFIG, str(SMOKE / "texts/train.txt"))
    assert run.returncode != 0 and "Traceback" not in run.stdout, run.stdout
    assert "results/smoke cannot be written (Read-only file system): correct its rights" in run.stdout, run.stdout
    assert snakemake(tmp_path, CONFIG, "--dry-run", str(SMOKE / "texts/train.txt")).returncode == 0


def test_results_on_read_only_disk_can_be_read(disk):
    """Finished results on a read-only disk are finished."""
    write_text("x", disk.place / "x")
    disk.remount("ro")
    with pytest.raises(OSError, match="Read-only"):
        write_text("y", disk.place / "x")
    assert (disk.place / "x").read_text() == "x"


# --- GPUs, memory and cores that others take --------------------------------------------------------------


def too_large():
    torch.empty(1 << 60)


def too_many():
    bytearray(1 << 60)


def on_gpu(kind, says):
    """What PyTorch raises on a GPU; there need not be one."""

    def fail():
        raise getattr(torch, kind, RuntimeError)(says)

    return fail


@pytest.mark.parametrize(
    "fail, sentence",
    [
        (
            too_large,
            "memory is full (.* you tried to allocate 4611686018427387904 bytes.*); free some or ask for more",
        ),
        (too_many, "memory is full (no more was given); free some or ask for more, then rerun to continue."),
        (
            on_gpu("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB."),
            "the GPU's memory is full (CUDA out of memory.*); see nvidia-smi for who uses it, then rerun",
        ),
        (
            on_gpu("AcceleratorError", "CUDA error: unspecified launch failure\nCUDA kernel errors might"),
            "the GPU failed or is gone (CUDA error: unspecified launch failure); see nvidia-smi, then rerun",
        ),
        (
            on_gpu("RuntimeError", "No CUDA GPUs are available"),
            "the GPU failed or is gone (No CUDA GPUs are available)",
        ),
    ],
)
def test_memory_and_gpus_that_are_taken_away_are_told(fail, sentence, inputs, monkeypatch, tmp_path, capsys):
    """Wherever in a stage it happens: here as the second block begins."""
    whole = StreamedBlocks.load

    def load(self, index):
        if index == 1:
            fail()
        return whole(self, index)

    monkeypatch.setattr(StreamedBlocks, "load", load)
    assert main.main(stage("compress", inputs, tmp_path / "out")) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("obr: ")]
    pattern = ".*".join(map(re.escape, sentence.split(".*")))
    assert len(told) == 1 and re.match(f"obr: {pattern}", told[0]), told
    assert not (tmp_path / "out/manifest.json").exists()
    assert len(list(tmp_path.glob("out.unfinished/block_*.json"))) == 1
    monkeypatch.undo()
    assert main.main(stage("compress", inputs, tmp_path / "out")) == 0  # goes on at the second block
    assert verify_checkpoint(tmp_path / "out") == []


def test_a_gpu_that_is_not_there_is_told(inputs, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main.main([*stage("hessian", inputs, tmp_path / "out"), "--device", "cuda"]) == 1
    assert (
        "device is 'cuda' but CUDA_VISIBLE_DEVICES is '', which names no GPU; use --config device=cpu."
        in capsys.readouterr().err
    )


@pytest.mark.skipif(not KILLS, reason="two processes of two threads each: use make test-faults, or set OBR_KILLS")
def test_a_core_that_is_taken_away_changes_no_byte(inputs, tmp_path):
    """Two threads, on two cores where there are two, then both on one."""
    cores = sorted(os.sched_getaffinity(0))
    for name in ("whole", "cut"):
        out = tmp_path / name
        command = [sys.executable, "-m", "obr", *stage("compress", inputs, out), "--threads", "2"]
        process = subprocess.Popen(command, env=environment(OMP_WAIT_POLICY="passive"), stderr=subprocess.DEVNULL)
        while name == "cut" and process.poll() is None:
            if (tmp_path / "cut.unfinished").exists():
                for thread in psutil.Process(process.pid).threads():
                    os.sched_setaffinity(thread.id, cores[:1])
                break
            time.sleep(0.001)
        assert process.wait() == 0
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
