"""What a result was made from: inputs, code, settings and versions."""

import platform
from importlib.metadata import version
from pathlib import Path

from obr import fetch
from obr.digest import digest
from obr.files import read_json


def versions() -> dict[str, str]:
    """Of Python and the packages that decide a result."""
    packages = ("obr", "torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def fingerprint(
    stage: str, model: Path, files: dict[str, Path | None], *, device: str, dtype: str, **settings
) -> dict:
    """What decides a run of a stage, as plain data: all but the number of threads and where things lie.

    stage: module whose code runs. model: folder of a downloaded model. files: further inputs, by what they are.
    """
    return {
        **settings,
        "model": _model(model),
        **{name: fetch.sha256_of(path) if path else None for name, path in files.items()},
        "code": digest(stage),
        "device": device.split(":")[0],
        "dtype": dtype,
        "versions": versions(),
    }


def _model(folder: Path) -> dict:
    """Hashes where the download noted them, else names, sizes and times: hashing a large model takes minutes."""
    if (folder / "source.json").exists() and (noted := read_json(folder / "source.json").get("sha256")):
        return noted
    weights = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.glob("*.safetensors"))}
    return {"config": fetch.sha256_of(folder / "config.json"), **weights}
