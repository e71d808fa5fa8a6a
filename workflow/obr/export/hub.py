"""Publishing a packed checkpoint on the hub, with a model card that says what it is, how good it is and how it was
made."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from obr.checkpoints import referred
from obr.checkpoints.files import (
    CARD,
    MANIFEST,
    SKETCHES,
    check_contents,
    check_replaceable,
    read_manifest,
    sketches_of,
    weight_bytes,
)
from obr.checkpoints.format import CheckpointBlocks, save_block
from obr.errors import ObrError
from obr.export.model_card import model_card
from obr.runtime import hub
from obr.runtime.files import atomic_folder, replace_folder, sha256_of, write_json, write_text
from obr.runtime.resume import block_file


def push(
    checkpoint: Path,
    repo: str,
    folder: Path | None = None,
    licence: str | None = None,
    private: bool = False,
) -> str:
    """Assemble a checkpoint with its card and upload it; returns its address, with the commit.

    checkpoint: `results/compressed/{model}/{recipe}`; evaluations beside it in the results folder go into the card.
    folder: write exactly what would be uploaded there, and upload nothing; the address is then that folder.
    licence: instead of the one recorded when the base model was fetched. HF_ENDPOINT names another hub.

    Raises:
        ObrError: no whole checkpoint, no licence known, a name that is none, a folder with other files, or a hub that
            refuses.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ObrError(f"{repo!r} is not the name of a hub repository; write it as owner/name.")
    manifest = read_manifest(Path(checkpoint))
    check_contents(Path(checkpoint), manifest)
    if folder is not None:
        check_replaceable(folder, card=True)
    card = model_card(Path(checkpoint), manifest, repo, licence)
    if folder is not None:
        assemble(Path(checkpoint), manifest, card, folder)
        return str(folder)
    with atomic_folder(Path(checkpoint).with_name(Path(checkpoint).name + ".push")) as temporary:
        _fill(Path(checkpoint), manifest, card, temporary, _link)
        return _upload(temporary, repo, private)


def assemble(checkpoint: Path, manifest: dict, card: str, folder: Path) -> None:
    """Copy the checkpoint's files and write its card, into a folder that the user may then edit."""
    with atomic_folder(Path(folder)) as temporary:
        _fill(checkpoint, manifest, card, temporary, shutil.copy2)
        replace_folder(temporary, Path(folder))


def _link(origin: Path, target: Path) -> None:
    """Link a file where the file system can, else copy it."""
    try:
        os.link(origin, target)
    except OSError:
        shutil.copy2(origin, target)


def _fill(checkpoint: Path, manifest: dict, card: str, folder: Path, place: Callable[[Path, Path], None]) -> None:
    """Place the manifest, the files that it lists and the card; nothing else that lies in the checkpoint's folder.

    Blocks to which the checkpoint refers are written out, and the manifest lists them.
    """
    for name in sorted({*manifest["files"], MANIFEST} - {CARD}):
        (folder / name).parent.mkdir(exist_ok=True)
        place(checkpoint / name, folder / name)
    if referred.ENTRY in manifest:
        (folder / MANIFEST).unlink()  # perhaps a link to the checkpoint's own
        write_json(_embodied(checkpoint, manifest, folder), folder / MANIFEST)
    write_text(card, folder / CARD)


def _embodied(checkpoint: Path, manifest: dict, folder: Path) -> dict:
    """Write the blocks of a checkpoint that refers to a model; returns the manifest of one that has them."""
    blocks = CheckpointBlocks(checkpoint, None, getattr(torch, manifest["dtype"]), "cpu")
    files = dict(manifest["files"])
    for index in range(len(blocks)):
        save_block(blocks.load(index), blocks.layout, folder / block_file(index), blocks.dtype)
        files[block_file(index)] = sha256_of(folder / block_file(index))
    alone = {key: value for key, value in manifest.items() if key != referred.ENTRY}
    about = {"file_bytes": weight_bytes(folder, alone), SKETCHES: sketches_of(folder, files)}
    return alone | {"files": dict(sorted(files.items()))} | about


def _upload(folder: Path, repo: str, private: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Checkpoint and card, by obr push")
    except hub.hub_exceptions() as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise ObrError(
                f"The hub does not let you write to {repo}; log in with `hf auth login` and a token that may write."
            ) from error
        raise hub.hub_error(error, repo, None) from error
    return f"{api.endpoint}/{repo} ({done.oid[:12]})"
