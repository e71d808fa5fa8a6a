"""Shared by the tests: the tiny trained model, and the real data where OBR_DATA names it.

Test files run side by side, one process per core (pytest-xdist). The processes share what takes long to make.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

import running
import tiny

FINISHED = ("test_workflow", "test_docs")
os.environ["OBR_TESTS"] = str(Path(__file__).parent)  # read by tests/config.yaml


class Files(LoadScopeScheduling):
    """One process per file, so that fixtures of modules are made once; the files that use `finished` share one."""

    def _split_scope(self, nodeid):
        file = nodeid.split("::")[0]
        return "finished" if Path(file).stem in FINISHED else file


def pytest_xdist_make_scheduler(config, log):
    return Files(config, log)


def pytest_collection_modifyitems(items):
    """First what takes longest."""
    items.sort(key=lambda item: item.path.stem not in FINISHED)


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
    folder = once(tmp_path_factory, "tiny", tiny.main)
    os.environ["OBR_TINY"] = str(folder)  # read by tests/config.yaml, in this process and in Snakemake's
    return folder


@pytest.fixture(scope="session")
def finished(tiny_folder, tmp_path_factory) -> Path:
    """A folder in which the whole workflow has run."""
    folder = tmp_path_factory.mktemp("workflow")
    run = running.snakemake(folder, running.CONFIG)
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
