"""Files that are whole or not there: written under another name in the same folder, then renamed."""

import atexit
import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from obr.errors import ObrError, first_line

_held: dict[Path, IO] = {}  # lock files that this process has locked


@contextlib.contextmanager
def whole(path: Path | str) -> Iterator[Path]:
    """A name to write to; what is there in the end is flushed to the disk and becomes `path`.

    The folder is made if need be. Should the writing fail, nothing is left and an older `path` stays; if it is
    killed, a folder `<path>.tmp` is left, which the next writing of `path` removes.

    Raises:
        ObrError: another process is writing `path`.
        OSError: the disk is full, or the like.
    """
    path = Path(path)
    hold(path)
    folder = path.with_name(path.name + ".tmp")
    try:
        _remove(folder)
        folder.mkdir()
        partial = folder / path.name
        partial.touch()
        access = partial.stat().st_mode  # as the umask says; safetensors writes files for their owner alone
        yield partial
        partial.chmod(access)
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    except SafetensorError as error:
        if not (code := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    except OSError as error:
        error.filename = error.filename or str(path)  # a write into an open file does not say which
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        let_go(path)


def flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk and not only in memory: power may fail."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(text: str, path: Path | str) -> None:
    """Write text as UTF-8, line ends untouched."""
    with whole(path) as partial:
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

    status: the key of the status, which is "finite", "inf", "-inf" or "nan". `artefacts.value_of` reads both.
    """
    return {key: value, status: "finite"} if math.isfinite(value) else {key: None, status: str(float(value))}


def _not_finite(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """(place, number) of every number that is not finite, places written as layers.3.loss."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place or "the value", value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_finite(item, f"{place}.{key}".lstrip("."))


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
def whole_folder(out: Path) -> Iterator[Path]:
    """A new empty folder beside `out` to fill, gone afterwards unless `become` renamed it.

    Raises:
        ObrError: another process is filling it.
    """
    hold(out)
    folder = out.with_name(out.name + ".tmp")
    try:
        _remove(folder)
        folder.mkdir(parents=True)
        with removed_after(folder):
            yield folder
    finally:
        let_go(out)


@contextlib.contextmanager
def removed_after(folder: Path) -> Iterator[None]:
    """Remove a folder in the end, whatever happens; none is fine."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def become(folder: Path, out: Path) -> None:
    """Rename a finished folder to `out`, over an older one, which is never there in part."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)
    aside = out.with_name(out.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        os.replace(out, aside)
    os.replace(folder, out)
    flush(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def hold(path: Path | str) -> None:
    """Keep other processes from writing `path` until `let_go`, or until this process ends, however it ends.

    The lock is one of a file `<path>.lock`, which other machines see too where they share the file system. For
    this process it is no obstacle: a run that failed in it may be taken up again.

    Raises:
        ObrError: another process holds it.
    """
    lock = _lock_of(path)
    if lock in _held:
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115  stays open as long as it is held
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            with file:
                file.seek(0)
                who = file.readline().strip() or "another process"
            raise ObrError(f"{path} is being written by {who}; wait for it or end it, then rerun.") from error
        except OSError as error:
            told = (
                f"obr: the file system of {path} keeps no locks ({error.strerror}): do not run anything twice there."
            )
            print(told, file=sys.stderr)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                break
        file.close()  # its holder removed it in between
    _held[lock] = file
    with contextlib.suppress(OSError):  # a full disk: the lock counts, not what stands in it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def let_go(path: Path | str) -> None:
    """End what `hold` began; nothing if it did not."""
    lock = _lock_of(path)
    file = _held.pop(lock, None)
    if file is not None:
        lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what a full disk did not take
            file.close()


@atexit.register
def _let_all_go() -> None:
    for lock in list(_held):
        let_go(lock.with_name(lock.name.removesuffix(".lock")))


def _lock_of(path: Path | str) -> Path:
    path = Path(path).absolute()
    return path.with_name(path.name + ".lock")


def _remove(path: Path) -> None:
    """Remove a folder or file; none is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
