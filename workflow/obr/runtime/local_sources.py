"""Local sources of the workflow: what decides whether a file that a user names by its path has changed.

Snakemake compares the parameters of a job with those of its last run. The state of a local source is such a
parameter. A changed file therefore reruns the job that reads it, whatever its modification time.
"""

import os
from functools import cache
from pathlib import Path

from obr.runtime.files import sha256_of

HASHED = 64 << 20  # bytes up to which a file is compared by its sha256; a larger one by its modification time
# Files of a local model or checkpoint folder that a stage may read.
SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".py", ".bin", ".pth", ".pt", ".gguf")


def state(source: dict, model: str = "") -> dict[str, list] | None:
    """{file: [bytes, sha256 or modification time in ns]} of a config's local source; None for other sources.

    source: a config's mapping of the kind {"source": "path", "path" or "file", "examples"}.
    model: replaces `{model}` in the path.
    A folder counts with the files of SUFFIXES that lie in it. A source that is not there has the state {}.

        >>> state({"source": "hub", "repo": "some/model", "revision": "main"}) is None
        True
    """
    if source.get("source") != "path":
        return None
    found = _at(source.get("path") or source.get("file") or "", model)
    examples = _at(source["examples"], model) if source.get("examples") else {}
    return found | {f"examples {name}": about for name, about in examples.items()}


def _at(name: str, model: str) -> dict[str, list]:
    path = Path(os.path.expanduser(os.path.expandvars(name.replace("{model}", model))))
    if path.is_dir():
        return {file.name: _file(file) for file in sorted(path.iterdir()) if _read(file)}
    return {path.name: _file(path)} if path.is_file() else {}


def _read(file: Path) -> bool:
    return file.suffix in SUFFIXES and not file.name.startswith(".") and file.is_file()


def _file(path: Path) -> list:
    status = path.stat()
    if status.st_size > HASHED:
        return [status.st_size, status.st_mtime_ns]
    return [status.st_size, _hash(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)]


@cache
def _hash(path: Path, size: int, modified: int, changed: int) -> str:
    """The sha256 of a file, computed once per process and state of the file: Snakemake asks for it more than once."""
    return sha256_of(path)
