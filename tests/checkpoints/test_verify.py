"""Compressed checkpoints are checked against their manifest, and layers of them made again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.paths import ROOT
from helpers.random_llama import random_llama
from helpers.workflow_runs import with_hashes
from obr.calibration.collect_hessians import hessian_stage
from obr.checkpoints.verify import verify_checkpoint
from obr.cli import main
from obr.compression import blocks
from obr.compression.recompute import Places, repeat
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.rotations.obtain import make
from obr.runtime import processor
from obr.runtime.files import sha256_of
from obr.runtime.provenance import software

MODEL, RECIPE = "m", {"method": "obr_gptq", "rotation": "quarot", "calibration": "c", "pattern": "2:4"}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A results folder with a random model of three blocks, compressed with cached and sequential Hessians."""
    folder = tmp_path_factory.mktemp("results")
    model, rotation = folder / "models" / MODEL, folder / "rotations/quarot" / f"{MODEL}.safetensors"
    random_llama(3).save_pretrained(model)
    rotation.parent.mkdir(parents=True)
    make({"kind": "quarot", "seed": 0}, model, rotation)
    tokens = folder / "calibration/c" / f"{MODEL}.safetensors"
    tokens.parent.mkdir(parents=True)
    windows = torch.randint(0, 128, (16, 64), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": windows}, tokens, metadata={"calibration": "{}"})
    hessians = folder / "hessians" / MODEL / "quarot" / "c"
    hessian_stage(model, rotation, tokens, hessians, device="cpu")
    for kind, inputs in (("cached", {"hessians": hessians}), ("sequential", {"tokens": tokens})):
        recipe = Recipe.parse({**RECIPE, "hessian": kind, "blocks": ":2"})
        compress_stage(model, recipe, folder / "compressed" / MODEL / kind, rotation=rotation, device="cpu", **inputs)
    return folder


@pytest.fixture
def checkpoint(results, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(results / "compressed" / MODEL / "cached", tmp_path / "checkpoint"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cached", "sequential"])
def test_a_whole_checkpoint_is_told_to_be_whole(results, kind, capsys):
    checkpoint = results / "compressed" / MODEL / kind
    assert verify_checkpoint(checkpoint) == []
    assert main.main(["verify", str(checkpoint), "--recompute", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("made again: identical") == 3 and out.endswith("is what its manifest says.\n"), out


def compressed(results: Path, out: Path) -> dict:
    """The manifest of a checkpoint with cached Hessians, made now."""
    folder, rotation = (
        results / "hessians" / MODEL / "quarot/c",
        results / "rotations/quarot" / f"{MODEL}.safetensors",
    )
    recipe = Recipe.parse({**RECIPE, "hessian": "cached"})
    return compress_stage(results / "models" / MODEL, recipe, out, rotation=rotation, hessians=folder, device="cpu")


@pytest.mark.slow
def test_recompute_uses_products_of_recorded_block(results, monkeypatch, capsys):
    """A run that was interrupted, and went on where products are of another dtype."""
    out = results / "compressed" / MODEL / "interrupted"
    whole_block = blocks._compress_block

    def interrupted(block, index, *more):
        if index == 1:
            raise KeyboardInterrupt
        return whole_block(block, index, *more)

    monkeypatch.setenv("OBR_PRODUCTS", "bfloat16")
    monkeypatch.setattr(blocks, "_compress_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compressed(results, out)
    monkeypatch.setattr(blocks, "_compress_block", whole_block)
    monkeypatch.setenv("OBR_PRODUCTS", "float32")
    manifest = compressed(results, out)
    assert [(p["products"], p["blocks"]) for p in manifest["processors"]] == [("bfloat16", [0]), ("float32", [1, 2])]
    for name in ("float32", "bfloat16"):
        monkeypatch.setenv("OBR_PRODUCTS", name)
        assert main.main(["verify", str(out), "--recompute", "21"]) == 0
        assert capsys.readouterr().out.count("made again: identical") == 21
    manifest["processors"][0].update(name="Z80", products="float32")  # not what made them
    (out / "manifest.json").write_text(json.dumps(manifest))
    main.main(["verify", str(out), "--recompute", "21"])
    told = capsys.readouterr().out
    assert " of its weights differ (made by Z80 (" in told and "float32 products, again by " in told
    for malformed in ([{}], 3, [{**manifest["processors"][0], "products": "half"}], [{"blocks": [0]}]):
        (out / "manifest.json").write_text(json.dumps({**manifest, "processors": malformed}))
        assert main.main(["verify", str(out), "--recompute", "1"]) == 1
        assert "manifest.json has malformed 'processors'; it was altered: compress again." in capsys.readouterr().err


def test_recompute_refuses_other_inputs_first(results, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    make({"kind": "quarot", "seed": 1}, results / "models" / MODEL, other)
    checkpoint = str(results / "compressed" / MODEL / "cached")
    assert main.main(["verify", checkpoint, "--recompute", "1", "--rotation", str(other)]) == 1
    assert "The rotation given is not the one that the checkpoint was made from" in capsys.readouterr().err
    assert main.main(["verify", checkpoint, "--recompute", "1", "--model", str(tmp_path / "gone")]) == 1
    assert "gone does not exist; say with --model where" in capsys.readouterr().err


def test_recompute_reports_layers_of_other_settings(results, tmp_path):
    """Of another method than the manifest says: every sum may fit, the weights do not."""
    folder = results / "hessians" / MODEL / "quarot" / "c"
    rotation = results / "rotations/quarot" / f"{MODEL}.safetensors"
    recipe = Recipe.parse({**RECIPE, "hessian": "cached", "blocks": ":2", "alpha": 0.9})
    compress_stage(
        results / "models" / MODEL, recipe, tmp_path / "c", rotation=rotation, hessians=folder, device="cpu"
    )
    manifest = json.loads((tmp_path / "c/manifest.json").read_text())
    manifest["recipe"]["alpha"] = manifest["inputs"]["recipe"]["alpha"] = 0.5
    (tmp_path / "c/manifest.json").write_text(json.dumps(manifest))
    assert verify_checkpoint(tmp_path / "c") == []
    found = repeat(tmp_path / "c", 3, Places(results / "models" / MODEL, rotation, None, folder), "cpu")
    assert max(layer.differing for layer in found) > 0.01 and not any(layer.identical for layer in found)


def test_the_manifest_has_a_bill_of_all_software(results, tmp_path):
    manifest = json.loads((results / "compressed" / MODEL / "cached/manifest.json").read_text())
    bill, locks = manifest["software"], ("requirements.lock", "requirements.torch.lock")
    assert bill == software() and manifest["instructions"]
    assert manifest["processors"] == [processor.description("cpu") | {"blocks": [0, 1, 2]}]
    assert bill["lock"] == {name: sha256_of(ROOT / name) for name in locks}
    assert bill["packages"]["torch"] == torch.__version__ and bill["packages"]["obr"]
    # what they require in turn, under an extra (lm-eval[hf]) too, and nothing that is only there for tests
    assert {"sympy", "accelerate", "jinja2"} <= bill["packages"].keys() and "pytest" not in bill["packages"]
    installed = bill["packages"]["numpy"]
    (tmp_path / "requirements.lock").write_text(
        f"numpy=={installed} \\\n --hash=sha256:0\nJinja2==0.1\nnot-here==1\n"
    )
    other = software(tmp_path)
    assert other["unlike_lock"] == {"jinja2": "0.1"} and [*other["lock"]] == ["requirements.lock"]


def altered(change):
    def spoil(checkpoint: Path) -> None:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        change(manifest)
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))

    return spoil


def in_block(change):
    """Let `change` alter tensors and header of the first block, and the hashes follow."""

    def spoil(checkpoint: Path) -> None:
        path = checkpoint / "block_000.safetensors"
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            header = json.loads(file.metadata()["block"])
        change(tensors, header)
        save_file(tensors, path, metadata={"block": json.dumps(header)})
        with_hashes(checkpoint)

    return spoil


def flipped(checkpoint: Path) -> None:
    path = checkpoint / "block_001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


Q = "self_attn.q_proj"


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda c: (c / "manifest.json").unlink(), "is no packed checkpoint: it has no manifest.json"),
        (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json holds a JSON list, not an object"),
        (altered(lambda m: m.pop("recipe")), "manifest.json has no 'recipe'"),
        (altered(lambda m: m.update(blocks="3")), "manifest.json has 'blocks' of type str; it was altered"),
        (lambda c: (c / "layers.csv").unlink(), "lacks layers.csv, which its manifest lists"),
        (flipped, "block_001.safetensors is not the file that was written (its sha256 differs)"),
        (lambda c: (c / "x.bin").touch(), "x.bin is not in the manifest"),
        (altered(lambda m: m.update(sparsity=0.4)), "manifest.json says sparsity 0.4, the files have 0.333"),
        (altered(lambda m: m["bits_per_weight"].update(file=1)), "manifest.json says 1 bits a weight in the file"),
        (
            altered(lambda m: m["recipe"].update(pattern="1:4", sparsity=0.75)),
            f"block 0 {Q} has pattern 2:4, the recipe says 1:4",
        ),
        (altered(lambda m: m["recipe"].update(bits=3)), f"block 0 {Q} is stored at 4 bits, the recipe says 3"),
        (altered(lambda m: m["recipe"].update(blocks=":1")), f"block 1 {Q} is stored at 4 bits, the recipe says 16"),
        (in_block(lambda t, h: t[f"{Q}.scale"].fill_(float("nan"))), "scales that are not finite"),
        (in_block(lambda t, h: t["input_layernorm.weight"].fill_(float("inf"))), "input_layernorm.weight has NaN"),
        (in_block(lambda t, h: t[f"{Q}.codes"].zero_()), "layers.csv says zeros 0.5"),
        (in_block(lambda t, h: t.update({f"{Q}.mask": t[f"{Q}.mask"][1:].clone()})), "A packed stream has"),
        (in_block(lambda t, h: h["layers"][Q].update(shape="\x1b[2J\n")), f"{Q} is \\x1b[2J\\n, the model's is"),
        (in_block(lambda t, h: h["layers"].pop(Q)), "block_000.safetensors is not a block of this model"),
    ],
)  # fmt: skip
def test_altered_checkpoint_is_reported_in_one_sentence(checkpoint, spoil, sentence, capsys):
    spoil(checkpoint)
    assert main.main(["verify", str(checkpoint)]) == 1
    out, error = capsys.readouterr()
    assert sentence in out and f"{checkpoint} is not what its manifest says in" in error, out
    assert all(line.endswith(".") for line in out.splitlines()), out
