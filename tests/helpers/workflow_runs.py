"""Running the workflow, and comparing what two runs have left."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml

from helpers.paths import ROOT
from obr.checkpoints.files import sketches_of

CONFIG = yaml.safe_load((ROOT / "tests" / "config.yaml").read_text())
SMOKE = Path("results/smoke")
# What a clock or a kernel's timing decides, and what is not a result.
TIMED = ("logs", "benchmarks", "kernels")


def command(folder: Path, config: dict, *arguments: str, source: Path = ROOT) -> list[str]:
    """Snakemake's command line for a folder to work in; the config is written there."""
    (folder / "config.test.yaml").write_text(yaml.safe_dump(config))
    found = [sys.executable, "-m", "snakemake", "--snakefile", str(source / "Snakefile"), "--directory", str(folder)]
    found += ["--configfile", str(folder / "config.test.yaml"), "--cores", "2"]
    return [*found, "--max-jobs-per-timespan", "100/1s", *arguments]  # few jobs, whose end need not be waited for


def environment(source: Path = ROOT, **more: str) -> dict[str, str]:
    """In which the project's own `obr` is found."""
    binaries = str(Path(sys.executable).parent)
    own = {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(source / "workflow")}
    return {**os.environ, **own, **more}


def snakemake(folder: Path, config: dict, *arguments: str, source: Path = ROOT, **variables: str):
    """Run Snakemake in a folder; returns the finished process, output and errors together."""
    return subprocess.run(
        command(folder, config, *arguments, source=source),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(source, **variables),
    )  # fmt: skip


def digests(results: Path) -> dict[str, str]:
    """sha256 of every result, of those that tell seconds without those."""
    found = {}
    for path in sorted(results.rglob("*")):
        name = path.relative_to(results).as_posix()
        if path.is_file() and name.split("/")[0] not in TIMED and "kernels" not in path.name:
            found[name] = hashlib.sha256(_untimed(path)).hexdigest()
    return found


def _untimed(path: Path) -> bytes:
    if path.name == "layers.csv":
        return pd.read_csv(path).drop(columns="seconds").to_csv().encode()
    content = path.read_bytes()
    if path.suffix == ".json" and isinstance(value := json.loads(content), dict):
        value.pop("seconds", None)
        value.get("files", {}).pop("layers.csv", None)  # its hash
        return json.dumps(value, sort_keys=True).encode()
    return content


def with_hashes(checkpoint: Path) -> None:
    """Let a checkpoint's manifest list the files as they are now."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"] = {
        name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in manifest["files"]
    }
    manifest["sketches"] = sketches_of(checkpoint, manifest["files"])
    path.unlink()  # it may be a link
    path.write_text(json.dumps(manifest), encoding="utf-8")
