"""What a result was made from: inputs, code, settings and versions."""

import platform
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from obr.errors import ObrError
from obr.runtime.code_digest import digest
from obr.runtime.files import read_json, sha256_of

LOCKS = ("requirements.lock", "requirements.torch.lock")  # beside the Snakefile; an installed wheel has none


def versions() -> dict[str, str]:
    """Of Python and the packages that decide a result."""
    packages = ("obr", "torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def software(root: Path = Path(__file__).parents[3]) -> dict:
    """The bill of a result's software: {platform, packages: {name: version}, lock, unlike_lock}.

    packages: all that this one needs, however indirectly, and that is installed; nothing else of the environment.
    lock: sha256 of each lock file in `root`. unlike_lock: {name: locked version} where another is installed.
    """
    packages = _needed("obr[all]")
    locks = [root / name for name in LOCKS if (root / name).is_file()]
    locked = dict(
        pin for path in locks for pin in re.findall(r"(?m)^([\w.-]+)==([^\s;\\]+)", path.read_text(encoding="utf-8"))
    )
    locked = {_canonical(name): pinned for name, pinned in locked.items()}
    return {
        "platform": platform.platform(),
        "packages": packages,
        "lock": {path.name: sha256_of(path) for path in locks},
        "unlike_lock": {name: pin for name, pin in locked.items() if packages.get(name, pin).split("+")[0] != pin},
    }


def _needed(package: str) -> dict[str, str]:
    """Version of a package and of every installed one that it requires on this machine, by canonical name."""
    from packaging.requirements import Requirement

    found, seen, todo = {}, set(), [Requirement(package)]
    while todo:
        wanted = todo.pop()
        name, extras = _canonical(wanted.name), ("", *sorted(wanted.extras))
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # optional, or a module that comes with another package
        found[name] = installed.version
        for text in installed.requires or ():
            part = Requirement(text)
            if part.marker is None or any(part.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(part)
    return dict(sorted(found.items()))


def _canonical(name: str) -> str:
    """As PyPI compares names: Jinja2 and jinja2 are one, and so are ruamel.yaml and ruamel-yaml."""
    return re.sub(r"[-_.]+", "-", name).lower()


def fingerprint(
    stage: str, model: Path, files: dict[str, Path | None], *, device: str, dtype: str, **settings: Any
) -> dict:
    """What decides a run of a stage, as plain data: all but the number of threads and where things lie.

    stage: module whose code runs. model: folder of a downloaded model. files: further inputs, by what they are.
    """
    return {
        **settings,
        "model": _model(model),
        **{name: sha256_of(path) if path else None for name, path in files.items()},
        "code": digest(stage),
        "device": device.split(":")[0],
        "dtype": dtype,
        "versions": versions(),
    }


def model_hashes(folder: Path) -> dict[str, str] | None:
    """sha256 of each file of a model folder, as the download noted them; None where it noted none.

    A file that has been written since then is hashed again.

    Raises:
        ObrError: a file is not the one that was downloaded.
    """
    path = Path(folder) / "source.json"
    if not path.exists():
        return None
    noted = read_json(path).get("sha256") or None
    for name, wanted in (noted or {}).items():
        file = Path(folder) / name
        if file.is_file() and _hash_since(file, path.stat().st_ctime_ns) not in (None, wanted):
            raise ObrError(f"{file} is not the file that was downloaded (its sha256 differs); download it again.")
    return noted


def _hash_since(file: Path, time: int) -> str | None:
    """sha256 of a file if it was written, or put there, after a time in ns; None if not."""
    status = file.stat()
    written = max(status.st_mtime_ns, status.st_ctime_ns)
    return _hash(file, status.st_size, written) if written > time else None


@cache
def _hash(file: Path, size: int, written: int) -> str:
    return sha256_of(file)


def check_measured_on(noted: dict, what: str, model: Path, rotation: Path | None) -> None:
    """Raise ObrError if statistics are of another model, or of the same one rotated otherwise.

    noted: what their stage has noted, with "model" as of `model_hashes` and "rotation", a sha256 or None; statistics
    of earlier versions note neither. what: they are, for messages. model, rotation: that read them now.
    """
    if "rotation" not in noted:
        return
    here = model_hashes(model)
    if noted["model"] and here and noted["model"] != here:
        odd = min(name for name in {*noted["model"], *here} if noted["model"].get(name) != here.get(name))
        raise ObrError(f"{what} are of another model than {model} (its {odd} differs); measure them on this model.")
    if noted["rotation"] != (sha256_of(rotation) if rotation else None):
        given = f"rotated by {rotation}" if rotation else "without a rotation"
        raise ObrError(f"{what} are not of the model {given}; measure them with the rotation that is used here.")


def _model(folder: Path) -> dict:
    """Hashes where the download noted them, else names, sizes and times: hashing a large model takes minutes."""
    if noted := model_hashes(folder):
        return noted
    weights = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.glob("*.safetensors"))}
    return {"config": sha256_of(folder / "config.json"), **weights}
