"""Files that are whole or not there: written under another name in the same folder, then renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from obr.errors import ObrError, first_line


@contextmanager
def whole(path: Path | str) -> Iterator[Path]:
    """A name beside `path` to write to; what is there in the end is flushed to the disk and becomes `path`.

    The folder is made if need be. Should the writing fail, nothing is left and an older `path` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.unlink(missing_ok=True)
    partial.touch()
    access = partial.stat().st_mode  # as the umask says; safetensors writes files for their owner alone
    try:
        yield partial
        partial.chmod(access)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(text: str, path: Path | str) -> None:
    """Write text as UTF-8, line ends untouched."""
    with whole(path) as partial:
        partial.write_bytes(text.encode("utf-8"))


def write_json(value: Any, path: Path | str) -> None:
    """Write a value that JSON can hold, indented."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def read_json(path: Path | str) -> dict:
    """A JSON file as a dictionary. Raises ObrError if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ObrError(f"{path} cannot be read as JSON ({first_line(error)}); rebuild it.") from error


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new empty folder beside `out` to fill, gone afterwards unless `become` renamed it."""
    folder = out.with_name(out.name + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with removed_after(folder):
        yield folder


@contextmanager
def removed_after(folder: Path) -> Iterator[None]:
    """Remove a folder in the end, whatever happens; none is fine."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def become(folder: Path, out: Path) -> None:
    """Rename a finished folder to `out`, over an older one."""
    if out.exists():
        shutil.rmtree(out)
    os.replace(folder, out)
