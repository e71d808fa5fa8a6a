"""The files of a packed checkpoint: which belong to it, and the one check that each reader of a checkpoint makes."""

import re
from collections.abc import Iterable
from pathlib import Path

from obr.checkpoints import referred
from obr.errors import ObrError
from obr.models.side_files import is_side_file
from obr.models.tensor_files import check_names
from obr.runtime.files import check_folder_replaceable, entries, read_json, sha256_of
from obr.runtime.resume import block_file

FORMAT = 1
ENDS = "ends.safetensors"
MANIFEST, LAYERS, CONFIG = "manifest.json", "layers.csv", "config.json"
CARD = "README.md"  # a model card comes later, by obr push
BLOCK = re.compile(r"block_\d{3,}\.safetensors")
SKETCHES = "sketches"  # of the manifest: of each file of weights, what `referred.sketch_of` gives
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")  # suffixes of files that readers take for weights


def read_manifest(directory: Path) -> dict:
    """The manifest of a checkpoint. Raises ObrError if there is none, or of another format."""
    path = Path(directory) / MANIFEST
    if not path.exists():
        raise ObrError(
            f"{directory} is no packed checkpoint: it has no {MANIFEST}; give a folder of obr compress, or read a "
            "plain model with obr.load_model."
        )
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ObrError(
            f"{directory} has format {manifest.get('format')!r}, this version reads {FORMAT}; compress it again."
        )
    return manifest


def check_files(directory: Path, manifest: dict) -> None:
    """Check that a folder holds the checkpoint of its manifest, and no other weights.

    Small files (configuration, tokenizer, code) are compared by their sha256, weights by their sketch, or where an
    older version has noted none by their sha256 too; `check_contents` compares the sha256 of all.

    Called by all that read a checkpoint: load, from_pretrained, the evaluations, verify, export and push.

    Raises:
        ObrError: a file is missing, is not the checkpoint's, or is not the one that was written.
    """
    directory = Path(directory)
    files, blocks = manifest.get("files"), manifest.get("blocks")
    if not isinstance(files, dict) or not isinstance(blocks, int) or isinstance(blocks, bool):
        raise ObrError(f"{directory}/{MANIFEST} lists no files or no number of blocks; compress the model again.")
    wanted = set() if referred.ENTRY in manifest else {block_file(index) for index in range(blocks)}
    listed = {name for name in files if BLOCK.fullmatch(name)}
    if listed != wanted:
        odd = min(listed ^ wanted)
        kind = "lists" if odd in listed else "lacks"
        raise ObrError(f"{directory}/{MANIFEST} {kind} {odd}, but has {blocks} blocks; compress the model again.")
    for name in sorted({*files, ENDS, CONFIG}):
        if not (directory / name).is_file():
            raise ObrError(
                f"{directory} lacks {name}, which its manifest lists; compress it again, or fetch the file."
            )
    present = {path.name for path in directory.iterdir() if path.is_file()}
    check_names(present, str(directory))
    for name in sorted(present - set(files)):
        if name.endswith((*WEIGHTS, ".safetensors.index.json")):
            raise ObrError(f"{directory}/{name} is not in the manifest of the checkpoint; delete it or move it.")
    sketches = manifest.get(SKETCHES) or {}
    for name in sorted({CONFIG, *files} - {LAYERS}):
        kind, wanted, digest = "sha256", files, sha256_of
        if name in sketches:
            kind, wanted, digest = "sketch", sketches, referred.sketch_of
        if digest(directory / name) != wanted.get(name):
            raise ObrError(
                f"{directory}/{name} is not the file that was written (its {kind} differs), so the checkpoint would "
                "mean something else; restore it, or compress the model again."
            )
    referred.check_referred(directory, manifest)


def check_contents(directory: Path, manifest: dict) -> None:
    """Raise ObrError unless a checkpoint has the files of its manifest, each with the sha256 that this lists."""
    check_files(directory, manifest)
    referred.check_referred(directory, manifest, whole=True)
    for name, sha256 in manifest["files"].items():
        if sha256_of(Path(directory) / name) != sha256:
            raise ObrError(
                f"{directory}/{name} is not the file that was written (its sha256 differs); compress it again."
            )


def sketches_of(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """{name: sketch} of those files that hold weights; the entry SKETCHES of a manifest."""
    return {name: referred.sketch_of(Path(directory) / name) for name in names if name.endswith(".safetensors")}


def weight_bytes(directory: Path, manifest: dict) -> int:
    """Of a checkpoint's files of weights, or of those that it refers to, which hold its ends, too."""
    own = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
    return referred.bytes_of(manifest) or own


def _is_own(directory: Path, name: str) -> bool:
    """Whether a file, named from the checkpoint's folder on, is one that a checkpoint has.

    Code belongs to a checkpoint whose config.json refers to it: that of a model which needs its own.
    """
    if name.endswith(".py") and "/" not in name:
        return (directory / CONFIG).is_file() and bool(read_json(directory / CONFIG).get("auto_map"))
    return name in (MANIFEST, LAYERS, CONFIG, ENDS) or bool(BLOCK.fullmatch(name)) or is_side_file(name)


def _is_in_progress(directory: Path, name: str) -> bool:
    """Whether a file is the lock, or lies in the temporary folder, of a file of a checkpoint."""
    first, suffix = Path(name.split("/")[0]).stem, Path(name.split("/")[0]).suffix
    return suffix in (".lock", ".tmp") and _is_own(directory, first)


def remove_outdated(directory: Path, blocks: int) -> None:
    """Remove the files of an older checkpoint from a folder that holds this many blocks of the new one."""
    kept, directory = {block_file(index) for index in range(blocks)}, Path(directory)
    for name in [name for name in entries(directory) if name not in kept and _is_own(directory, name)]:
        (directory / name).unlink()


def check_no_strays(directory: Path) -> None:
    """Raise ObrError if a folder that a checkpoint is to be written into, beside what is there, holds other files.

    Of an older checkpoint the manifest may be missing: Snakemake removes it before the job runs again. Hidden files
    stay where they are, as do those of a job in progress.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return
    present = [name for name in entries(directory) if name[0] != "." and not _is_in_progress(directory, name)]
    weights = [name for name in present if name in (MANIFEST, ENDS) or BLOCK.fullmatch(name)]
    for name in present:
        if not weights or not _is_own(directory, name):
            raise ObrError(
                f"{directory} holds {name}, which is no part of a checkpoint; move it, or choose another folder."
            )


def check_replaceable(directory: Path, card: bool = False) -> None:
    """Raise ObrError unless a folder is absent, empty, or an older checkpoint and nothing but that.

    card: a model card belongs to it too.
    """
    directory = Path(directory)
    check_folder_replaceable(
        directory, "a checkpoint", MANIFEST, lambda name: (card and name == CARD) or _is_own(directory, name)
    )
