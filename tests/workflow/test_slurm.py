"""The workflow on a real SLURM of one node: a failing job fails it, a cancelled one is taken up, all of it completes.

For `make test-slurm`, which installs Debian's packages; as root, on a machine without a SLURM of its own. Without it
the profile alone is tested.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from helpers.configs import replaced
from helpers.paths import ROOT
from helpers.workflow_runs import CONFIG, SMOKE, command, environment
from obr.checkpoints.verify import verify_checkpoint

pytestmark = pytest.mark.workflow

PLACE = Path("/etc/slurm")
PROFILE = ("--workflow-profile", str(ROOT / "workflow/profiles/slurm"))
# A node without accounting: squeue tells how jobs end, as long as it remembers them.
ALONE = ("--slurm-status-command", "squeue", "--slurm-no-account", "--jobs", "4", "--latency-wait", "10",
         "--set-threads", f"kernels={os.cpu_count()}",
         "--slurm-init-seconds-before-status-checks", "5", "--seconds-between-status-checks", "5")  # fmt: skip
NAME = "ClusterName=obr-tests"
CONF = """
{name}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
StateSaveLocation={state}
SlurmdSpoolDir={state}/spool
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/slurmd.log
JobCompType=jobcomp/filetxt
JobCompLoc={state}/ended
MinJobAge=3600
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """SLURM's daemons, for as long as the tests take."""
    if "OBR_SLURM" not in os.environ:
        pytest.skip("starts a SLURM of its own: use make test-slurm")
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
    if missing or os.geteuid():
        pytest.skip(f"SLURM cannot be started here: {'missing ' + ', '.join(missing) if missing else 'not as root'}")
    # What tests that were killed have left is no other's.
    if (PLACE / "slurm.conf").exists() and NAME not in (PLACE / "slurm.conf").read_text():
        pytest.skip(f"{PLACE}/slurm.conf exists: this machine has a SLURM of its own")
    state = tmp_path_factory.mktemp("slurm")
    settings = {"name": NAME, "host": socket.gethostname(), "state": state, "cpus": os.cpu_count()}
    settings["memory"] = psutil.virtual_memory().total // 2**20
    PLACE.mkdir(exist_ok=True)
    (PLACE / "slurm.conf").write_text(CONF.format(**settings))
    (PLACE / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    daemons = [["runuser", "-u", "munge", "--", "munged", "--foreground"], ["slurmctld", "-D"], ["slurmd", "-D"]]
    daemons[2] += ["-N", settings["host"]]
    running = []
    try:
        for daemon in daemons:
            running.append(subprocess.Popen(daemon, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(2)
        for _ in range(30):
            if "idle" in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout:
                break
            time.sleep(1)
        else:
            pytest.fail((state / "slurmctld.log").read_text()[-3000:])
        yield state
    finally:
        subprocess.run(["scancel", "--user", "root"], capture_output=True)
        for process in reversed(running):
            process.terminate()
            process.wait(20)
        for name in ("slurm.conf", "cgroup.conf"):
            (PLACE / name).unlink()


@pytest.fixture
def folder(cluster, tiny_folder, tmp_path) -> Path:
    """To work in; jobs find the model through the environment (OBR_TINY), which SLURM passes on."""
    return tmp_path


def on_slurm(folder: Path, *arguments: str, config: dict = CONFIG) -> list[str]:
    found = command(folder, config, *PROFILE, *ALONE, *arguments)
    cores = found.index("--cores")
    return found[:cores] + found[cores + 2 :]


def run(folder: Path, *arguments: str, config: dict = CONFIG):
    return subprocess.run(
        on_slurm(folder, *arguments, config=config),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(),
    )  # fmt: skip


def queued() -> list[tuple[str, str]]:
    """(job, state) of what SLURM has not ended."""
    shown = subprocess.run(["squeue", "-h", "-o", "%i %T %k"], capture_output=True, text=True).stdout
    return [tuple(line.split(maxsplit=2)) for line in shown.splitlines()]


def test_the_profile_asks_for_what_the_models_size_calls_for(tiny_folder, tmp_path):
    """As a dry run, which needs no SLURM: the profile and the plugin's options are read, for a model of 7 billion."""
    config = replaced(CONFIG, device="cuda", models__tiny__parameters=7)
    planned = run(tmp_path, "--dry-run", config=config)
    assert planned.returncode == 0, planned.stdout[-5000:]
    found = dict(re.findall(r"^rule (\w+):\n(?:    .*\n)*?    resources: (.*)$", planned.stdout, re.MULTILINE))
    for rule, asked in {
        "compress": ("mem_mb=25000", "runtime=400", "gpu=1"),
        "hessian": ("mem_mb=25000", "runtime=165", "gpu=1"),
        "evaluate": ("mem_mb=25000", "runtime=260", "gpu=1"),
        "download_model": ("mem_mb=37000", "runtime=65"),
        "kernels": ("mem_mb=8000", "runtime=60", "slurm_extra=--exclusive"),
        "table": ("mem_mb=1000", "runtime=10"),
    }.items():
        assert {*asked} <= {*found[rule].split(", ")}, (rule, found[rule])
        assert ("gpu=1" in asked) == ("gpu=1" in found[rule].split(", ")), (rule, found[rule])


def test_a_failing_job_fails_the_run_with_its_log_shown(folder):
    wrong = replaced(CONFIG, texts__train__sha256="0" * 64)
    done = run(folder, "--retries", "0", str(SMOKE / "texts/train.txt"), config=wrong)
    assert done.returncode == 1 and "Traceback" not in done.stdout, done.stdout[-5000:]
    assert "obr: text path" in done.stdout and "correct the sha256 in the config" in done.stdout, done.stdout[-5000:]
    assert not (folder / SMOKE / "texts/train.txt").exists()


def test_a_cancelled_job_is_taken_up_and_the_workflow_completes(cluster, folder):
    with open(folder / "output", "w", encoding="utf-8") as output:
        first = subprocess.Popen(on_slurm(folder), stdout=output, stderr=output, env=environment())
        cancelled = None
        while first.poll() is None:
            jobs = [job for job, state, *what in queued() if state == "RUNNING" and "compress" in "".join(what)]
            if jobs and cancelled is None:
                cancelled = jobs[0]
                subprocess.run(["scancel", cancelled], check=True)
            time.sleep(0.5)
    shown = (folder / "output").read_text()
    assert cancelled and first.returncode == 1, shown[-5000:]
    assert "Error in rule compress" in shown and "Traceback" not in shown, shown[-5000:]
    tables = [folder / SMOKE / f"tables/{name}.csv" for name in CONFIG["tables"]]
    assert not any(table.exists() for table in tables)
    second = run(folder)
    assert second.returncode == 0 and all(table.stat().st_size for table in tables), second.stdout[-5000:]
    assert all((folder / SMOKE / f"figures/{name}.pdf").exists() for name in CONFIG["figures"])
    assert "rule hessian" not in second.stdout  # what had finished is not done again
    manifests = list((folder / SMOKE / "compressed").glob("*/*/manifest.json"))
    assert len(manifests) == len(CONFIG["recipes"]) and not any(
        verify_checkpoint(manifest.parent) for manifest in manifests
    )
    ended = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in (cluster / "ended").read_text().splitlines()]
    states = Counter(job["JobState"] for job in ended)
    times = [datetime.fromisoformat(job[key]) for job in ended for key in ("StartTime", "EndTime")]
    print(f"{len(ended)} jobs ended in {max(times) - min(times)}: {dict(states)}")
    print(f"first run: {rules(shown)}; second: {rules(second.stdout)}")
    assert states["CANCELLED"] == 1 and states["COMPLETED"] > 20 and {*states} <= {"CANCELLED", "COMPLETED", "FAILED"}


def rules(output: str) -> dict[str, int]:
    """How many jobs of each rule an output of Snakemake tells of."""
    return dict(Counter(re.findall(r"^(?:local)?rule (\w+):", output, re.MULTILINE)))
