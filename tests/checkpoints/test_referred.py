"""A dense checkpoint refers to the weights of its model, and is read, exported and pushed as if it had them."""

import json
import shutil

import pytest
import torch
from gguf import GGUFReader

import obr
from helpers.single_scores import text_score
from obr.checkpoints import referred
from obr.checkpoints.files import read_manifest
from obr.checkpoints.verify import verify_checkpoint
from obr.cli import main
from obr.compression import stage
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.export.dispatch import export
from obr.export.hub import push

pytestmark = pytest.mark.slow

DENSE = {"method": "dense"}


def made(tiny_folder, place, monkeypatch=None, **recipe):
    """A model and a dense checkpoint of it, in folders as the workflow has them."""
    model, out = place / "models/tiny", place / "compressed/tiny/dense"
    if not model.exists():
        shutil.copytree(tiny_folder / "model", model)
    if monkeypatch is not None:
        monkeypatch.setattr(stage, "is_referred", lambda recipe: False)
        out = place / "whole/tiny/dense"
    compress_stage(model, Recipe.parse({**DENSE, **recipe}), out, device="cpu")
    return model, out


@pytest.fixture
def pair(tiny_folder, tmp_path, monkeypatch):
    """(model, checkpoint that refers to it, checkpoint with blocks of its own)."""
    model, referring = made(tiny_folder, tmp_path)
    return model, referring, made(tiny_folder, tmp_path, monkeypatch)[1]


def logits(folder):
    with torch.no_grad():
        return obr.load(folder, device="cpu")(torch.arange(24)[None]).logits


def test_a_dense_checkpoint_holds_no_blocks_and_computes_the_same(pair):
    model, referring, whole = pair
    assert not list(referring.glob("block_*")) and list(whole.glob("block_*"))
    entry = read_manifest(referring)[referred.ENTRY]
    assert entry["folder"] == "../../../models/tiny" and "model.safetensors" in entry["files"]
    assert torch.equal(logits(referring), logits(whole)) and torch.equal(logits(referring), logits(model_of(model)))
    mine, theirs = (read_manifest(folder) for folder in (referring, whole))
    for key in ("linear_bytes", "bits_per_weight", "sparsity", "recipe"):
        assert mine[key] == theirs[key]
    assert (referring / "layers.csv").read_text().count("\n") == (whole / "layers.csv").read_text().count("\n")
    assert verify_checkpoint(referring) == [] and verify_checkpoint(whole) == []


def model_of(folder):
    """The same model as a checkpoint saved from memory."""
    out = folder.with_name("saved")
    obr.save(obr.compress(obr.load_model(folder, device="cpu"), None, DENSE, progress=False), out)
    assert referred.ENTRY not in read_manifest(out)
    return out


def test_readers_of_a_checkpoint_follow_its_reference(pair, tiny_folder, tmp_path):
    model, referring, whole = pair
    assert main.main(["verify", str(referring), "--recompute", "3", "--model", str(model)]) == 0
    for number, folder in enumerate((referring, whole)):
        export(folder, "gguf", tmp_path / f"{number}.gguf")
        push(folder, "owner/name", tmp_path / f"pushed{number}", licence="mit")
    mine, theirs = (GGUFReader(tmp_path / f"{number}.gguf").tensors for number in (0, 1))
    assert len(mine) == len(theirs) > 10
    assert all(one.name == other.name and (one.data == other.data).all() for one, other in zip(mine, theirs))
    pushed = tmp_path / "pushed0"
    for name in ("block_000.safetensors", "ends.safetensors"):
        assert (pushed / name).read_bytes() == (whole / name).read_bytes()
    assert referred.ENTRY not in read_manifest(pushed) and verify_checkpoint(pushed) == []
    assert referred.ENTRY in read_manifest(referring) and not list(referring.glob("block_*"))


def test_the_results_may_move_with_their_model(pair, tmp_path):
    expected = logits(pair[1])
    (tmp_path / "compressed").rename(tmp_path / "moved.part")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "moved.part", tmp_path / "elsewhere/compressed")
    shutil.move(tmp_path / "models", tmp_path / "elsewhere/models")
    assert torch.equal(logits(tmp_path / "elsewhere/compressed/tiny/dense"), expected)


def test_a_model_that_is_gone_or_another_is_refused_in_a_sentence(pair, tmp_path):
    model, referring, _ = pair
    path = model / "model.safetensors"
    kept = path.read_bytes()
    path.write_bytes(kept[:-4096] + bytes(4096))
    with pytest.raises(ObrError, match=r"has its weights in .*model\.safetensors, which is not the file that it was"):
        obr.load(referring, device="cpu")
    assert "put that model back, or compress again" in verify_checkpoint(referring)[0]
    path.unlink()
    with pytest.raises(ObrError, match=r"has its weights in .*models/tiny, which has no model\.safetensors; put it"):
        obr.load(referring, device="cpu")
    path.write_bytes(kept)
    assert verify_checkpoint(referring) == []


def test_a_single_altered_number_is_found_by_those_who_read_all(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(referred, "PIECES", 2)  # of a large file pieces are a small part
    model, referring = made(tiny_folder, tmp_path)
    path = model / "model.safetensors"
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)
    obr.load(referring, device="cpu")
    assert "is not the file that it was made from" in verify_checkpoint(referring)[0]
    for read in (
        lambda: export(referring, "gguf", tmp_path / "x.gguf"),
        lambda: push(referring, "a/b", tmp_path / "p"),
    ):
        with pytest.raises(ObrError, match="is not the file that it was made from"):
            read()


def test_an_index_that_comes_later_is_refused(tiny_folder, tmp_path):
    """By which other files would be read than those of which the checkpoint was made."""
    model, referring = made(tiny_folder, tmp_path)
    index = {"weight_map": {"model.norm.weight": "other.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ObrError, match=r"which now has model\.safetensors\.index\.json, by which others would be read"
    ):
        obr.load(referring, device="cpu")
    assert "remove that file, or compress again" in verify_checkpoint(referring)[0]


def test_a_malformed_entry_is_refused(pair):
    manifest = json.loads((pair[1] / "manifest.json").read_text())
    manifest[referred.ENTRY] = {"folder": 3}
    (pair[1] / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ObrError, match="malformed 'weights'; compress the model again"):
        obr.load(pair[1], device="cpu")


def test_an_older_checkpoint_with_blocks_makes_room(tiny_folder, tmp_path):
    model, out = made(tiny_folder, tmp_path)
    compress_stage(model, Recipe.parse({"method": "rtn"}), out, device="cpu")
    assert list(out.glob("block_*")) and verify_checkpoint(out) == []
    made(tiny_folder, tmp_path)
    assert not list(out.glob("block_*")) and verify_checkpoint(out) == []


def test_a_text_is_judged_with_the_models_weights(pair, tiny_folder):
    found = [
        text_score(folder, tiny_folder / "heldout.txt", {"seqlen": 64, "tokens": 512}, device="cpu")
        for folder in pair[1:]
    ]
    assert found[0]["value"] == found[1]["value"]
