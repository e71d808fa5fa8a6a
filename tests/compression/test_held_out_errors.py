"""Errors on calibration windows that no Hessian has seen."""

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import obr
from helpers.random_llama import random_llama
from obr.calibration.collect_hessians import inputs_of
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.models.blocks import Blocks

RECIPE = {"method": "gptq", "bits": 3, "calibration": "c"}


def model_of():
    return random_llama(initializer_range=0.1)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 128, (12, 64), generator=torch.Generator().manual_seed(0))


def errors_of(model, field: str) -> dict[str, float]:
    return {f"{row.block}.{row.layer}": getattr(row, field) for row in model.obr_report.layers}


def test_held_out_errors_are_measured_on_held_out_windows_only(tokens):
    found = obr.compress(model_of(), tokens, {**RECIPE, "held_out": 4}, progress=False)
    fewer = obr.compress(model_of(), tokens[:8], RECIPE, progress=False)
    for (name, ours), theirs in zip(found.state_dict().items(), fewer.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name  # the held-out windows have changed nothing
    errors = errors_of(found, "held_out_error")
    assert errors_of(found, "relative_error") == errors_of(fewer, "relative_error")
    assert all(error != error for error in errors_of(fewer, "held_out_error").values())

    dense, blocks = Blocks(model_of()), Blocks(found)
    hidden, arguments = blocks.embed(tokens[8:])
    for index in range(2):
        block = blocks.load(index)
        for name in blocks.layout.linears:
            x = torch.cat([inputs_of(block, name, states, arguments[index]) for states in hidden]).double()
            weight = dense.load(index).get_submodule(name).weight.double()
            change = weight - block.get_submodule(name).weight.double()
            error = float((x @ change.T).square().sum() / (x @ weight.T).square().sum())
            # Weights are stored in the model's dtype, errors are of what was found in float32.
            assert errors[f"{index}.{name}"] == pytest.approx(error, rel=0.01), (index, name)
        for i, states in enumerate(hidden):
            hidden[i] = block(states, **arguments[index])


def test_layer_fitted_to_few_tokens_has_larger_held_out_error(tokens):
    model = obr.compress(model_of(), tokens, {**RECIPE, "held_out": 8, "asymmetry": 0.5}, progress=False)
    seen, unseen = (errors_of(model, field) for field in ("relative_error", "held_out_error"))
    assert sum(unseen.values()) > 1.1 * sum(seen.values())


@pytest.mark.slow
def test_checkpoint_reports_held_out_errors(tokens, tmp_path):
    model_of().save_pretrained(tmp_path / "model")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors", metadata={"calibration": "{}"})

    def stage(out: str, **options) -> dict:
        recipe = Recipe.parse({**RECIPE, "blocks": ":1", **options})
        return compress_stage(
            tmp_path / "model", recipe, tmp_path / out, tokens=tmp_path / "tokens.safetensors", device="cpu"
        )

    manifest = stage("held", held_out=2)
    column = pd.read_csv(tmp_path / "held" / "layers.csv")["held_out_error"]
    assert column[:7].notna().all() and column[7:].isna().all()  # the second block is left as it was
    assert manifest["held_out_error"] == pytest.approx(column[:7].mean())
    assert "held_out_error" not in stage("all")
    with pytest.raises(ObrError, match="held_out is 12, but there are 12 calibration windows; hold out fewer"):
        stage("none", held_out=12)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"held_out": -1}, "r.held_out is -1; it must be a number of calibration windows"),
        ({"held_out": 0.5}, "r.held_out is 0.5, which is not a whole number"),
        ({"held_out": 2, "hessian": "cached"}, "r.held_out is 2, but cached Hessians know the dense model's"),
        ({"held_out": 2, "method": "rtn"}, "r.held_out is 2, but method rtn reads no activations"),
    ],
)
def test_invalid_held_out_is_refused(options, sentence):
    with pytest.raises(ObrError, match=sentence):
        Recipe.parse({**RECIPE, **options}, "r")
