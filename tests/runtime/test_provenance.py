"""What a result says it was made from is what it was made from."""

import os

import pytest

from obr.errors import ObrError
from obr.runtime import provenance
from obr.runtime.files import sha256_of, write_json


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    hashes = {name: sha256_of(tmp_path / name) for name in ("config.json", "model.safetensors")}
    write_json({"sha256": hashes}, tmp_path / "source.json")
    return tmp_path


def test_hashes_of_files_as_downloaded_are_taken_as_noted(folder, monkeypatch):
    monkeypatch.setattr(provenance, "sha256_of", pytest.fail)
    assert set(provenance.model_hashes(folder)) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("old", [False, True])
def test_a_file_that_changes_after_its_download_is_refused(folder, old):
    """Whatever its modification time says, as after `cp -p`."""
    file = folder / "model.safetensors"
    file.write_text("other weights", encoding="utf-8")
    if old:
        os.utime(file, (0, 0))
    with pytest.raises(ObrError, match=r"model\.safetensors is not the file that was downloaded"):
        provenance.model_hashes(folder)


def test_a_file_that_is_put_back_is_accepted(folder):
    file = folder / "config.json"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    assert provenance.model_hashes(folder)["config.json"] == sha256_of(file)
    assert provenance.model_hashes(folder / "none") is None
