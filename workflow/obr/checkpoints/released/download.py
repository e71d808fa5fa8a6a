"""Where a released checkpoint comes from: the hub, or a folder that is already here."""

import fnmatch
import shutil
from pathlib import Path

from obr.errors import ObrError
from obr.runtime import hub
from obr.runtime.files import (
    atomic_folder,
    check_folder_replaceable,
    removed_after,
    replace_folder,
    sha256_of,
    write_json,
)

# What holds the weights: safetensors if a repository has them, else pickles, which are opened as data alone.
FORMS = (
    ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
)
BESIDE = "config.json"  # names the format of quantised weights


def download_released(source: dict, out: Path, rerun: bool = False) -> None:
    """The stage: fetch a released checkpoint into the folder `out`, with a source.json.

    source: {"source": "hub", "repo", "revision"} or {"source": "path", "path"}, which is not copied. A broken
    download goes on where it was. {"source": "hub", ..., "file"} names one GGUF file of a repository.
    source.json: {source, folder, revision, licence, sha256: {file: hash}}; the last three of the hub alone.
    rerun: an earlier result in `out` may lack source.json, see `runtime.files.check_folder_replaceable`.

    Raises:
        ObrError: it cannot be had, or has no state dict; `out` holds anything but an earlier result.
    """
    out = Path(out)
    check_folder_replaceable(out, "a downloaded released checkpoint", "source.json", _is_own, rerun)
    out.parent.mkdir(parents=True, exist_ok=True)
    hub.choose({"hub": _from_hub, "path": _from_path}, source)(source, out)


def _is_own(name: str) -> bool:
    """Whether `download_released` writes files of this name."""
    if name == BESIDE or name.endswith(".gguf"):
        return True
    return name == "source.json" or any(fnmatch.fnmatchcase(name, pattern) for form in FORMS for pattern in form)


def _from_path(source: dict, out: Path) -> None:
    (name,) = hub.need(source, "path")
    folder = hub.local_path(name).resolve()
    if not folder.is_dir() and folder.suffix != ".gguf":
        raise ObrError(f"{folder} is not a folder; give the folder that holds the released checkpoint.")
    with atomic_folder(out) as temporary:
        write_json({"source": source, "folder": str(folder)}, temporary / "source.json")
        replace_folder(temporary, out)


def _from_hub(source: dict, out: Path) -> None:
    from huggingface_hub import snapshot_download

    repo, revision = hub.need(source, "repo", "revision")
    info = hub.hub_info(repo, revision)
    names = [file.rfilename for file in info.siblings]
    given = source.get("file")
    forms = FORMS if given is None else ((given, given),)
    form = next((form for form in forms if any(fnmatch.filter(names, pattern) for pattern in form[:2])), None)
    if form is None:
        lacks = f"no {given}" if given else "neither model.safetensors nor pytorch_model.bin, nor shards of one"
        raise ObrError(f"{repo} at revision {revision} has {lacks}: choose a revision or repository that has.")
    # Named after the commit and left behind by a broken download: the next attempt goes on from there.
    folder = out.with_name(f"{out.name}.{info.sha[:12]}.tmp")
    try:
        snapshot_download(
            repo, revision=info.sha, local_dir=folder, allow_patterns=[*form, BESIDE], ignore_patterns=["*/*"]
        )
    except hub.hub_exceptions() as error:
        raise hub.hub_error(error, repo, revision) from error
    with removed_after(folder):
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's notes on the download
        hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
        for file in info.siblings:
            if file.lfs and hashes.get(file.rfilename, file.lfs.sha256) != file.lfs.sha256:
                raise ObrError(
                    f"{file.rfilename} of {repo} arrived damaged (its sha256 is not the hub's): download it again."
                )
        licence = info.card_data.get("license") if info.card_data else None
        about = {"source": source, "folder": given or ".", "revision": info.sha, "licence": licence, "sha256": hashes}
        write_json(about, folder / "source.json")
        replace_folder(folder, out)
