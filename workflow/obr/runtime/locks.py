"""Locks, so that two processes do not write the same thing."""

import atexit
import contextlib
import fcntl
import os
import socket
import sys
from pathlib import Path
from typing import IO

from obr.errors import ObrError

_held: dict[Path, IO] = {}  # lock files that this process has locked


def acquire(path: Path | str) -> None:
    """Keep other processes from writing `path` until `release`, or until this process ends, however it ends.

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
            notice = (
                f"obr: the file system of {path} keeps no locks ({error.strerror}): do not run anything twice there."
            )
            print(notice, file=sys.stderr)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                break
        file.close()  # its holder removed it in between
    _held[lock] = file
    with contextlib.suppress(OSError):  # a full disk: the lock counts, not what stands in it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def release(path: Path | str) -> None:
    """End what `acquire` began; nothing if it did not."""
    lock = _lock_of(path)
    file = _held.pop(lock, None)
    if file is not None:
        lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what a full disk did not take
            file.close()


@atexit.register
def _let_all_go() -> None:
    for lock in list(_held):
        release(lock.with_name(lock.name.removesuffix(".lock")))


def _lock_of(path: Path | str) -> Path:
    path = Path(path).absolute()
    return path.with_name(path.name + ".lock")
