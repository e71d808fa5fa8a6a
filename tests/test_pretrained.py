"""transformers' own from_pretrained reads packed checkpoints, as strictly as `obr.load`."""

import importlib
import shutil
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import obr
from obr import _transformers_hook
from obr.checkpoints.packed_linear import PackedLinear
from obr.errors import ObrError
from obr.models.loading import load_tokenizer

A8 = {"bits": 8}


@pytest.fixture(scope="module")
def prompt(tiny_folder):
    tokenizer = load_tokenizer(tiny_folder / "model")
    return torch.tensor([tokenizer((tiny_folder / "heldout.txt").read_text())["input_ids"][:40]])


@pytest.fixture(scope="module")
def checkpoint(tiny_folder, prompt, tmp_path_factory):
    """Rotated, with online transforms, activations of 8 and keys of 4 bits."""
    model = obr.rotate(obr.load_model(tiny_folder / "model", device="cpu"), "quarot", seed=1)
    recipe = {"method": "obr_gptq", "calibration": "c", "activations": A8, "keys": {"bits": 4}}
    out = tmp_path_factory.mktemp("pretrained") / "checkpoint"
    obr.save(obr.compress(model, prompt.repeat(4, 1), recipe), out)
    return out


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_our_own_reader(checkpoint, prompt, dtype):
    ours = obr.load(checkpoint, dtype=dtype, device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    assert torch.equal(theirs(prompt).logits, ours(prompt).logits)
    written = [model.generate(prompt[:, :8], max_new_tokens=6, do_sample=False) for model in (ours, theirs)]
    assert torch.equal(*written)
    assert theirs.obr_recipe.setting == "W4A8K4V16" and theirs.dtype == dtype


@torch.no_grad()
def test_weights_may_stay_packed(checkpoint, prompt):
    config = AutoConfig.from_pretrained(checkpoint)
    config.quantization_config["packed"] = True
    model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, dtype=torch.float32)
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    torch.testing.assert_close(model(prompt).logits, obr.load(checkpoint, packed=True)(prompt).logits)


def test_a_checkpoint_that_is_not_whole_is_refused(checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    file = broken / "block_001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ObrError, match=r"block_001\.safetensors"):
        AutoModelForCausalLM.from_pretrained(broken)
    with pytest.raises(ObrError, match="one device"):
        AutoModelForCausalLM.from_pretrained(checkpoint, device_map="auto")


@pytest.mark.parametrize("first", ["registry", "ours"])
def test_the_reader_is_entered_in_either_order(first, tmp_path, monkeypatch):
    (tmp_path / "a_registry.py").write_text("entries = []\n")
    (tmp_path / "a_reader.py").write_text("from a_registry import entries\nentries.append('obr')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_transformers_hook, "REGISTRY", "a_registry")
    monkeypatch.setattr(_transformers_hook, "READER", "a_reader")
    try:
        if first == "registry":
            importlib.import_module("a_registry")
        _transformers_hook.register()
        _transformers_hook.register()
        assert importlib.import_module("a_registry").entries == ["obr"]
        assert not any(isinstance(finder, _transformers_hook._Watch) for finder in sys.meta_path)
    finally:
        for name in ("a_registry", "a_reader"):
            sys.modules.pop(name, None)
