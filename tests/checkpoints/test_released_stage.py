"""The stages around released checkpoints: files of every form, downloads, commands from file to perplexity."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import obr
from helpers.family_models import random_model
from helpers.hub_server import HUB_MODEL
from helpers.paths import ROOT
from helpers.released_checkpoints import CACHE, ENTRY, FORMS, QUANTISED, FlatModel, wrapped_state, written
from helpers.rotation_files import refused
from obr.checkpoints.format import load
from obr.checkpoints.released.download import download_released
from obr.checkpoints.released.state import StateDict
from obr.checkpoints.verify import verify_checkpoint
from obr.cli import main
from obr.data.token_windows import evaluation_windows
from obr.evaluation.perplexity import perplexity
from obr.models.loading import load_model, load_tokenizer
from obr.planning.plan import plan_of
from obr.runtime.files import sha256_of

pytestmark = pytest.mark.slow

STATE = {"a.weight": torch.arange(6.0).view(2, 3).half(), "b.weight": torch.ones(4).half(), "c": torch.zeros(1)}


# --- Files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_file_forms_hold_same_tensors(tmp_path, form):
    written(tmp_path, STATE, form)
    state = StateDict(tmp_path / "hub")
    assert set(state.headers) == set(STATE) and state.shape("a.weight") == (2, 3)
    assert all(torch.equal(state.read(name), tensor) for name, tensor in STATE.items())
    assert state.dtype(["a.weight", "b.weight"]) == torch.float16


def test_a_pickle_of_the_old_format_is_read(tmp_path):
    torch.save(STATE, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(StateDict(tmp_path).read("a.weight"), STATE["a.weight"])


def test_safetensors_are_preferred_to_pickles(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save(Planted(), tmp_path / "pytorch_model.bin")
    assert set(StateDict(tmp_path).headers) == set(STATE)


class Planted:
    """What a pickle might run."""


def index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    listed = json.loads(path.read_text())
    change(listed)
    path.write_text(json.dumps(listed))


def second(folder: Path) -> Path:
    return folder / "model-00002-of-00003.safetensors"


SHARDS = {
    "no shard": (lambda f: second(f).unlink(), "lacks model-00002-of-00003.safetensors, which"),
    "cut short": (lambda f: second(f).write_bytes(second(f).read_bytes()[:-9]), "is not a whole safetensors file"),
    "another file": (lambda f: second(f).write_text("text"), "is not a whole safetensors file"),
    "listed in vain": (lambda f: index(f, lambda i: i["weight_map"].update(d=second(f).name)), "index lists d in"),
    "no list": (lambda f: index(f, lambda i: i.clear()), "has no weight_map from names to files"),
    "outside": (lambda f: index(f, lambda i: i["weight_map"].update(d="../x.bin")), "'../x.bin', which is not"),
    "no JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "cannot be read as JSON"),
    "twice": (lambda f: save_file(STATE, second(f)), "delete the file that is out of date"),
    "not complete": (
        lambda f: [second(f).unlink(), (f / "model.safetensors.index.json").unlink()], "are not complete"
    ),
}  # fmt: skip


@pytest.mark.parametrize("harm, sentence", SHARDS.values(), ids=SHARDS)
def test_shards_that_are_not_whole_are_refused(tmp_path, harm, sentence):
    written(tmp_path, STATE, "safetensors shards")
    harm(tmp_path / "hub")
    refused(lambda: StateDict(tmp_path / "hub"), sentence)


def test_shards_without_an_index_are_read_if_they_are_complete(tmp_path):
    written(tmp_path, STATE, "bin shards")
    (tmp_path / "hub/pytorch_model.bin.index.json").unlink()
    assert set(StateDict(tmp_path / "hub").headers) == set(STATE)


@pytest.mark.parametrize(
    "contents, sentence",
    [
        (STATE | {"w_quantizers": Planted()}, "holds more than plain tensors"),
        (torch.ones(3), "is not a state dict"),
        ({"a": 1}, "is not a state dict"),
        ({}, "holds no tensors"),
    ],
)
def test_pickles_of_anything_else_are_not_opened(tmp_path, contents, sentence):
    torch.save(contents, tmp_path / "pytorch_model.bin")
    refused(lambda: StateDict(tmp_path), sentence)
    (tmp_path / "pytorch_model.bin").unlink()
    refused(lambda: StateDict(tmp_path), "holds neither pytorch_model.bin nor model.safetensors")


# --- Downloads --------------------------------------------------------------------------------------------


def test_a_download_has_one_form_and_its_hashes(hub, tmp_path):
    torch.save(STATE, hub.folder / "pytorch_model.bin")
    (hub.folder / "old").mkdir()
    shutil.copy(hub.folder / "pytorch_model.bin", hub.folder / "old")
    out = tmp_path / "results/released/m/r"
    download_released(HUB_MODEL, out)
    names = {"config.json", *(path.name for path in hub.folder.glob("*.safetensors*"))}
    assert {path.name for path in out.iterdir()} == names | {"source.json"}
    about = json.loads((out / "source.json").read_text())
    assert about["folder"] == "." and about["licence"] == "mit" and about["source"] == HUB_MODEL
    assert about["sha256"] == {name: sha256_of(out / name) for name in names}
    for path in hub.folder.glob("*.safetensors*"):
        path.unlink()
    download_released(HUB_MODEL, out)
    assert {path.name for path in out.iterdir()} == {"config.json", "pytorch_model.bin", "source.json"}
    assert [path.name for path in out.parent.iterdir()] == ["r"]
    (hub.folder / "pytorch_model.bin").unlink()
    refused(lambda: download_released(HUB_MODEL, out), "has neither model.safetensors nor pytorch_model.bin")
    assert (out / "pytorch_model.bin").is_file()


def test_damaged_or_interrupted_download_is_refused(hub, tmp_path):
    out, shards = tmp_path / "out", sorted(path.name for path in hub.folder.glob("*.safetensors"))
    whole = hub.do_GET

    def without_last(self):
        lost = self.path.endswith(shards[-1]) and "resolve" in self.path
        return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"}) if lost else whole(self)

    hub.do_GET = without_last
    refused(lambda: download_released(HUB_MODEL, out), "some/model")
    assert not out.exists()
    hub.do_GET = whole
    hub.asked.clear()
    download_released(HUB_MODEL, out)
    assert not [path for path in hub.asked if path.endswith(shards[0])], "the first shard was there already"
    hub.claims = "0" * 64
    refused(lambda: download_released(HUB_MODEL, tmp_path / "other"), "arrived damaged")
    assert not list(tmp_path.glob("other*"))


def test_invalid_released_sources_are_refused(tmp_path):
    refused(lambda: download_released({"source": "pypi"}, tmp_path / "out"), "source 'pypi' is unknown")
    refused(lambda: download_released({"source": "hub", "repo": "a/b"}, tmp_path / "out"), "lacks revision")
    (tmp_path / "file").touch()
    path = {"source": "path", "path": str(tmp_path / "file")}
    refused(lambda: download_released(path, tmp_path / "out"), "is not a folder; give the folder that holds")


# --- Commands ---------------------------------------------------------------------------------------------


def quarot_files(folder: Path, tiny_folder: Path):
    """A model with the tiny model's tokenizer, its released checkpoint, and what computes its logits."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    model = random_model(config, torch.float32)
    model.resize_token_embeddings(512)
    model.save_pretrained(folder / "model")
    for path in (tiny_folder / "model").glob("tokenizer*"):
        shutil.copy(path, folder / "model")
    return wrapped_state(model, "quarot"), lambda tokens: model(tokens).logits


def flatquant_files(folder: Path, tiny_folder: Path):
    shutil.copytree(tiny_folder / "model", folder / "model")
    flat = FlatModel(load_model(folder / "model", device="cpu"), free=True)
    return flat.state_dict(), flat


COMMANDS = {
    "quarot": (quarot_files, {**ENTRY, "rotation": "quarot"}, {}),
    "flatquant": (flatquant_files, ENTRY, QUANTISED),
}


def ran(*arguments) -> None:
    assert main.main([str(argument) for argument in arguments]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMANDS)
def test_the_commands_from_file_to_perplexity(kind, tmp_path, tiny_folder, capsys):
    files, entry, quantised = COMMANDS[kind]
    state, logits = files(tmp_path, tiny_folder)
    written(tmp_path, state, "safetensors shards")
    source = json.dumps({"source": "path", "path": str(tmp_path / "hub")})
    ran("download-released", "--settings", source, "--out", tmp_path / "released")
    out = tmp_path / "compressed/m/released"
    taken = ("--model", tmp_path / "model", "--released", tmp_path / "released", "--out", out)
    ran("released", "--recipe", json.dumps(entry), *taken)
    assert f"layout of {kind}" in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["source"]["folder"] == str((tmp_path / "hub").resolve()) and manifest["inputs"]["released"]
    ran("verify", out)
    assert not verify_checkpoint(out)

    text = ("--text", "heldout", tiny_folder / "heldout.txt", "seqlen=64", "tokens=512")
    recipe = json.dumps({**entry, **quantised})
    ran("evaluate", out, *text, "--out", tmp_path / "scores.json", "--recipe", recipe)
    text = (tiny_folder / "heldout.txt").read_text()
    tokens = torch.tensor(load_tokenizer(out)(text)["input_ids"])
    windows = evaluation_windows(tokens, 64)[:8]
    losses = [
        torch.nn.functional.cross_entropy(logits(window[None])[0, :-1].float(), window[1:]) for window in windows
    ]
    expected = float(torch.stack(losses).mean().exp())
    found = json.loads((tmp_path / "scores.json").read_text())["perplexity"]["heldout"]["value"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert found == pytest.approx(perplexity(load(out, {**entry, **quantised}, device="cpu"), windows), rel=1e-6)


def test_released_checkpoint_refuses_recompute_packing_and_changes(tmp_path, tiny_folder, capsys):
    state, _ = flatquant_files(tmp_path, tiny_folder)
    taken = ("--model", tmp_path / "model", "--released", written(tmp_path, state), "--out", tmp_path / "out")
    ran("released", "--recipe", json.dumps(ENTRY), *taken)
    assert main.main(["verify", str(tmp_path / "out"), "--recompute", "1"]) == 1
    assert "holds layers that others compressed; verify it without --recompute" in capsys.readouterr().err
    more = {"activations": {"bits": 8}, "keys": CACHE, "values": CACHE}
    refused(
        lambda: obr.load(tmp_path / "out", {**ENTRY, **more}, packed=True),
        "Weights that others compressed are read as floats",
    )
    ran(
        "push",
        tmp_path / "out",
        "you/name",
        "--dry-run",
        tmp_path / "card",
        "--licence",
        "mit",
    )
    assert "obr released --recipe" in (tmp_path / "card/README.md").read_text()
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    manifest["recipe"]["sparsity"] = 0.7
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    assert any("fewer than the" in problem for problem in verify_checkpoint(tmp_path / "out"))


@pytest.mark.workflow
def test_released_checkpoints_are_priced_by_size(tmp_path):
    """The host's work of the authors' three: 7, 7.6 and 69 billion parameters."""
    targets = [str(tmp_path / f"tables/{name}.csv") for name in ("released_7b", "released_70b", "released_qwen_7b")]
    plan = plan_of(ROOT / "Snakefile", [], {"results": str(tmp_path), "experiments": "released"}, targets, 16, 1)
    rules = plan.by_rule
    assert rules["released"]["jobs"] == rules["download_released"]["jobs"] == 3
    assert 1200 < rules["released"]["longest"] < 20_000 and 5 < rules["released"]["host"] < 40
    assert rules["released"]["gpu"] == 0 and 2 * (13 + 15 + 137) < plan.fetched < 2 * (14 + 16 + 142)
