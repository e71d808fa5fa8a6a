"""Block-wise refinement: its loss beside whole models, what stays, what is stored, and where it is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import obr
from helpers.family_models import EXPERTS, FAMILIES, random_model
from helpers.random_llama import random_llama
from obr.checkpoints.packing import unpack
from obr.checkpoints.verify import verify_checkpoint
from obr.compression import refine
from obr.compression.recompute import Places, repeat
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.models.blocks import Blocks
from obr.models.layers import QuantLinear
from obr.planning import cost_model, memory
from obr.planning.tensor_sizes import Sizes

REFINED = {"method": "gptq", "bits": 3, "calibration": "c", "refine_steps": 60}


def model_of():
    return random_llama(initializer_range=0.1)


@pytest.fixture(scope="module")
def tokens():
    """Windows that share most of their tokens, so that some tell of others."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 128, (12, 4), generator=generator)
    return words[torch.randint(0, 12, (8, 12), generator=generator)].flatten(1)


def compressed(tokens, **options):
    return obr.compress(model_of(), tokens, {**REFINED, **options}, progress=False)


def packed_layers(model) -> dict:
    return {name: unpack(m.packed) for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def block_error(model, tokens, block: int) -> float:
    """Mean over windows of the relative squared error of a block's output, from transformers' hidden states."""
    with torch.no_grad():
        found, wanted = (
            m.model(tokens, output_hidden_states=True).hidden_states[block + 1] for m in (model, model_of())
        )
    return float(((found - wanted).square().sum((1, 2)) / wanted.square().sum((1, 2))).mean())


def test_reported_ratio_is_that_of_the_blocks_outputs(tokens):
    """Of block 0, whose integers before refinement are those of a compression without; block 1's output is normed."""
    refined, plain = compressed(tokens), compressed(tokens, refine_steps=0)
    ratio = block_error(refined, tokens, 0) / block_error(plain, tokens, 0)
    rows = [row for row in refined.obr_report.layers if row.block == 0]
    assert ratio < 0.8 and len(rows) == 7
    assert all(row.refined == pytest.approx(ratio, rel=1e-3) for row in rows)
    assert all(row.refined is None for row in plain.obr_report.layers)
    with torch.no_grad():
        dense = model_of()(tokens).logits
        errors = [float((model(tokens).logits - dense).square().mean()) for model in (refined, plain)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "obr_gptq", "bits": 4, "pattern": "2:4"},
        {"method": "joint", "bits": 4, "sparsity": 0.5, "sweeps": 5},
        {"method": "wanda", "bits": 16, "sparsity": 0.5},
        {"group": 32},
        {"activations": {"bits": 4}, "hessian_inputs": "quantised"},
        {"asymmetry": 0.5, "blocks": "1:"},
    ],
)
def test_masks_and_grids_stay_and_are_stored_as_computed(options, tokens, tmp_path):
    refined, plain = compressed(tokens, **options), compressed(tokens, refine_steps=0, **options)
    for name, before in (old := packed_layers(plain)).items():
        after = packed_layers(refined)[name]
        if name.startswith("model.layers.0."):  # later blocks are compressed on other inputs
            assert torch.equal(after.mask, before.mask)
        assert (after.bits, after.group, after.pattern) == (before.bits, before.group, before.pattern)
        assert bool((after.weight[~after.mask] == 0).all())
    assert any(not torch.equal(packed_layers(refined)[name].weight, layer.weight) for name, layer in old.items())
    assert all("quantize" not in vars(module) for module in refined.modules()), (
        "activations are rounded with gradients"
    )
    manifest = obr.save(refined, tmp_path / "out")
    assert manifest["refinement"]["error_ratio"] < 1 and manifest["refinement"]["seconds"] > 0
    assert not verify_checkpoint(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(obr.load(tmp_path / "out")(tokens).logits, refined(tokens).logits)


def test_scales_norms_and_integers_are_all_trained(tokens):
    refined, plain = compressed(tokens), compressed(tokens, refine_steps=0)
    first = "model.layers.0.mlp.up_proj"
    after, before = packed_layers(refined)[first], packed_layers(plain)[first]
    assert not torch.equal(after.codes, before.codes) and not torch.equal(after.scale, before.scale)
    assert not torch.equal(
        refined.model.layers[0].input_layernorm.weight, model_of().model.layers[0].input_layernorm.weight
    )
    assert torch.equal(refined.model.norm.weight, model_of().model.norm.weight)


def test_scales_stay_positive_however_long_they_are_trained(tokens):
    model = compressed(tokens, refine_steps=0)
    trained = refine.TrainedLayer(model.model.layers[0].mlp.up_proj)
    trained.change.data.fill_(-5.0)
    assert bool((trained.restored().scale > 0).all())


def test_held_out_windows_keep_the_block_from_getting_worse(tokens):
    wild = compressed(tokens, held_out=2, refine_rate=1.0)
    plain = compressed(tokens, held_out=2, refine_steps=0)
    assert all(row.refined <= 1 for row in wild.obr_report.layers)
    if all(row.refined == 1 for row in wild.obr_report.layers):  # no step helped: nothing has changed
        for name, layer in packed_layers(plain).items():
            assert torch.equal(layer.codes, packed_layers(wild)[name].codes)
    found = compressed(tokens, held_out=2)
    rows = [row for row in found.obr_report.layers if row.block == 0]
    ratio = block_error(found, tokens[-2:], 0) / block_error(plain, tokens[-2:], 0)
    assert rows[0].refined < 1 and rows[0].refined == pytest.approx(ratio, rel=1e-3)


def test_gains_of_norms_with_an_offset_are_trained_by_their_gain():
    """Gemma's norms multiply by 1 + w: a change of the gain by a share c turns w to (1 + w)(1 + c) - 1."""
    model = random_model(FAMILIES["gemma"], torch.float32)
    blocks = Blocks(model)
    obr.compress(model, None, {"method": "rtn"}, progress=False)
    trained = refine.TrainedBlock(blocks.load(0), blocks.load(0), blocks.layout_at(0), {})
    name, norm = next(iter(trained.norms.items()))
    trained.changes[name].data.fill_(0.25)
    assert torch.allclose(trained.tensors()[name], (1 + norm) * 1.25 - 1)


@pytest.mark.parametrize("family", ["qwen3, head_dim apart", "gemma2", "mixtral", "deepseek_v3"])
def test_other_families_are_refined(family, tokens):
    model = random_model((FAMILIES | EXPERTS)[family], torch.float32)
    obr.compress(model, tokens % 64, {**REFINED, "bits": 4, "refine_rate": 0.01}, progress=False)
    assert all(row.refined < 1 for row in model.obr_report.layers)


def test_interrupted_refinement_goes_on_with_the_same_bytes(tokens, tmp_path, monkeypatch):
    model_of().save_pretrained(tmp_path / "model")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors", metadata={"calibration": "{}"})
    stage = {"tokens": tmp_path / "tokens.safetensors", "device": "cpu"}
    recipe = Recipe.parse({**REFINED, "held_out": 2})
    whole = compress_stage(tmp_path / "model", recipe, tmp_path / "whole", **stage)
    original, seen = refine.refine_block, []

    def stops_at_the_second(*arguments):
        seen.append(arguments)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(refine, "refine_block", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        compress_stage(tmp_path / "model", recipe, tmp_path / "parts", **stage)
    parts = compress_stage(tmp_path / "model", recipe, tmp_path / "parts", **stage)
    assert len(seen) == 3 and parts["refinement"]["error_ratio"] == whole["refinement"]["error_ratio"]
    for number in range(2):
        one, other = (load_file(tmp_path / out / f"block_00{number}.safetensors") for out in ("whole", "parts"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not verify_checkpoint(tmp_path / "parts")
    with pytest.raises(ObrError, match="refined block by block after its layers were compressed"):
        repeat(tmp_path / "parts", 1, Places(model=tmp_path / "model", tokens=stage["tokens"]))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"refine_steps": -1}, "refine_steps is -1; it must lie between 0 and 100000"),
        ({"refine_rate": 0}, "refine_rate is 0, which trains nothing"),
        ({"refine_rate": 0.1, "refine_steps": 0}, "refine_rate is 0.1, but no step is taken; give refine_steps"),
        ({"hessian": "cached"}, "refine_steps is 60, but cached Hessians know the dense model's inputs alone"),
        ({"method": "rtn"}, "refine_steps is 60, but method rtn reads no activations"),
    ],
)
def test_refinement_without_an_effect_is_refused(wrong, sentence):
    with pytest.raises(ObrError, match=sentence):
        Recipe.parse({**REFINED, **wrong})


def test_loss_that_is_not_finite_is_refused(tokens):
    model = model_of()
    block = Blocks(model).load(0)
    obr.compress(model, tokens, {**REFINED, "refine_steps": 0}, progress=False)
    trained = refine.TrainedBlock(block, block, Blocks(model).layout_at(0), {})
    trained.error = lambda states, beside: torch.tensor(float("nan"), requires_grad=True)
    windows = refine.Windows(torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(ObrError, match="Block 3: the loss of refinement is nan; use a smaller refine_rate"):
        refine.refine_block(trained, windows, None, Recipe.parse(REFINED), 3)


def test_the_plan_prices_refinement():
    sizes = Sizes.estimate(0.1)
    plain, refined, longer = (
        cost_model.compress(sizes, Recipe.parse({**REFINED, "refine_steps": n}), 8192, 512) for n in (0, 100, 200)
    )
    steps = 100 * 4 * sizes.forward(512, 512)
    assert longer.products - refined.products == pytest.approx(steps) and refined.products > plain.products + steps
    needs = [
        memory.memory("compress", sizes, 8192, 512, False, Recipe.parse({**REFINED, "refine_steps": n}))[0]
        for n in (0, 100)
    ]
    assert needs[1] > needs[0]


def test_table_of_layers_has_the_columns_of_refinement_alone_where_it_was(tokens, tmp_path):
    for steps, is_there in ((2, True), (0, False)):
        obr.save(compressed(tokens, refine_steps=steps), tmp_path / str(steps))
        header = (tmp_path / str(steps) / "layers.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
        assert ("refined" in header) == ("refine_seconds" in header) == is_there
        manifest = json.loads((tmp_path / str(steps) / "manifest.json").read_text(encoding="utf-8"))
        assert ("refinement" in manifest) == is_there
