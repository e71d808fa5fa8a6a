"""What a result was made from: inputs, code, settings and versions."""

import platform
import re
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

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
    stage: str, model: Path, files: dict[str, Path | None], *, device: str, dtype: str, **settings
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


def _model(folder: Path) -> dict:
    """Hashes where the download noted them, else names, sizes and times: hashing a large model takes minutes."""
    if (folder / "source.json").exists() and (noted := read_json(folder / "source.json").get("sha256")):
        return noted
    weights = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.glob("*.safetensors"))}
    return {"config": sha256_of(folder / "config.json"), **weights}
