"""Fixtures of all tests: a tiny trained model, a finished workflow, a hub, and real data where OBR_DATA names them.

Test files run side by side, one process per core (pytest-xdist). The processes share what takes long to make.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

pytest.register_assert_rewrite("helpers")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from helpers import tiny_model, workflow_runs  # noqa: E402
from helpers.hub_server import hub, sharded_model  # noqa: E402, F401  fixtures
from helpers.paths import HELPERS  # noqa: E402

# Files that use the fixture `finished`, which takes longest.
FINISHED = ("workflow/test_whole_run.py", "docs/test_printed_commands.py")
TESTS = Path(__file__).parent
os.environ["OBR_TESTS"] = str(TESTS)  # read by tests/config.yaml


class Files(LoadScopeScheduling):
    """One process per file, so that fixtures of modules are made once; the files that use `finished` share one."""

    def _split_scope(self, nodeid):
        file = nodeid.split("::")[0]
        return "finished" if file.endswith(FINISHED) else file


def pytest_xdist_make_scheduler(config, log):
    return Files(config, log)


def pytest_collection_modifyitems(items):
    """First what takes longest: the files that use `finished`, then those with slow tests."""
    long = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("workflow")}
    items.sort(key=lambda item: (not item.path.as_posix().endswith(FINISHED), item.path not in long))


def once(factory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one process of the test run makes and all of them use."""
    workers = "PYTEST_XDIST_WORKER" in os.environ
    base = factory.getbasetemp().parent if workers else factory.getbasetemp()
    folder, made = base / f"shared-{name}", base / f"shared-{name}.made"
    with FileLock(base / f"shared-{name}.lock"):
        if not made.exists():
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """Folder with model/, train.txt and heldout.txt; OBR_TINY may name one that was made before."""
    if "OBR_TINY" in os.environ:
        return Path(os.environ["OBR_TINY"])
    folder = once(tmp_path_factory, "tiny", tiny_model.main)
    os.environ["OBR_TINY"] = str(folder)  # read by tests/config.yaml, in this process and in Snakemake's
    return folder


@pytest.fixture(scope="session")
def finished(tiny_folder, tmp_path_factory) -> Path:
    """A folder in which the whole workflow has run."""
    folder = tmp_path_factory.mktemp("workflow")
    run = workflow_runs.snakemake(folder, workflow_runs.CONFIG)
    assert run.returncode == 0, run.stdout[-5000:]
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with golden layers, WikiText-2 and task files."""
    if "OBR_DATA" not in os.environ:
        pytest.skip("OBR_DATA names no folder with golden layers and evaluation data")
    return Path(os.environ["OBR_DATA"])


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of wheels, instead of the user's own."""
    monkeypatch.setenv("OBR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache/wheels").mkdir(parents=True)
    return tmp_path / "cache/wheels"


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder of SmolLM2-135M, or of another small model."""
    if "OBR_MODEL" not in os.environ:
        pytest.skip("OBR_MODEL names no folder with a downloaded model, such as results/demo/models/smollm2-135m")
    return Path(os.environ["OBR_MODEL"])


@pytest.fixture(scope="module")
def obr_command():
    """(arguments, out, kill) -> (exit status, times of its notes), in a forked process with everything imported."""
    command = [sys.executable, str(HELPERS / "killable_commands.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:

        def run(arguments, out, kill=None):
            arguments = [str(a) for a in [*arguments, "--out", out]]
            request = {"arguments": arguments, "log": str(out.parent / "log"), "kill": kill}
            request["unfinished"] = f"{out}.unfinished"
            print(json.dumps(request), file=server.stdin, flush=True)
            answer = json.loads(server.stdout.readline())
            return answer["status"], answer["times"]

        yield run
        server.stdin.close()
