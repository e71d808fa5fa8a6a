"""Settings of other programs' checkpoints against their tensors and files: what contradicts is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file

import obr
from helpers import external_checkpoints as external
from obr.errors import ObrError

WEIGHTS_ALONE = {"method": "external"}
Q = "model.layers.1.self_attn.q_proj"
GROUPED = {"num_bits": 3, "strategy": "group", "group_size": 32}
BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block"}
SYMMETRIC = {"num_bits": 4, "symmetric": True}


@pytest.fixture(scope="module")
def model(tiny_folder):
    return tiny_folder / "model"


SETTINGS = {
    "bits": ("gptq 4, ordered", {"bits": 8}, "codes of 4 bits, but 8 by quantization_config"),
    "bits of AWQ": ("awq", {"bits": 8}, "codes of 4 bits, but 8 by quantization_config"),
    "group size": ("gptq 4, ordered", {"group_size": 48}, r"groups, but . by quantization_config .group_size 48"),
    "groups, but none said": ("gptq 4, ordered", {"group_size": -1}, "groups, but 1 by quantization_config"),
    "symmetric": ("gptq 4, ordered", {"sym": True}, "zero points other than 8, though .* says sym: true"),
    "symmetric AWQ": ("awq", {"sym": True}, "zero points other than 8, though .* says sym: true"),
    "no zero points": ("awq", {"zero_point": False}, "AWQ without zero points"),
    "order": ("gptq 4, ordered", {"desc_act": False}, "order of their own, though .* says that they are not"),
    "order, packed": (
        "packed 3, groups in order", external.scheme("pack-quantized", **GROUPED, actorder="static"),
        "order of their own, though .* says that they are not",
    ),
    "order, dynamic": (
        "packed 3, groups", external.scheme("pack-quantized", **GROUPED, actorder="dynamic"), "but no g_idx",
    ),
    "symmetric, packed": (
        "packed 4", external.scheme("pack-quantized", **SYMMETRIC), "zero points, though .* says symmetric: true",
    ),
    "asymmetric": (
        "integers", external.scheme("int-quantized", num_bits=8, symmetric=False), "no zero points, though",
    ),
    "blocks": (
        "floats, block", external.scheme("float-quantized", **BLOCKS, block_structure=[64, 96]),
        "scales for blocks of 64 x 96 weights",
    ),
    "ignored": ("packed 4", {"ignore": ["lm_head", r"re:.*q_proj$"]}, "quantised, though .* ignores it"),
    "rotated": ("gptq 4, ordered", {"rotation": "hadamard"}, "rotation in .* rotates the model"),
    "adapter": ("gptq 4, ordered", {"adapter": {"rank": 8}}, "adds an adapter"),
    "inputs of AutoRound": ("auto-round, gptq", {"act_bits": 8}, "inputs of layers .AutoRound's act_bits 8"),
    "floats of AutoRound": ("auto-round, gptq", {"data_type": "mx_fp"}, "AutoRound's data_type 'mx_fp'"),
}  # fmt: skip


@pytest.mark.parametrize("reason", SETTINGS)
def test_settings_that_contradict_the_tensors_are_refused(reason, model, tmp_path):
    case, config, message = SETTINGS[reason]
    external.write(model, tmp_path / "c", case, config)
    with pytest.raises(ObrError, match=message):
        obr.load(tmp_path / "c", device="cpu")


def in_words(codes, dtype):
    """The codes of GPTQ in words of another length."""
    return codes.T.contiguous().view(dtype).T.contiguous()


TENSORS = {
    "stored twice": ("gptq 4, ordered", "weight", lambda t: torch.ones(96, 96), "a second time, as .weight"),
    "packed and plain": (
        "packed 4", "weight", lambda t: torch.ones(96, 96, dtype=torch.int8), "stored as weight_packed and weight",
    ),
    "not packed": ("packed 4", "weight_packed", lambda t: None, "codes are stored as nothing"),
    "no scale": ("packed 4", "weight_scale", lambda t: None, "no weight_scale"),
    "no zero points": ("packed 4", "weight_zero_point", lambda t: None, "no zero points, though"),
    "not rounded": ("integers", "weight", lambda t: t.bfloat16(), "stored as BF16, not as I8"),
    "unsigned": ("integers", "weight", lambda t: t.view(torch.uint8), "stored as U8, not as I8"),
    "whole scales": ("integers", "weight_scale", lambda t: t.to(torch.uint8), "stored as U8, not as F16"),
    "scales of inputs": ("packed 4", "input_scale", lambda t: torch.ones(1), "input_scale, though no group"),
    "scales of outputs": ("packed 4", "output_scale", lambda t: torch.ones(1), "output_scale, though no group"),
    "scales of keys": ("packed 4", "k_scale", lambda t: torch.ones(1), "1 tensors that llama models .* do not have"),
    "bias": ("gptq 4, ordered", "bias", lambda t: torch.zeros(96), "1 tensors that llama models .* do not have"),
    "shape of a mask": ("2:4", "shape", lambda t: t.flip(0) + 1, r"shape \[97, 97\], by config.json"),
    "rows of a mask": ("bitmask", "row_offsets", lambda t: torch.arange(96), "other rows than row_offsets says"),
    "short order": ("gptq 4, ordered", "g_idx", lambda t: t[:95].clone(), r"g_idx of shape \[95\] for 96 columns"),
    "long words": (
        "gptq 4, ordered", "qweight", lambda t: in_words(t, torch.int64), "qweight is stored as I64",
    ),
    "short words": (
        "gptq 4, ordered", "qweight", lambda t: in_words(t, torch.int16), "qweight is stored as I16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", TENSORS)
def test_tensors_that_the_settings_do_not_account_for_are_refused(reason, model, tmp_path):
    case, end, to, message = TENSORS[reason]
    external.write(model, tmp_path / "c", case)
    name = f"{Q.removesuffix('.q_proj')}.k_scale" if end == "k_scale" else f"{Q}.{end}"
    external.change(tmp_path / "c", name, to)
    with pytest.raises(ObrError, match=message):
        obr.load(tmp_path / "c", WEIGHTS_ALONE if case == "integers" else None, device="cpu")


def left_plain(model, folder, config):
    """A checkpoint with inputs of 8 bits, one layer of which is as it was."""
    external.write(model, folder, "integers", config)
    external.change(folder, f"{Q}.weight_scale", lambda t: None)
    external.change(folder, f"{Q}.weight", lambda t: load_file(model / "model.safetensors")[f"{Q}.weight"])


def test_a_layer_left_plain_is_named_in_ignore_and_has_plain_inputs(model, tmp_path):
    left_plain(model, tmp_path / "a", {})
    with pytest.raises(ObrError, match="not quantised, though a group of quantization_config names it"):
        obr.load(tmp_path / "a", device="cpu")
    left_plain(model, tmp_path / "b", {"ignore": ["lm_head", Q]})
    with pytest.raises(ObrError, match=f"inputs of layers, without those of {Q}"):
        obr.load(tmp_path / "b", device="cpu")
    alone = obr.load(tmp_path / "b", WEIGHTS_ALONE, device="cpu")
    assert torch.equal(alone.get_parameter(f"{Q}.weight"), obr.load_model(model).get_parameter(f"{Q}.weight"))


def test_plain_weights_are_no_quantised_checkpoint(model, tmp_path):
    external.write(model, tmp_path / "c", "packed 4")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "c" / name).write_bytes((model / name).read_bytes())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "c/config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ObrError, match="no quantised layer, though quantization_config says gptq: remove that key"):
        obr.load(tmp_path / "c", device="cpu")


BESIDE = {
    "adapter": ("adapter_config.json", {}, "merge the adapter first"),
    "contradicting note": ("quantize_config.json", {"bits": 8}, "bits is 4 in config.json and 8 in quantize_config"),
    "other spelling": ("quant_config.json", {"q_group_size": 64}, "group_size is 32 in config.json and 64 in quant_"),
    "another program": ("hf_quant_config.json", {}, "choose the full-precision original"),
    "distributed": ("shard-00001-model-00001-of-00001.safetensors", {}, "which transformers reads instead of"),
}


@pytest.mark.parametrize("reason", BESIDE)
def test_files_beside_a_checkpoint_that_change_its_meaning_are_refused(reason, model, tmp_path):
    name, contents, message = BESIDE[reason]
    external.write(model, tmp_path / "c", "gptq 4, ordered")
    (tmp_path / "c" / name).write_text(json.dumps(contents), encoding="utf-8")
    with pytest.raises(ObrError, match=message):
        obr.load(tmp_path / "c", device="cpu")


def test_a_note_that_agrees_and_settings_by_layer_are_read(model, tmp_path):
    meant = external.write(
        model, tmp_path / "c", "gptq 4, ordered", {"bits": 8, "dynamic": {r".*_proj": {"bits": 4}}}
    )
    note = {"bits": 8, "group_size": 32, "desc_act": True, "damp_percent": 0.01}
    (tmp_path / "c/quantize_config.json").write_text(json.dumps(note), encoding="utf-8")
    loaded = obr.load(tmp_path / "c", device="cpu")
    assert torch.equal(loaded.get_parameter(f"{Q}.weight"), meant[f"{Q}.weight"])
