"""Triton's kernels compile for GPUs that are not here; skipped without Triton."""

import importlib.util
import os
import subprocess
import sys

import pandas as pd
import pytest

from helpers.paths import ROOT


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; run make test-triton"
)
@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--kernels", "one_token", "--patterns", "50 %"], 6),
        (["--kernels", "few_tokens", "--patterns", "paired 4:8", "--bits", "3", "--group", "16"], 6),
    ],
)
def test_kernels_compile_without_a_device_and_spill_no_registers(options, count, tmp_path):
    """Some patterns for three generations of GPUs; all by the script itself."""
    command = [sys.executable, ROOT / "benchmarks/triton_builds.py", "--out", tmp_path / "builds.csv"]
    command += options
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    found = pd.read_csv(tmp_path / "builds.csv")
    assert found["sm"].tolist() == [80, 90, 120] * (count // 3)
    assert (found["stack"] == 0).all() and found["registers"].between(16, 128).all()
    assert (found["programs"] >= 2).all()
