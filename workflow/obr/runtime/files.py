"""Files that are whole or not there: written under another name in the same folder, then renamed."""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from obr.errors import ObrError, first_line
from obr.runtime.locks import acquire, release


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """A name to write to; what is there in the end is flushed to the disk and becomes `path`.

    The folder is made if need be. Should the writing fail, nothing is left and an older `path` stays; if it is
    killed, a folder `<path>.tmp` is left, which the next writing of `path` removes.

    Raises:
        ObrError: another process is writing `path`.
        OSError: the disk is full, or the like.
    """
    path = Path(path)
    acquire(path)
    folder = path.with_name(path.name + ".tmp")
    try:
        _remove(folder)
        folder.mkdir()
        partial = folder / path.name
        partial.touch()
        access = partial.stat().st_mode  # as the umask says; safetensors writes files for their owner alone
        yield partial
        partial.chmod(access)
        fsync(partial)
        os.replace(partial, path)
        fsync(path.parent)
    except SafetensorError as error:
        if not (code := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    except OSError as error:
        error.filename = error.filename or str(path)  # a write into an open file does not say which
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        release(path)


def fsync(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk and not only in memory: power may fail."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(text: str, path: Path | str) -> None:
    """Write text as UTF-8, line ends untouched."""
    with atomic_write(path) as partial:
        partial.write_bytes(text.encode("utf-8"))


def json_text(value: Any, name: Path | str) -> str:
    """A value as indented JSON with a final newline. name: what it becomes, for messages.

    Raises:
        ObrError: a number in it is infinite or NaN, which JSON cannot represent; see `finite`.
    """
    try:
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        place, number = next(_not_finite(value))
        raise ObrError(f"{name} cannot be written: {place} is {number}, which JSON cannot hold.") from None


def write_json(value: Any, path: Path | str) -> None:
    """Write a value that JSON can hold, indented. Raises as `json_text` does."""
    write_text(json_text(value, path), path)


def finite(key: str, value: float, status: str = "status") -> dict:
    """A number as JSON holds it: {"value": 8.1, "status": "finite"}, or {"value": None, "status": "inf"}.

    status: the key of the status, which is "finite", "inf", "-inf" or "nan". `table_rows.value_of` reads both.
    """
    return {key: value, status: "finite"} if math.isfinite(value) else {key: None, status: str(float(value))}


def _not_finite(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """(place, number) of every number that is not finite, places written as layers.3.loss."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place or "the value", value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_finite(item, f"{place}.{key}".lstrip("."))


def parse_object(text: str) -> Any:
    """A value of JSON. Raises ValueError if the text is none, or names a key of an object twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
        return found

    return json.loads(text, object_pairs_hook=unique)


def read_json(path: Path | str) -> dict:
    """A JSON file that holds a dictionary. Raises ObrError if it is missing or broken."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ObrError(f"{path} cannot be read as JSON ({first_line(error)}); rebuild it.") from error
    if not isinstance(value, dict):
        raise ObrError(f"{path} holds a JSON {type(value).__name__}, not an object; rebuild it.")
    return value


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A new empty folder beside `out` to fill, gone afterwards unless `replace_folder` renamed it.

    Raises:
        ObrError: another process is filling it.
    """
    acquire(out)
    folder = out.with_name(out.name + ".tmp")
    try:
        _remove(folder)
        folder.mkdir(parents=True)
        with removed_after(folder):
            yield folder
    finally:
        release(out)


@contextlib.contextmanager
def removed_after(folder: Path) -> Iterator[None]:
    """Remove a folder in the end, whatever happens; none is fine."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(folder: Path, out: Path) -> None:
    """Rename a finished folder to `out`, over an older one, which is never there in part."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)
    aside = out.with_name(out.name + ".old.tmp")  # "<out>.old" may be a backup that a user has made
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        os.replace(out, aside)
    os.replace(folder, out)
    fsync(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


SYSTEM_FILES = (".snakemake_timestamp", ".DS_Store")  # which nobody misses


def entries(folder: Path | str) -> list[str]:
    """Names of all files, links and empty folders below a folder, sorted, with `/` between folders.

    Hidden ones count too. Files that Snakemake and file managers leave are left out.
    """
    found = (
        path for path in Path(folder).rglob("*") if not path.is_dir() or path.is_symlink() or not any(path.iterdir())
    )
    return sorted(path.relative_to(folder).as_posix() for path in found if path.name not in SYSTEM_FILES)


def check_folder_replaceable(
    out: Path | str, what: str, sign: str, ours: Callable[[str], bool], rerun: bool = False
) -> None:
    """Raise ObrError unless a folder is absent, empty, or an earlier result of a command and nothing but that.

    what: such a result, for messages. sign: the file that each result has. ours: whether a file of this name belongs
    to it; if `sign` is JSON with a mapping "sha256", its keys are the names instead. rerun: `sign` may be missing,
    since Snakemake removes the outputs of a job before the job runs again.
    """
    out = Path(out)
    if out.is_symlink():
        raise ObrError(f"{out} is a symbolic link, which would be lost; give the folder that the link names.")
    if out.exists() and not out.is_dir():
        raise ObrError(f"{out} is a file; choose a folder for {what}.")
    names = entries(out) if out.is_dir() else []
    if names and sign not in names and not rerun:
        raise ObrError(
            f"{out} holds {names[0]} and is not {what}, since it has no {sign}; choose a new folder, or move what is "
            "in it."
        )
    listed = read_json(out / sign).get("sha256") if sign in names and sign.endswith(".json") else None
    known = {*listed, sign} if isinstance(listed, dict) else None
    for name in names:
        if name not in known if known is not None else not ours(name):
            raise ObrError(f"{out} holds {name}, which is no part of {what}; move it, or choose another folder.")


def _remove(path: Path) -> None:
    """Remove a folder or file; none is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: Path | str) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
