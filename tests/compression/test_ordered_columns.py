"""Checkpoints whose columns were rounded in the order of the Hessian's diagonal: stored and made again as others."""

import pytest
import torch
from safetensors.torch import save_file

import obr
from helpers.random_llama import random_llama
from obr.checkpoints.verify import verify_checkpoint
from obr.compression.recompute import Places, repeat
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a random model and tokens."""
    folder = tmp_path_factory.mktemp("files")
    random_llama(initializer_range=0.1).save_pretrained(folder / "model")
    tokens = torch.randint(0, 128, (8, 64), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, folder / "tokens.safetensors", metadata={"calibration": "{}"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"method": "gptq", "group": 32}, {"method": "sparsegpt_gptq"}], ids=str)
def test_ordered_checkpoints_are_stored_as_others_and_made_again_equally(options, files, tmp_path):
    recipe = Recipe.parse({"bits": 3, "calibration": "c", "column_order": "hessian", **options})
    out = tmp_path / "m" / "out"
    compress_stage(files / "model", recipe, out, tokens=files / "tokens.safetensors", device="cpu")
    assert verify_checkpoint(out) == []
    again = repeat(out, 6, Places(files / "model", None, files / "tokens.safetensors"), device="cpu")
    assert len(again) == 6 and all(layer.identical for layer in again)

    given = Recipe.parse({**recipe.to_dict(), "column_order": "given"})
    plain = tmp_path / "plain"
    compress_stage(files / "model", given, plain, tokens=files / "tokens.safetensors", device="cpu")
    assert {path.name for path in plain.iterdir()} == {path.name for path in out.iterdir()}
    one, other = (obr.load(folder, device="cpu").model.layers[0].mlp.down_proj.weight for folder in (out, plain))
    assert not torch.equal(one, other)
