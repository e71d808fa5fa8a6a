"""Packed layers compute what fake-quantised ones simulate, in every pattern, and whole models with them."""

import importlib.util

import pytest
import torch

import obr
from obr.checkpoints import packed_kernels
from obr.checkpoints.packed_linear import PackedLinear
from obr.errors import ObrError
from obr.evaluation.stage import Wanted, evaluate_stage
from obr.kernels.gpu import layout
from obr.methods.restore import restore
from obr.models.layers import QuantLinear
from obr.models.loading import load_tokenizer

pytestmark = pytest.mark.slow
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; run make test-triton"
)

A8, A4 = {"bits": 8}, {"bits": 4, "clip_ratio": 0.9}
RECIPES = {
    "unstructured": {"method": "obr_gptq", "activations": A8},
    "unstructured A4": {"method": "obr_gptq", "activations": A4, "keys": A4, "values": A4},
    "asymmetric": {"method": "magnitude", "sparsity": 0.3, "activations": {"bits": 8, "symmetric": False}},
    "2:4": {"method": "obr_rtn", "pattern": "2:4", "activations": A4, "int8_down_proj": True},
    "4:8": {"method": "obr_rtn", "pattern": "4:8", "activations": A8},
    "8:16": {"method": "wanda", "pattern": "8:16", "activations": A4},
    "paired 4:8": {"method": "wanda", "pattern": "paired 4:8", "activations": A8},
    "dense": {"method": "gptq", "activations": A8},
    "3 bits, first block": {"method": "rtn", "bits": 3, "blocks": "0:1", "activations": A8},
}


@pytest.fixture(scope="module")
def prompt(tiny_folder):
    tokenizer = load_tokenizer(tiny_folder / "model")
    return torch.tensor([tokenizer((tiny_folder / "heldout.txt").read_text())["input_ids"][:40]])


def compressed(folder, out, recipe, prompt, rotation="quarot"):
    model = obr.load_model(folder / "model", device="cpu")
    if rotation:
        obr.rotate(model, rotation, seed=1)
    obr.save(obr.compress(model, prompt.repeat(4, 1), {"calibration": "c", **recipe}), out)
    return out


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", RECIPES)
def test_layers_and_models_are_those_simulated(name, tiny_folder, prompt, tmp_path):
    out = compressed(tiny_folder, tmp_path / "c", RECIPES[name], prompt)
    simulated, packed = obr.load(out, device="cpu"), obr.load(out, packed=True)
    pairs = [(m, packed.get_submodule(n)) for n, m in simulated.named_modules() if isinstance(m, QuantLinear)]
    seen = []
    for layer, twin in pairs:
        layer.register_forward_hook(lambda _, inputs, out, twin=twin: seen.append((out, twin(inputs[0]))))
    logits = simulated(prompt).logits
    assert len(seen) == 14
    for expected, found in seen:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    kinds = {type(twin) for _, twin in pairs}
    mixed = "block" in name or "int8_down_proj" in RECIPES[name]
    assert kinds == ({PackedLinear, QuantLinear} if mixed else {PackedLinear})
    # Rounded differently by a float's last bit, an activation may land on the next step of its grid.
    difference = (packed(prompt).logits - logits).norm() / logits.norm()
    assert difference < 2e-2


@pytest.mark.parametrize("rotation", [None, "quarot", "flatquant"])
def test_packed_models_generate(rotation, tiny_folder, prompt, tmp_path):
    out = compressed(tiny_folder, tmp_path / "c", RECIPES["unstructured"], prompt, rotation)
    written = [
        obr.load(out, device="cpu", packed=packed).generate(prompt[:, :8], max_new_tokens=12, do_sample=False)
        for packed in (False, True)
    ]
    assert written[1].shape == (1, 20)
    assert (written[0] == written[1]).float().mean() > 0.9


def test_perplexity_is_the_simulated_one_and_half_precision_works(tiny_folder, prompt, tmp_path):
    out = compressed(tiny_folder, tmp_path / "c", RECIPES["unstructured"], prompt)
    values = [obr.perplexity(obr.load(out, device="cpu", packed=packed), prompt) for packed in (False, True)]
    assert values[1] == pytest.approx(values[0], rel=2e-3)
    half = obr.load(out, dtype=torch.bfloat16, packed=True)
    assert obr.perplexity(half, prompt) == pytest.approx(values[0], rel=0.05)


@pytest.mark.slow
def test_packed_model_keeps_no_dense_weight(tiny_folder, prompt, tmp_path):
    model = obr.load(compressed(tiny_folder, tmp_path / "c", RECIPES["unstructured"], prompt), packed=True)
    names = [name for name, tensor in model.named_parameters() if tensor.ndim == 2]
    assert set(names) <= {"model.embed_tokens.weight", "lm_head.weight"}
    with pytest.raises(ObrError, match="no weight to read"):
        _ = model.model.layers[0].mlp.up_proj.weight
    assert "layout=bitmask, bits=3." in repr(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "load", "message"),
    [
        ({"method": "rtn"}, {}, "activations at 16 bits"),
        ({"method": "rtn", "bits": 8, "activations": A8}, {}, "Weights of 8 bits"),
        ({"method": "dense"}, {}, "Weights of 16 bits"),
        ({"method": "rtn", "activations": {"bits": 8, "group_size": 32}}, {}, "group_size 32"),
        ({"method": "rtn", "group": 32, "activations": A8}, {}, "groups of 32 columns"),
        ({"method": "rtn", "activations": A8}, {"device": "meta"}, "cpu and cuda, not on meta"),
    ],
)
def test_packing_refuses_settings_that_change_model(recipe, load, message, tiny_folder, prompt, tmp_path):
    out = compressed(tiny_folder, tmp_path / "c", recipe, prompt, None)
    with pytest.raises(ObrError, match=message):
        obr.load(out, packed=True, **load)


def test_another_recipe_may_ask_for_8_bit_activations(tiny_folder, prompt, tmp_path):
    out = compressed(tiny_folder, tmp_path / "c", {"method": "rtn"}, prompt)
    recipe = {"method": "rtn", "activations": A8}
    simulated, packed = obr.load(out, recipe, device="cpu"), obr.load(out, recipe, packed=True)
    assert packed.obr_recipe.setting == "W4A8KV16"
    assert obr.perplexity(packed, prompt) == pytest.approx(obr.perplexity(simulated, prompt), rel=2e-3)


GPU_RECIPES = {
    "unstructured A8": {"method": "magnitude", "activations": A8},
    "2:4, weights alone": {"method": "magnitude", "pattern": "2:4"},
    "3 bits, groups, weights alone": {"method": "rtn", "bits": 3, "group": 16},
}


def test_evaluation_multiplies_packed_weights_and_keeps_the_scores_apart(tiny_folder, prompt, tmp_path):
    out, scores = compressed(tiny_folder, tmp_path / "c", RECIPES["unstructured"], prompt), tmp_path / "scores.json"
    load_tokenizer(tiny_folder / "model").save_pretrained(out)
    wanted = [Wanted("perplexity", "text", tiny_folder / "heldout.txt", {"seqlen": 64, "tokens": 256})]
    plain = evaluate_stage(out, wanted, scores, device="cpu")
    packed = evaluate_stage(out, wanted, scores, device="cpu", packed=True)
    assert packed["computed"] == ["perplexity.text"] and packed["device"] == "cpu, packed weights"
    values = [found["perplexity"]["text"]["value"] for found in (plain, packed)]
    assert values[0] != values[1] == pytest.approx(values[0], rel=2e-3)
    with pytest.raises(ObrError, match="no checkpoint of this package"):
        evaluate_stage(tiny_folder / "model", wanted, scores, device="cpu", packed=True)


@needs_triton
def test_scales_of_gpu_kernels_keep_their_bits_whatever_the_dtype_of_the_model():
    restored = restore(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), None, "rtn")
    kernel = packed_kernels.GpuKernel(restored, "cpu")
    assert torch.equal(kernel.bfloat16().weight.scale, restored.scale)
    assert not kernel.state_dict() and {name for name, _ in kernel.named_buffers()} == set(layout.PARTS)


@torch.no_grad()
@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the device's own test runs instead")
@pytest.mark.parametrize("name", GPU_RECIPES)
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_gpu_kernels_compute_the_simulated_layers(name, tokens, tiny_folder, prompt, tmp_path, monkeypatch):
    """By Triton's interpreter, in the CPU kernels' place: one token, few, and unpacked rows."""
    out = compressed(tiny_folder, tmp_path / "c", GPU_RECIPES[name], prompt, None)
    simulated = obr.load(out, device="cpu")
    monkeypatch.setitem(packed_kernels.KERNELS, "cpu", packed_kernels.GpuKernel)
    packed = obr.load(out, device="cpu", packed=True)
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        layer, twin = simulated.get_submodule(path), packed.get_submodule(path)
        assert isinstance(twin, PackedLinear) and twin.kernel.bits_per_weight < 5
        x = torch.randn(tokens, layer.weight.shape[1], generator=torch.Generator().manual_seed(tokens))
        expected = layer(x)
        torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: packed models were not run on one")
@pytest.mark.parametrize("name", [*GPU_RECIPES, "unstructured", "paired 4:8"])
def test_packed_models_on_a_gpu_are_those_simulated_there(name, tiny_folder, prompt, tmp_path):
    out = compressed(tiny_folder, tmp_path / "c", {**GPU_RECIPES, **RECIPES}[name], prompt)
    both = [obr.load(out, dtype=torch.float32, device="cuda", packed=packed) for packed in (False, True)]
    logits = [model(prompt.cuda()).logits for model in both]
    assert (logits[1] - logits[0]).norm() / logits[0].norm() < 2e-2
    written = [model.generate(prompt[:, :8].cuda(), max_new_tokens=12, do_sample=False) for model in both]
    assert (written[0] == written[1]).float().mean() > 0.9
