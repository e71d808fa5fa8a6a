"""One GPU a job, with made-up cards: locks by card, however it is named, freed when a job ends or dies."""

import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from obr.errors import ObrError
from obr.runtime import gpu

A100, H100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe"
UUIDS = [f"GPU-{i}ad2367b-1df1-0f56-0e8e-c4c6d7b2a1{i}0" for i in range(4)]
MIGS = [f"MIG-{i}c89bd0a-87bf-5cb6-a2a3-3b2c4d5e6f7{i}" for i in range(3)]
OLD_MIG = "MIG-GPU-0ad2367b-1df1-0f56-0e8e-c4c6d7b2a100/3/0"
JOB = """
import os, sys
from obr.runtime import gpu
gpu.SECONDS = 0.02
gpu.claim("cuda")
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


def listed(*kinds: str, instances: dict[int, list[str]] | None = None) -> str:
    """What `nvidia-smi -L` says of cards of these kinds; instances: UUIDs of MIG instances by card."""
    lines = []
    for index, kind in enumerate(kinds):
        lines.append(f"GPU {index}: {kind} (UUID: {UUIDS[index]})")
        for number, uuid in enumerate((instances or {}).get(index, [])):
            lines.append(f"  MIG 1g.10gb     Device  {number}: (UUID: {uuid})")
    return "\n".join(lines) + "\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes up a machine's cards, by the text of `nvidia-smi -L`; locks lie in a folder."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "locks").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "locks"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in (gpu.VISIBLE, "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "")  # so that what a claim sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(gpu, "_held", [])

    def cards(text: str, indices: str = "") -> None:
        (tmp_path / "list").write_text(text)
        (tmp_path / "indices").write_text(indices)
        program = tmp_path / "bin/nvidia-smi"
        program.write_text(f'#!/bin/sh\n[ "$1" = -L ] && exec cat {tmp_path}/list\nexec cat {tmp_path}/indices\n')
        program.chmod(0o755)

    yield cards
    for file in gpu._held:
        file.close()


@pytest.fixture
def jobs():
    """Starts jobs that claim a GPU and keep it until their input ends; all are ended after the test."""
    started = []

    def start(**variables: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", JOB], env={**os.environ, **variables}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def claimed(job: subprocess.Popen) -> str:
    return job.stdout.readline().strip()


def ended(job: subprocess.Popen) -> None:
    job.stdin.close()
    job.wait()


def locks() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("obr-gpu-*.lock")}


@pytest.mark.parametrize(
    "instances, expected",
    [(None, UUIDS[:2]), ({0: MIGS[:2]}, [*MIGS[:2], UUIDS[1]])],
    ids=["whole cards", "one card in instances"],
)
def test_visible_cards_without_variable_are_all_by_uuid(machine, instances, expected):
    machine(listed(A100, A100, instances=instances))
    assert list(gpu.visible_gpus()) == expected


def test_visible_cards_of_an_old_nvidia_smi_are_indices(machine):
    machine("no list\n", "0\n1\n")
    assert list(gpu.visible_gpus()) == ["0", "1"]


@pytest.mark.parametrize(
    "given, entries",
    [
        ("0,1", ["0", "1"]),
        (" 1 , 0", ["1", "0"]),
        ("0,2,1", ["0"]),
        (f"{UUIDS[0]},{UUIDS[3]},1", [UUIDS[0]]),
        ("1,-1,0", ["1"]),  # as CUDA reads it: what follows an invalid entry is not seen
        ("-1", []),
        ("", []),
        ("NoDevFiles", []),
        (f"{UUIDS[1]},{MIGS[0]}", [UUIDS[1], MIGS[0]]),
        (OLD_MIG, [OLD_MIG]),
    ],
)
def test_visible_cards_with_variable_are_those_that_cuda_sees(machine, monkeypatch, given, entries):
    machine(listed(A100, A100))
    monkeypatch.setenv(gpu.VISIBLE, given)
    assert list(gpu.visible_gpus()) == entries


@pytest.mark.parametrize("given", ["1", UUIDS[1], UUIDS[1][:9]], ids=["index", "UUID", "short UUID"])
def test_lock_of_a_card_is_one_however_it_is_named(machine, monkeypatch, given):
    machine(listed(A100, A100))
    monkeypatch.setenv(gpu.VISIBLE, given)
    assert gpu.visible_gpus() == {given: UUIDS[1]}


def test_lock_of_an_index_is_the_first_instance_of_its_card(machine, monkeypatch):
    machine(listed(A100, instances={0: MIGS[:2]}))
    monkeypatch.setenv(gpu.VISIBLE, "0")
    assert gpu.visible_gpus() == {"0": MIGS[0]}


def test_lock_of_an_index_among_unlike_cards_needs_the_order_of_the_bus(machine, monkeypatch):
    """CUDA counts the fastest first, nvidia-smi by the bus."""
    machine(listed(A100, H100))
    monkeypatch.setenv(gpu.VISIBLE, "1")
    assert gpu.visible_gpus() == {"1": f"{platform.node()}-1"}
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert gpu.visible_gpus() == {"1": UUIDS[1]}


def test_claim_of_an_instance_with_slashes_in_its_name_is_a_file(machine, monkeypatch):
    machine(listed(A100))
    monkeypatch.setenv(gpu.VISIBLE, OLD_MIG)
    assert gpu.claim("cuda") == "cuda" and os.environ[gpu.VISIBLE] == OLD_MIG
    assert locks() == {f"obr-gpu-{os.getuid()}-{OLD_MIG.replace('/', '_')}.lock"}


def test_claim_again_in_a_process_keeps_its_card(machine, jobs):
    machine(listed(A100, A100))
    gpu.claim("cuda")
    first = os.environ[gpu.VISIBLE]
    assert gpu.claim("cuda") == "cuda" and os.environ[gpu.VISIBLE] == first and len(gpu._held) == 1


def test_jobs_side_by_side_have_different_cards_whatever_names_them(machine, jobs):
    machine(listed(A100, A100, A100))
    by_default = jobs()
    assert claimed(by_default) == UUIDS[0]
    by_index, by_uuid = jobs(CUDA_VISIBLE_DEVICES="0,1"), jobs(CUDA_VISIBLE_DEVICES=",".join(UUIDS[2::-1]))
    assert claimed(by_index) == "1" and claimed(by_uuid) == UUIDS[2]


def test_more_jobs_than_cards_wait_say_so_and_go_on_when_one_ends(machine, jobs):
    machine(listed(A100, A100))
    first, second = jobs(), jobs()
    both = {claimed(first), claimed(second)}
    assert both == set(UUIDS[:2])
    third = jobs()
    assert third.stderr.readline() == (
        f"obr: All 2 GPUs ({UUIDS[0]}, {UUIDS[1]}) are reserved by other jobs; waiting for one.\n"
    )
    ended(first)
    assert claimed(third) in both
    ended(third)
    assert third.stderr.read() == "", "it is said once"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_job_that_dies_frees_its_card(machine, jobs, how):
    machine(listed(A100))
    dying, waiting = jobs(), None
    assert claimed(dying) == UUIDS[0]
    waiting = jobs()
    assert f"obr: GPU {UUIDS[0]} is reserved" in waiting.stderr.readline()
    dying.send_signal(how)
    assert claimed(waiting) == UUIDS[0]


@pytest.mark.parametrize(
    "given, message",
    [
        (None, "device is 'cuda' but no NVIDIA GPU is visible; use --config device=cpu."),
        ("", "device is 'cuda' but CUDA_VISIBLE_DEVICES is '', which names no GPU; use --config device=cpu."),
        ("-1", "device is 'cuda' but CUDA_VISIBLE_DEVICES is '-1', which names no GPU; use --config device=cpu."),
    ],
)
def test_claim_without_cards_says_why(machine, monkeypatch, given, message):
    machine("" if given is None else listed(A100))
    if given is not None:
        monkeypatch.setenv(gpu.VISIBLE, given)
    with pytest.raises(ObrError) as found:
        gpu.claim("cuda")
    assert str(found.value) == message
    assert gpu.claim("cpu") == "cpu" and gpu.device_of("auto") == "cpu"


def test_claim_without_nvidia_smi_says_that_no_card_is_visible(machine):
    with pytest.raises(ObrError, match="no NVIDIA GPU is visible"):
        gpu.claim("cuda")


def test_claim_on_a_disk_without_locks_names_it(machine, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    machine(listed(A100))
    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(ObrError, match=r"cannot be locked .*; set TMPDIR to a folder on a local disk"):
        gpu.claim("cuda")
