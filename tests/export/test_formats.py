"""Exported checkpoints are what our own reader reads: in transformers, by the gguf package, and in llama.cpp."""

import json
import re

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import obr
from helpers.family_models import EXPERTS, FAMILIES
from obr.cli.main import main
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.export import gguf as gguf_export
from obr.export.dispatch import export
from obr.export.source import ExportSource
from obr.models.architectures import Dimensions
from obr.models.layers import QuantLinear
from obr.models.loading import load_tokenizer
from obr.models.tensor_files import TensorFiles
from obr.rotations import registry

pytestmark = pytest.mark.slow

HALF = 2.0**-11  # what rounding to float16 takes of a number, at most
RECIPES = {
    "unstructured": {"method": "obr_gptq"},
    "paired 4:8, 8-bit down_proj": {"method": "wanda", "pattern": "paired 4:8", "int8_down_proj": True},
    "3 bits, first block": {"method": "rtn", "bits": 3, "blocks": "0:1"},
    "fused rotation": {"method": "joint", "sweeps": 10, "rotation": "quarot_fused"},
}


@pytest.fixture(scope="module")
def prompt(tiny_folder):
    tokenizer = load_tokenizer(tiny_folder / "model")
    return torch.tensor([tokenizer((tiny_folder / "heldout.txt").read_text())["input_ids"][:40]])


@pytest.fixture(scope="module")
def checkpoints(tiny_folder, prompt, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("export"), {}
    for number, (name, recipe) in enumerate(RECIPES.items()):
        model = obr.load_model(tiny_folder / "model", device="cpu")
        made[name] = folder / str(number)
        if "rotation" in recipe:
            obr.rotate(model, registry.draw("quarot", Dimensions.of(model.config), fused=True))
        compressed = obr.compress(model, prompt.repeat(4, 1), {"calibration": "c", **recipe})
        obr.save(compressed, made[name], load_tokenizer(tiny_folder / "model"))
    return made


def random_model(config, out, prompt):
    """A random model of this configuration, rounded to 4 bits, as a checkpoint without a tokenizer."""
    options = {**config.to_dict(), "vocab_size": 512, "num_hidden_layers": 2, "dtype": torch.float16}
    options.pop("layer_types", None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(config)(**options)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    for parameter in model.parameters():  # not by `model.half()`, which rounds rotary frequencies too
        parameter.data = parameter.half().float()
    model.requires_grad_(False)
    obr.save(obr.compress(model, prompt, {"method": "rtn"}), out)
    return out


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", RECIPES)
def test_transformers_reads_compressed_tensors_with_the_same_logits(name, checkpoints, prompt, tmp_path):
    out = tmp_path / "packed"
    assert "14 layers" in export(checkpoints[name], "compressed-tensors", out) or "first block" in name
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(model(prompt).logits, obr.load(checkpoints[name], device="cpu")(prompt).logits)
    tokens = load_tokenizer(out)("A text.")
    assert tokens["input_ids"] == load_tokenizer(checkpoints[name])("A text.")["input_ids"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed"]


def test_gguf_blocks_equal_gguf_packages():
    codes = torch.randint(-8, 8, (5, 96), dtype=torch.int8)
    scale = (torch.rand(5) * 0.1).half()
    expected = (codes * scale.float()[:, None]).numpy()
    assert np.array_equal(dequantize(gguf_export.q4_0(codes, scale).numpy(), gguf_export.Kind.Q4_0), expected)
    wide = torch.randint(-128, 128, (5, 96), dtype=torch.int16)
    expected = (wide * scale.float()[:, None]).numpy()
    assert np.array_equal(dequantize(gguf_export.q8_0(wide, scale).numpy(), gguf_export.Kind.Q8_0), expected)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", RECIPES)
def test_gguf_holds_our_weights_up_to_the_rounding_of_scales(name, checkpoints, prompt, tmp_path):
    export(checkpoints[name], "gguf", tmp_path / "model.gguf")
    ours = obr.load(checkpoints[name], device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    layers = {n: m.weight for n, m in ours.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 14
    for path, weight in layers.items():
        found = theirs.get_submodule(path).weight
        assert torch.equal(found == 0, weight == 0)
        assert ((found - weight).abs() <= 1.001 * HALF * weight.abs()).all()
    expected = ours(prompt).logits
    assert (theirs(prompt).logits - expected).norm() / expected.norm() < 1e-3
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kinds = {t.name.split(".")[2]: t.tensor_type.name for t in reader.tensors if t.name.startswith("blk.0.")}
    assert kinds["attn_q"] == "Q4_0" and kinds["ffn_down"] == ("Q8_0" if "8-bit" in name else "Q4_0")
    tokens = reader.fields["tokenizer.ggml.tokens"]
    assert len(tokens.data) == 512 and reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def evaluated(path, tokens) -> torch.Tensor:
    """llama.cpp's logits (t, v) for tokens (t,), or a skip where its binding is not installed."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (pip install .[rivals])")
    model = llama_cpp.Llama(str(path), n_ctx=len(tokens), logits_all=True, verbose=False, n_threads=1)
    model.eval(tokens.tolist())
    return torch.tensor(model.scores[: len(tokens)])


@torch.no_grad()
@pytest.mark.parametrize("name", RECIPES)
def test_llama_cpp_logits_equal_ours(name, checkpoints, prompt, tmp_path):
    export(checkpoints[name], "gguf", tmp_path / "model.gguf")
    found = evaluated(tmp_path / "model.gguf", prompt[0])
    expected = obr.load(checkpoints[name], device="cpu")(prompt).logits[0]
    assert (found - expected).norm() / expected.norm() < 0.03  # it rounds activations to 8 bits


FAMILY_CONFIGS = {
    "llama 3, biases everywhere": FAMILIES["llama 3, biases everywhere"],
    "qwen2": Qwen2Config(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2),
    "qwen3": FAMILIES["qwen3, head_dim apart"],
}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_export_keeps_logits_of_other_families(name, prompt, tmp_path):
    checkpoint = random_model(FAMILY_CONFIGS[name], tmp_path / "c", prompt)
    expected = obr.load(checkpoint, device="cpu")(prompt).logits[0]
    export(checkpoint, "compressed-tensors", tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(model(prompt).logits[0], expected)
    assert "no tokenizer" in export(checkpoint, "gguf", tmp_path / "model.gguf")
    found = evaluated(tmp_path / "model.gguf", prompt[0])
    assert (found - expected).norm() / expected.norm() < 0.03


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi3, part of RoPE", "olmo2", "glm4", "cohere"])
def test_compressed_tensors_of_further_families_keep_logits(name, prompt, tmp_path):
    """Fused layers are written as one layer again."""
    checkpoint = random_model(FAMILIES[name], tmp_path / "c", prompt)
    expected = obr.load(checkpoint, device="cpu")(prompt).logits[0]
    export(checkpoint, "compressed-tensors", tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    found = model(prompt).logits[0]
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", EXPERTS)
def test_compressed_tensors_of_experts_have_the_names_of_the_models_files(name, prompt, tmp_path):
    """As llm-compressor writes them and vLLM reads them: each expert's layers apart, the router left alone."""
    checkpoint = random_model(EXPERTS[name], tmp_path / "c", prompt)
    options = {**EXPERTS[name].to_dict(), "vocab_size": 512, "num_hidden_layers": 2}
    options.pop("layer_types", None)
    AutoModelForCausalLM.from_config(type(EXPERTS[name])(**options)).save_pretrained(tmp_path / "plain")
    export(checkpoint, "compressed-tensors", tmp_path / "packed")
    files, names = TensorFiles(tmp_path / "packed"), set(TensorFiles(tmp_path / "plain").files)
    assert {re.sub("_(packed|scale|shape)$", "", tensor) for tensor in files.files} == names
    settings = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    router = "model.layers.1.block_sparse_moe.gate" if name == "mixtral" else "model.layers.1.mlp.gate"
    assert {"lm_head", router} <= set(settings["ignore"]) and f"{router}.weight" in files.files
    assert settings["config_groups"]["group_0"]["targets"] == ["Linear"]
    last = {"mixtral": "w2"}.get(name, "down_proj")
    expert = f"{router.removesuffix('gate')}experts.3.{last}"
    parts = files.read({part: f"{expert}.weight_{part}" for part in ("packed", "scale", "shape")})
    codes = unpack_from_int32(parts["packed"], 4, torch.Size(parts["shape"].tolist()))
    ours = obr.load(checkpoint, device="cpu").model.layers[1].mlp.experts.get_submodule("3").down_proj.weight
    assert torch.equal(codes * parts["scale"], ours)
    expected = obr.load(checkpoint, device="cpu")(prompt).logits
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)(prompt).logits
    assert torch.allclose(read, expected, atol=1e-3 * float(expected.abs().max()))
    with pytest.raises(ObrError, match="are not exported to GGUF"):
        export(checkpoint, "gguf", tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("rotation", "recipe", "form", "message"),
    [
        ("quarot", {"method": "rtn"}, "gguf", "computed at run time for every token"),
        ("quarot", {"method": "rtn"}, "compressed-tensors", "computed at run time for every token"),
        (None, {"method": "rtn", "activations": {"bits": 4}}, "compressed-tensors", "quantises activations"),
        (None, {"method": "rtn", "activations": {"bits": 8}}, "gguf", "quantises activations"),
        (None, {"method": "rtn", "keys": {"bits": 4}, "values": {"bits": 4}}, "gguf", "keys and values"),
        (None, {"method": "rtn"}, "onnx", "'onnx' is unknown; choose from compressed-tensors, gguf"),
    ],
)
def test_recipes_beyond_format_are_refused(rotation, recipe, form, message, tiny_folder, prompt, tmp_path):
    model = obr.load_model(tiny_folder / "model", device="cpu")
    if rotation:
        obr.rotate(model, rotation, seed=1)
    obr.save(obr.compress(model, prompt, recipe), tmp_path / "c")
    with pytest.raises(ObrError, match=message):
        export(tmp_path / "c", form, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_bias_that_models_of_the_family_lack_is_refused(tiny_folder, prompt, tmp_path):
    """Shifts of values leave one in o_proj."""
    model = obr.load_model(tiny_folder / "model", device="cpu")
    obr.save(obr.compress(model, prompt, {"method": "rtn"}, progress=False), tmp_path / "c")
    source = ExportSource(tmp_path / "c", Recipe.parse({"method": "rtn"}), "gguf")
    number, block = next(iter(source))
    block.self_attn.o_proj.bias = torch.nn.Parameter(torch.ones(96))
    with pytest.raises(
        ObrError, match=r"layers\.0\.self_attn\.o_proj has a bias that llama models have no place for"
    ):
        source._check(block, number)


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_activations_of_8_bits_a_token_are_exported(bits, tiny_folder, prompt, tmp_path):
    model = obr.load_model(tiny_folder / "model", device="cpu")
    recipe = {"method": "rtn", "bits": bits, "activations": {"bits": 8}}
    obr.save(obr.compress(model, prompt, recipe, progress=False), tmp_path / "c")
    assert "in bytes" in export(tmp_path / "c", "compressed-tensors", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = settings["config_groups"].values()
    assert settings["format"] == "int-quantized" and group["weights"]["num_bits"] == bits
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)
    ours, back = obr.load(tmp_path / "c", device="cpu"), obr.load(tmp_path / "out", device="cpu")
    assert back.obr_recipe.setting == f"W{bits}A8KV16"
    assert torch.equal(back(prompt).logits, ours(prompt).logits)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = ours(prompt).logits
    plain = obr.load(tmp_path / "c", {"method": "rtn", "bits": bits}, device="cpu")(prompt).logits
    # compressed-tensors divides by half of 255, this package by 127: inputs differ by steps of 8 bits.
    assert (theirs(prompt).logits - expected).norm() < 1.5 * (plain - expected).norm()


@pytest.mark.parametrize("recipe", [{"method": "rtn"}, {"method": "magnitude"}, {"method": "rtn", "bits": 3}])
def test_configurations_say_nothing_that_readers_refuse(recipe, tiny_folder, prompt, tmp_path):
    """vLLM refuses a configuration of sparsity, and keys that it does not know."""
    model = obr.load_model(tiny_folder / "model", device="cpu")
    obr.save(obr.compress(model, prompt, recipe, progress=False), tmp_path / "c")
    export(tmp_path / "c", "compressed-tensors", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(settings) <= {
        "quant_method", "format", "config_groups", "ignore", "quantization_status", "version",
    }  # fmt: skip
    assert "sparsity" not in json.dumps(settings)


def test_compressed_tensors_says_which_widths_transformers_4_misreads(checkpoints, tmp_path):
    said = export(checkpoints["3 bits, first block"], "compressed-tensors", tmp_path / "mixed")
    assert said.endswith("Layers of 3 bits need transformers 5; version 4 reads them wrongly.")
    assert export(checkpoints["unstructured"], "compressed-tensors", tmp_path / "plain").endswith(" MB in all.")


def test_gguf_says_what_becomes_of_other_widths(checkpoints, tmp_path):
    said = export(checkpoints["3 bits, first block"], "gguf", tmp_path / "model.gguf")
    assert "7 layers of 3 bits take 4.5 bits a weight, since GGUF has no such codes" in said
    assert "since GGUF" not in export(checkpoints["unstructured"], "gguf", tmp_path / "other.gguf")


@torch.no_grad()
def test_the_command_exports_weights_alone_where_told(tiny_folder, prompt, tmp_path, capsys):
    model = obr.load_model(tiny_folder / "model", device="cpu")
    obr.save(obr.compress(model, prompt, {"method": "rtn", "activations": {"bits": 4}}), tmp_path / "c")
    command = ["export", str(tmp_path / "c"), "--format", "compressed-tensors", "--out", str(tmp_path / "out")]
    assert main(command) == 1 and "--weights-only" in capsys.readouterr().err
    assert main([*command, "--weights-only"]) == 0 and "14 layers" in capsys.readouterr().out
    plain = obr.load(tmp_path / "c", {"method": "rtn"}, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(model(prompt).logits, plain(prompt).logits)


def test_families_and_sizes_that_gguf_lacks_are_refused(prompt, tmp_path):
    checkpoint = random_model(FAMILIES["gemma"], tmp_path / "c", prompt)
    with pytest.raises(ObrError, match="'gemma' are not exported"):
        export(checkpoint, "gguf", tmp_path / "out")
    checkpoint = random_model(FAMILIES["llama, tied, 9 heads"], tmp_path / "d", prompt)
    with pytest.raises(ObrError, match="144 columns are no whole number"):
        export(checkpoint, "gguf", tmp_path / "out")
    with pytest.raises(ObrError, match="is a folder; give the name of a file"):
        export(checkpoint, "gguf", tmp_path)


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
WITHOUT_A_PLACE = {
    "frequencies of qwen2": (
        Qwen2Config(**SIZES, rope_parameters=LINEAR), "type linear have no place .* for qwen2",
    ),
    "frequencies of qwen3": (
        Qwen3Config(**SIZES, head_dim=16, rope_parameters=LINEAR), "type linear have no place .* for qwen3",
    ),
    "biases of qwen3": (Qwen3Config(**SIZES, head_dim=16, attention_bias=True), "biases, which llama.cpp's qwen3"),
    "both directions": (LlamaConfig(**SIZES, is_causal=False), "attention is not causal"),
}  # fmt: skip


@pytest.mark.parametrize("setting", WITHOUT_A_PLACE)
def test_settings_that_llama_cpp_does_not_obey_are_refused(setting, prompt, tmp_path):
    config, message = WITHOUT_A_PLACE[setting]
    with pytest.raises(ObrError, match=message):
        export(random_model(config, tmp_path / "c", prompt), "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
