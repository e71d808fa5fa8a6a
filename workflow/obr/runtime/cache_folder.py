"""Where what is fetched or compiled once is kept: below $OBR_CACHE, or below ~/.cache/obr.

Containers often run under a number without a home folder, or with one that cannot be written. Then a temporary folder
takes its place, with a warning that names OBR_CACHE.
"""

import contextlib
import errno
import os
import stat
import tempfile
import warnings
from functools import cache
from pathlib import Path

from obr.errors import ObrError

VARIABLE = "OBR_CACHE"
FULL = (errno.ENOSPC, errno.EDQUOT)


def folder(name: str) -> Path:
    """The folder `name` of the cache; it need not be there, and it may be one that cannot be written.

    Raises:
        ObrError: OBR_CACHE begins with a ~ that stands for no folder.
    """
    given = os.environ.get(VARIABLE)
    if given:
        path = Path(os.path.expanduser(given))
        if given.startswith("~") and not path.is_absolute():
            raise ObrError(f"{VARIABLE} is {given}, but there is no home folder; set it to a whole path.")
        return path / name
    home = _home()
    return _instead(name, "there is no home folder") if home is None else home / ".cache/obr" / name


def writable(name: str) -> Path:
    """The folder `name` of the cache, made if need be; a temporary one, with a warning, if it cannot be written.

    Raises:
        OSError: the disk is full.
    """
    path = folder(name)
    try:
        return _tried(path)
    except OSError as error:
        if error.errno in FULL:
            raise
        return _tried(_instead(name, f"{path} cannot be written ({error.strerror})"))


def redirect() -> str | None:
    """Let other libraries keep their caches in a temporary folder where there is no home folder that can be written.

    Returns a sentence that says so, or None where nothing had to be done. Environment variables that are set stay as
    they are. Call it before these libraries are imported.

    Raises:
        ObrError: there is no folder for temporary files either.
    """
    home = _home()
    if home is not None and os.access(next(p for p in (home / ".cache", home) if p.exists()), os.W_OK | os.X_OK):
        return None
    wanted = {"XDG_CACHE_HOME": "xdg", "MPLCONFIGDIR": "matplotlib"}  # huggingface_hub and datasets follow the first
    wanted = {name: below for name, below in wanted.items() if not os.environ.get(name)}
    if not wanted:
        return None
    if home is not None and (home / ".cache/huggingface").is_dir():  # it may hold a token, and models to be read
        os.environ.setdefault("HF_HOME", str(home / ".cache/huggingface"))
    place = _temporary()
    for name, below in wanted.items():
        os.environ[name] = str(_tried(place / below))
    names = " and ".join(wanted)
    return (
        f"there is no home folder that can be written, so caches are in {place}; set {names} to keep them elsewhere."
    )


def _home() -> Path | None:
    home = Path(os.path.expanduser("~"))
    return home if home.is_absolute() and home.is_dir() else None


def _tried(path: Path) -> Path:
    """A folder, made if need be. Raises OSError if it cannot be written."""
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()
    return path


def _instead(name: str, why: str) -> Path:
    path = _temporary() / name
    warnings.warn(f"The cache is in {path}, since {why}; set {VARIABLE} to a writable folder.", stacklevel=1)
    return path


def _temporary() -> Path:
    """A folder of this user alone, the same for all of the user's processes where that is safe.

    Raises:
        ObrError: there is no folder for temporary files.
    """
    try:
        return _own(tempfile.gettempdir())
    except OSError as error:
        raise ObrError(
            f"There is no folder for temporary files ({error.strerror or error}); set TMPDIR to a writable one."
        ) from error


@cache
def _own(folder: str) -> Path:
    path = Path(folder) / f"obr-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    # What another user can write must not be loaded as a library.
    safe = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return path if safe else Path(tempfile.mkdtemp(prefix="obr-", dir=folder))
