"""Shared by the tests: the tiny trained model, and the real data where OBR_DATA names it."""

import os
from pathlib import Path

import pytest

import running
import tiny

os.environ["OBR_TESTS"] = str(Path(__file__).parent)  # read by tests/config.yaml


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """Folder with model/, train.txt and heldout.txt; OBR_TINY may name one that was made before."""
    if "OBR_TINY" in os.environ:
        return Path(os.environ["OBR_TINY"])
    folder = tiny.main(tmp_path_factory.mktemp("tiny"))
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
