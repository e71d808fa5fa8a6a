"""transformers' own from_pretrained reads packed checkpoints, as strictly as `obr.load`."""

import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import obr
from obr.checkpoints.packed_linear import PackedLinear
from obr.errors import ObrError
from obr.models.loading import load_tokenizer

obr.register_with_transformers()

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


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_logits_equal_obr_load(checkpoint, prompt, dtype):
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


READ = "AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='float32')"
FRESH = f"""
import sys
finders = list(sys.meta_path)
import obr
assert sys.meta_path == finders
from transformers import AutoModelForCausalLM
try:
    {READ}
    sys.exit("read before it was registered")
except OSError:  # it finds no file of a format that it knows
    pass
obr.register_with_transformers()
obr.register_with_transformers()
print(type({READ}).__name__)
"""


@pytest.mark.slow
def test_import_changes_nothing_and_registering_lets_transformers_read(checkpoint):
    run = subprocess.run([sys.executable, "-c", FRESH, checkpoint], text=True, capture_output=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[-1] == "LlamaForCausalLM"
