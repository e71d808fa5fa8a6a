"""Whole models: streaming, compression, checkpoints, perplexity, quantised attention."""

import json
import math

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import obr
from helpers.single_scores import text_score
from obr.calibration import collect_hessians
from obr.checkpoints.format import CheckpointBlocks
from obr.compression.stage import compress_stage
from obr.config.quantizer import QuantizerSettings
from obr.config.recipe import Recipe
from obr.data import token_windows, tokenize
from obr.errors import ObrError
from obr.evaluation.perplexity import perplexity
from obr.models.blocks import StreamedBlocks, run_block
from obr.models.layers import set_quantizers, wrap_block
from obr.models.loading import load_tokenizer
from obr.rotations import apply
from obr.rotations.obtain import make

CALIBRATION = {"nsamples": 16, "seqlen": 128}


@pytest.fixture(scope="module")
def prepared(tiny_folder, tmp_path_factory):
    """Folder with the rotation, calibration windows and cached Hessians of the tiny model."""
    folder = tmp_path_factory.mktemp("prepared")
    model = tiny_folder / "model"
    make({"kind": "quarot", "seed": 0}, model, folder / "rotation.safetensors")
    token_windows.calibrate(model, tiny_folder / "train.txt", CALIBRATION, folder / "tokens.safetensors")
    collect_hessians.hessian_stage(
        model, folder / "rotation.safetensors", folder / "tokens.safetensors", folder / "hessians"
    )
    return folder


@pytest.fixture(scope="module")
def windows(tiny_folder):
    tokens = tokenize.tokenize(load_tokenizer(tiny_folder / "model"), (tiny_folder / "heldout.txt").read_text())
    return token_windows.evaluation_windows(tokens, 128, 2048)


def recipe(**options) -> Recipe:
    return Recipe.parse({"rotation": "quarot", "calibration": "train", **options})


def test_perplexity_is_the_mean_over_whole_windows(tiny_folder, windows):
    model = obr.load_model(tiny_folder / "model", device="cpu")
    losses = [F.cross_entropy(model(w[None]).logits[0, :-1], w[1:]) for w in windows]
    assert obr.perplexity(model, windows) == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)
    assert 5 < obr.perplexity(model, windows) < 150 < 512  # it has learned something: uniform would be 512


def test_streamed_and_whole_models_agree(tiny_folder, windows):
    whole = perplexity(obr.load_model(tiny_folder / "model", device="cpu"), windows)
    assert perplexity(StreamedBlocks(tiny_folder / "model", device="cpu"), windows) == pytest.approx(whole, rel=1e-6)


def test_rotation_leaves_perplexity_alone(tiny_folder, prepared, windows):
    plain = perplexity(StreamedBlocks(tiny_folder / "model", device="cpu"), windows)
    rotated = apply.open_blocks(tiny_folder / "model", prepared / "rotation.safetensors", device="cpu")
    assert perplexity(rotated, windows) == pytest.approx(plain, rel=1e-4)
    whole = obr.rotate(obr.load_model(tiny_folder / "model", device="cpu"), "quarot")
    assert perplexity(whole, windows) == pytest.approx(plain, rel=1e-4)


def test_hessians_are_those_of_the_inputs(tiny_folder, prepared):
    """Against hooks on the rotated model: the running mean over sequences of 2 XᵀX, behind the transform."""
    tokens, _ = token_windows.load_tokens(prepared / "tokens.safetensors")
    model = obr.rotate(obr.load_model(tiny_folder / "model", device="cpu"), "quarot")
    seen = {"mlp.down_proj": 0, "self_attn.v_proj": 0, "self_attn.o_proj": 0, "mlp.gate_proj": 0}
    for name in seen:
        linear = model.model.layers[1].get_submodule(name)

        def observe(x, name=name):
            x = x.double().flatten(0, 1)
            seen[name] = seen[name] + 2 / len(tokens) * x.T @ x

        linear.observer = observe
    model(tokens)
    cached = collect_hessians.load(prepared / "hessians" / "block_001.safetensors")
    for name, group in zip(seen, ("down", "qkv", "o", "up_gate"), strict=True):
        assert torch.allclose(
            cached[group].hessian.double(), seen[name], rtol=1e-3, atol=1e-4 * seen[name].abs().max()
        )


def test_collecting_group_by_group_equals_one_pass(tiny_folder, prepared):
    tokens, _ = token_windows.load_tokens(prepared / "tokens.safetensors")
    blocks = apply.open_blocks(tiny_folder / "model", prepared / "rotation.safetensors", device="cpu")
    hidden, arguments = blocks.embed(tokens)
    block = blocks.load(0)
    entered = [states.clone() for states in hidden]
    alone = {
        group: collect_hessians.collect(block, blocks.layout, hidden, arguments[0], [group], whole=False)[group]
        for group in blocks.layout.groups
    }
    assert all(torch.equal(states, before) for states, before in zip(hidden, entered, strict=True))
    groups = list(blocks.layout.groups)
    together = collect_hessians.collect(block, blocks.layout, hidden, arguments[0], groups, whole=True)
    for states, before in zip(hidden, entered, strict=True):
        assert torch.equal(states, run_block(block, before, arguments[0]))
    for group, moments in together.items():
        assert torch.equal(alone[group].hessian, moments.hessian)
        assert torch.equal(alone[group].harmonic, moments.harmonic)


def compressed(tiny_folder, prepared, out, **options):
    chosen = recipe(**options)
    cached = chosen.hessian == "cached"
    return compress_stage(
        tiny_folder / "model", chosen, out, rotation=prepared / "rotation.safetensors", device="cpu",
        tokens=None if cached else prepared / "tokens.safetensors",
        hessians=prepared / "hessians" if cached else None,
    )  # fmt: skip


@pytest.mark.slow
def test_methods_order_by_perplexity_on_trained_model(tiny_folder, prepared, windows, tmp_path):
    """Restoration helps, in this order: Wanda, OBR, dense 4 bits, dense."""
    value = {}
    for method in ("dense", "rtn", "gptq", "wanda", "obr_rtn", "obr_gptq"):
        compressed(tiny_folder, prepared, tmp_path / method, method=method, hessian="cached")
        value[method] = perplexity(CheckpointBlocks(tmp_path / method, device="cpu"), windows)
    assert value["dense"] < value["gptq"] < value["obr_gptq"] < value["wanda"]
    assert value["obr_rtn"] < value["wanda"] and value["gptq"] < value["rtn"] * 1.01


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"hessian": "cached"}, {"pattern": "2:4", "hessian": "cached"}])
def test_checkpoints_hold_what_the_manifest_says(tiny_folder, prepared, windows, tmp_path, options):
    manifest = compressed(tiny_folder, prepared, tmp_path, method="obr_gptq", **options)
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["sparsity"] == pytest.approx(0.5) and manifest["zeros"] >= 0.5
    bits = manifest["bits_per_weight"]
    assert bits["theoretical"] <= bits["file"] < bits["theoretical"] + 0.4  # scales weigh on rows this short
    assert manifest["file_bytes"] == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert manifest["calibration"]["nsamples"] == 16
    assert manifest["rotation"] == {
        "kind": "quarot", "seed": 0, "folded": ["residual", "value"], "clipped": False,
        "online": ["o inputs", "down inputs", "queries and keys"],
    }  # fmt: skip
    rows = (tmp_path / "layers.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 7
    value = text_score(tmp_path, tiny_folder / "heldout.txt", {"seqlen": 128, "tokens": 2048}, device="cpu")
    assert value["value"] == pytest.approx(obr.perplexity(obr.load(tmp_path, device="cpu"), windows), rel=1e-5)
    assert value["windows"] == 16 and "non-overlapping windows of 128" in value["definition"]


@pytest.mark.slow
def test_sequential_and_cached_differ_only_behind_the_first_layers(tiny_folder, prepared, tmp_path):
    for kind in ("cached", "sequential"):
        compressed(tiny_folder, prepared, tmp_path / kind, method="obr_gptq", hessian=kind)
    first, second = (obr.load(tmp_path / kind, device="cpu").model.layers for kind in ("cached", "sequential"))
    assert torch.equal(first[0].self_attn.q_proj.weight, second[0].self_attn.q_proj.weight)
    assert not torch.equal(first[0].self_attn.o_proj.weight, second[0].self_attn.o_proj.weight)
    assert not torch.equal(first[1].self_attn.q_proj.weight, second[1].self_attn.q_proj.weight)


@pytest.mark.slow
@pytest.mark.parametrize("rotation", ["none", "quarot"])
@pytest.mark.parametrize("method", ["dense", "obr_gptq"])
def test_save_and_load_give_identical_logits(tiny_folder, tmp_path, rotation, method):
    model = obr.load_model(tiny_folder / "model", device="cpu")
    tokenizer = load_tokenizer(tiny_folder / "model")
    if rotation != "none":
        obr.rotate(model, rotation)
    tokens = obr.calibration_tokens(tokenizer, (tiny_folder / "train.txt").read_text(), nsamples=4, seqlen=64)
    settings = {"activations": {"bits": 8}, "keys": {"bits": 4}, "values": {"bits": 4, "symmetric": False}}
    obr.compress(model, tokens, {"method": method, **settings}, progress=False)
    obr.save(model, tmp_path, tokenizer)
    loaded = obr.load(tmp_path, device="cpu")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert load_tokenizer(tmp_path)("the union")["input_ids"] == tokenizer("the union")["input_ids"]
    plain = obr.load(tmp_path, {"method": "dense"}, device="cpu")  # the same weights, nothing else quantised
    assert not torch.equal(plain(tokens).logits, loaded(tokens).logits)


def test_saving_an_uncompressed_model_is_refused(tiny_folder, tmp_path):
    with pytest.raises(ObrError, match=r"run obr\.compress before obr\.save"):
        obr.save(obr.load_model(tiny_folder / "model", device="cpu"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sequential", "cached"])
def test_blocks_that_a_recipe_leaves_out_stay_dense(tiny_folder, prepared, windows, tmp_path, kind):
    settings = {"method": "obr_gptq", "hessian": kind, "activations": {"bits": 4}}
    compressed(tiny_folder, prepared, tmp_path / "all", **settings)
    manifest = compressed(tiny_folder, prepared, tmp_path / "some", **settings, blocks=":1")
    compressed(tiny_folder, prepared, tmp_path / "none", method="dense", hessian="cached")
    every, some, none = (obr.load(tmp_path / name, device="cpu").model.layers for name in ("all", "some", "none"))
    for name, linear in some[1].named_parameters():
        assert torch.equal(linear, none[1].get_parameter(name)), name
        assert torch.equal(some[0].get_parameter(name), every[0].get_parameter(name)), name
    assert some[0].mlp.down_proj.activations.bits == 4 and some[1].mlp.down_proj.activations.bits == 16
    assert manifest["bits_per_weight"]["theoretical"] == pytest.approx((3 + 16) / 2)
    assert manifest["sparsity"] == pytest.approx(0.25) and manifest["recipe"]["blocks"] == ":1"
    layers = pd.read_csv(tmp_path / "some" / "layers.csv")
    assert manifest["relative_error"] == pytest.approx(layers["relative_error"][layers["block"] == 0].mean())
    streamed = perplexity(CheckpointBlocks(tmp_path / "some", device="cpu"), windows)
    assert streamed == pytest.approx(perplexity(obr.load(tmp_path / "some", device="cpu"), windows), rel=1e-5)
    with pytest.raises(ObrError, match=r"blocks '5:' are none of the model's 2"):
        compressed(tiny_folder, prepared, tmp_path / "x", **settings, blocks="5:")
    with pytest.raises(ObrError, match=r"recipe\.blocks is 'first'; it must be a slice"):
        recipe(**settings, blocks="first")


def test_down_proj_takes_8_bit_activations(tiny_folder, prepared, tmp_path):
    compressed(
        tiny_folder,
        prepared,
        tmp_path,
        method="rtn",
        hessian="cached",
        int8_down_proj=True,
        activations={"bits": 4},
    )
    block = obr.load(tmp_path, device="cpu").model.layers[0]
    assert len(block.mlp.down_proj.weight[0].unique()) > 16 >= len(block.mlp.up_proj.weight[0].unique())
    assert block.mlp.down_proj.activations.bits == 8 and block.mlp.up_proj.activations.bits == 4


def quantised(model, **settings):
    from obr.models.architectures import layout_of
    from obr.models.layers import ATTENTION

    layout = layout_of(model.config)
    chosen = Recipe.parse({"method": "dense", **settings})
    for block in model.model.layers:
        wrap_block(block, layout)
        set_quantizers(block, layout, chosen)
    model.set_attn_implementation(ATTENTION)
    return model


def test_fewer_activation_bits_raise_perplexity(tiny_folder, windows):
    value = {16: perplexity(obr.load_model(tiny_folder / "model", device="cpu"), windows)}
    for bits in (8, 4, 3):
        four = {name: {"bits": bits} for name in ("activations", "keys", "values")}
        value[bits] = perplexity(quantised(obr.load_model(tiny_folder / "model", device="cpu"), **four), windows)
    assert value[16] < value[8] * 1.001 and value[8] < value[4] < value[3]
    assert value[8] == pytest.approx(value[16], rel=0.02)


def test_quantised_decoding_step_by_step_equals_the_whole_pass(tiny_folder, windows):
    """With a cache: keys and values are quantised token by token, so it does not matter when."""
    model = quantised(
        obr.rotate(obr.load_model(tiny_folder / "model", device="cpu"), "quarot"),
        keys={"bits": 4},
        values={"bits": 4},
    )
    tokens = windows[:1, :12]
    whole = model(tokens).logits
    cache, steps = None, []
    for i in range(12):
        out = model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-4)


def test_keys_and_values_share_a_scale_over_all_heads_unless_grouped():
    from obr.models.layers import KeyValueQuantizer

    quantizer = KeyValueQuantizer()
    key = torch.randn(1, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    key[:, 0] *= 100  # one loud head drowns the others
    quantizer.keys = quantizer.values = QuantizerSettings(4)
    _, drowned, _ = quantizer(key, key, key)
    assert not drowned[:, 1:].any()
    quantizer.keys = QuantizerSettings(4, group_size=8)
    assert quantizer(key, key, key)[1][:, 1:].any()


def test_groups_that_do_not_fit_are_refused(tiny_folder):
    model = obr.load_model(tiny_folder / "model", device="cpu")
    quantised(model, activations={"bits": 4, "group_size": 32}, values={"bits": 4, "group_size": 8})
    with pytest.raises(ObrError, match=r"group_size 36 does not divide the inputs of self_attn.q_proj, 96 channels"):
        quantised(model, activations={"bits": 4, "group_size": 36})
    with pytest.raises(ObrError, match="group_size 20 does not divide the keys of a token, 32 channels"):
        quantised(model, keys={"bits": 4, "group_size": 20})


def test_broken_checkpoints_are_refused(tiny_folder, prepared, tmp_path):
    compressed(tiny_folder, prepared, tmp_path, method="obr_gptq", hessian="cached")
    block = tmp_path / "block_001.safetensors"
    whole = block.read_bytes()
    block.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ObrError, match=r"block_001.safetensors is not the file that was written"):
        obr.load(tmp_path, device="cpu")
    block.unlink()
    with pytest.raises(ObrError, match=r"block_001"):
        obr.load(tmp_path, device="cpu")
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(ObrError, match="has format 99, this version reads 1"):
        obr.load(tmp_path, device="cpu")
    with pytest.raises(ObrError, match=r"is no packed checkpoint: it has no manifest\.json"):
        obr.load(tiny_folder / "model", device="cpu")


def test_files_that_do_not_match_the_recipe_are_refused(tiny_folder, prepared, tmp_path):
    model, rotation = tiny_folder / "model", prepared / "rotation.safetensors"
    for options, files, sentence in (
        ({}, {"rotation": rotation}, "with sequential Hessians reads --tokens, which is not given"),
        ({"hessian": "cached"}, {"rotation": rotation}, "with cached Hessians reads --hessians, which is not given"),
        ({}, {"tokens": prepared / "tokens.safetensors"}, "rotation is 'quarot', but no rotation file is given"),
        ({"rotation": "none"}, {"rotation": rotation}, "rotation is 'none', but a rotation file is given"),
    ):
        with pytest.raises(ObrError, match=sentence):
            compress_stage(model, recipe(method="obr_gptq", **options), tmp_path, device="cpu", **files)


@pytest.mark.slow
def test_leftovers_without_owner_are_removed(tiny_folder, prepared, tmp_path):
    """Reports of another run's blocks without a note of whose they are, as an interrupted tidying leaves them."""
    first = compressed(tiny_folder, prepared, tmp_path / "c", method="wanda", hessian="cached")
    leftovers = tmp_path / "c.unfinished"
    leftovers.mkdir()
    (leftovers / "block_000.json").write_text(json.dumps({"layers": []}))
    second = compressed(tiny_folder, prepared, tmp_path / "c", method="obr_gptq", hessian="cached")
    assert second["relative_error"] < first["relative_error"] and second["linear_weights"] == first["linear_weights"]
    assert not leftovers.exists()


def test_misfit_pattern_and_missing_model_are_refused(tiny_folder, prepared, tmp_path):
    with pytest.raises(ObrError, match="7:14 does not divide the 96 input columns"):
        compressed(tiny_folder, prepared, tmp_path, method="obr_gptq", pattern="7:14")
    with pytest.raises(ObrError, match="holds no model"):
        StreamedBlocks(tmp_path)


def test_nan_weights_and_outputs_are_named(tiny_folder, windows):
    model = obr.load_model(tiny_folder / "model", device="cpu")
    model.model.layers[1].mlp.up_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ObrError, match="The model gives NaN"):
        perplexity(model, windows)
    with pytest.raises(ObrError, match=r"block 1 mlp.up_proj: the weight has NaN"):
        obr.compress(model, windows[:2], {"method": "obr_gptq"}, progress=False)


class Plug(Exception):
    """Pulled."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"hessian": "cached"}, {"asymmetry": 1.0}], ids=["sequential", "cached", "asymmetric"]
)
def test_an_interrupted_run_goes_on_and_ends_the_same(tiny_folder, prepared, tmp_path, monkeypatch, options):
    from obr.checkpoints import writer
    from obr.compression import blocks as compression

    options = {"method": "obr_gptq", **options}
    undisturbed = compressed(tiny_folder, prepared, tmp_path / "undisturbed", **options)
    whole, calls = compression.compress_group, []

    def pulled(block, layout, group, matrix, report, index):
        calls.append((index, group))
        if (index, group) == (1, "up_gate"):
            raise Plug
        return whole(block, layout, group, matrix, report, index)

    with monkeypatch.context() as patch, pytest.raises(Plug):
        patch.setattr(compression, "compress_group", pulled)
        compressed(tiny_folder, prepared, tmp_path / "disturbed", **options)
    assert not (tmp_path / "disturbed" / "manifest.json").exists()
    assert not list((tmp_path / "disturbed").glob("block*"))

    with pytest.raises(ObrError, match=r"holds blocks of another run \(its recipe differs\); go back"):
        compressed(tiny_folder, prepared, tmp_path / "disturbed", **options, alpha=0.25)

    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(compression, "compress_group", lambda *a: calls.append(a[-1]) or whole(*a))
        manifest = compressed(tiny_folder, prepared, tmp_path / "disturbed", **options)
    assert set(calls) == {1}  # block 0 was not compressed again

    with monkeypatch.context() as patch, pytest.raises(Plug):  # pulled once more, among the last moves

        def pulled_late(*_):
            raise Plug

        patch.setattr(writer, "save_ends", pulled_late)
        compressed(tiny_folder, prepared, tmp_path / "late", **options)
    with monkeypatch.context() as patch:
        patch.setattr(compression, "compress_group", pulled_late)
        late = compressed(tiny_folder, prepared, tmp_path / "late", **options)
    assert late["file_bytes"] == manifest["file_bytes"]
    timed = {"seconds": 0, "files": manifest["files"] | {"layers.csv": ""}}
    undisturbed["files"]["layers.csv"] = ""
    assert manifest | timed == undisturbed | {"seconds": 0}
    for path in (tmp_path / "undisturbed").glob("*.safetensors"):
        there, here = (load_file(tmp_path / d / path.name) for d in ("undisturbed", "disturbed"))
        assert there.keys() == here.keys() and all(torch.equal(there[k], here[k]) for k in there), path.name
    assert not list(tmp_path.glob("*.unfinished"))
