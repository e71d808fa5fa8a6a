"""Checkpoints of other programs mean here what their formats say, stage by stage; others are refused by name."""

import json
import shutil

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import obr
from helpers import external_checkpoints as external
from helpers.gguf_files import write_gguf
from obr.checkpoints.external.stage import import_external
from obr.checkpoints.external.words import unpack_words, words_for
from obr.checkpoints.released.download import download_released
from obr.checkpoints.verify import verify_checkpoint
from obr.cli.main import main
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.export.dispatch import export
from obr.models.loading import load_tokenizer

WEIGHTS_ALONE = {"method": "external"}


@pytest.fixture(scope="module")
def model(tiny_folder):
    return tiny_folder / "model"


@pytest.fixture(scope="module")
def windows(tiny_folder, model):
    tokens = load_tokenizer(model)((tiny_folder / "heldout.txt").read_text(), verbose=False)["input_ids"]
    return torch.tensor([tokens[:120]]).view(2, 60)


def layer(number: int, name: str) -> str:
    return f"model.layers.{number}.{name}"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_words_are_those_of_compressed_tensors(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, 75), dtype=torch.int8)
    words = pack_to_int32(codes, bits)
    assert words.shape[1] == words_for(75, bits)
    assert torch.equal(unpack_words(words, bits, 75).int() - 2 ** (bits - 1), codes.int())


@pytest.mark.parametrize("case", external.CASES)
def test_weights_are_those_that_the_format_means(case, model, windows, tmp_path):
    meant = external.write(model, tmp_path / "c", case)
    loaded = obr.load(tmp_path / "c", WEIGHTS_ALONE if "floats, channel" in case else None, device="cpu")
    for name, weight in meant.items():
        assert torch.equal(loaded.get_parameter(name), weight), name
    _, _, bits, group = external.CASES[case]
    assert (loaded.obr_recipe.bits, loaded.obr_recipe.group) == (bits, group)
    plain = obr.load_model(model, device="cpu")
    plain.load_state_dict(meant | {"lm_head.weight": meant["model.embed_tokens.weight"]})
    if case == "integers":  # whose inputs are quantised as well
        assert obr.perplexity(loaded, windows) != obr.perplexity(plain, windows)
    else:
        assert obr.perplexity(loaded, windows) == obr.perplexity(plain, windows)


def test_gguf_equals_what_transformers_reads(windows, model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    for place in (path, tmp_path):
        ours = obr.load(place, device="cpu")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
        for name, weight in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], weight), name
    assert ours.obr_recipe.setting == "W8A16KV16" and ours.config.rms_norm_eps == 1e-5
    assert load_tokenizer(path)("ab")["input_ids"] == [62]
    write_gguf(tmp_path / "n.gguf")
    with pytest.raises(ObrError, match="has 2 GGUF files; name one"):
        obr.load(tmp_path)


def test_gguf_of_unknown_tensors_or_architectures_is_refused(tmp_path):
    extra = write_gguf(
        tmp_path / "a.gguf", lambda writer: writer.add_tensor("rope_freqs.weight", torch.ones(16).numpy())
    )
    with pytest.raises(ObrError, match="has the tensor rope_freqs"):
        obr.load(extra)
    cut = write_gguf(tmp_path / "b.gguf", without="blk.0.attn_v.weight")
    with pytest.raises(ObrError, match="lacks 1 tensors"):
        obr.load(cut)
    narrow = write_gguf(tmp_path / "d.gguf", lambda writer: writer.add_rope_dimension_count(16))
    with pytest.raises(
        ObrError, match=r"q_proj is no layer of GGUF: a weight \[64, 64\], by the model's sizes \[32, 64\]"
    ):
        obr.load(narrow)
    (tmp_path / "c.gguf").write_bytes(extra.read_bytes()[:400])
    with pytest.raises(ObrError, match="cannot be read as a GGUF language model"):
        obr.load(tmp_path / "c.gguf")


REFUSED = {
    "method": ("packed 4", {"quant_method": "bitsandbytes"}, "quantised by 'bitsandbytes', whose format is not read"),
    "planar": ("gptq 3", {"checkpoint_format": "gptq_p"}, "GPTQ's checkpoint_format 'gptq_p'"),
    "gemv": ("awq", {"version": "gemv"}, "AWQ's version 'gemv'"),
    "marlin": ("packed 4", {"format": "marlin-24"}, "compressed-tensors' format marlin-24"),
    "sparse": ("2:4", {"sparsity_config": {"format": "sparse-x"}}, "sparse format sparse-x"),
    "round": ("auto-round, gptq", {"packing_format": "auto_round:nv_fp4"}, "packing_format 'auto_round:nv_fp4'"),
    "scheme": ("packed 4", {"config_groups": {}}, "no group of quantization_config names it"),
    "float 4": ("packed 4", external.scheme("pack-quantized", type="float"), "float of 4 bits, which are not read"),
    "transform": ("packed 4", {"transform_config": {"config_groups": {"u": {}}}}, "transforms at run time"),
    "cache": ("packed 4", {"kv_cache_scheme": external.PER_TOKEN_FLOAT}, "the KV cache .float of 8 bits, dynamic"),
    "inputs": ("floats, channel", {}, "inputs of layers .float of 8 bits, dynamic, per token.*method=external"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_formats_that_are_not_read_are_refused_by_name(reason, model, tmp_path):
    case, config, message = REFUSED[reason]
    external.write(model, tmp_path / "c", case, config)
    with pytest.raises(ObrError, match=message):
        obr.load(tmp_path / "c", device="cpu")


Q = "model.layers.1.self_attn.q_proj"
BROKEN = {
    "scales": ("packed 4", f"{Q}.weight_scale", lambda t: t * torch.nan, "scales or values that are not finite"),
    "missing": ("packed 4", f"{Q}.weight_scale", lambda t: t[:5].clone(), "scales for 96 x 96 weights"),
    "words": ("packed 4", f"{Q}.weight_packed", lambda t: t[:, :5].clone(), "5 words of torch.int32 for 96 columns"),
    "shape": ("packed 4", f"{Q}.weight_shape", lambda t: t + 1, r"weight_shape \[97, 97\], by config.json"),
    "codes": ("gptq 4, ordered", f"{Q}.qweight", lambda t: t[:7].clone(), "codes of 7 x 96 words"),
    "zeros": ("awq", f"{Q}.qzeros", lambda t: t[:, :3].clone(), "zero points of"),
    "group": ("gptq 4, ordered", f"{Q}.g_idx", lambda t: t + 9, "columns of group 11 of 3"),
    "order": ("gptq 4, ordered", f"{Q}.g_idx", lambda t: None, "an order of their own, but no g_idx"),
    "order, zeros": ("gptq 4, ordered", f"{Q}.g_idx", torch.zeros_like, "an order of their own, but no g_idx"),
    "order, packed": ("packed 3, groups in order", f"{Q}.weight_g_idx", lambda t: None, "but no g_idx"),
    "order, in part": (
        "packed 3, groups in order", f"{Q}.weight_g_idx", lambda t: t.index_fill(0, torch.tensor([3]), -1),
        "columns without a group",
    ),
    "gone": ("gptq 4, ordered", f"{Q}.scales", lambda t: None, "has no .*q_proj.scales"),
    "mask": ("2:4", f"{Q}.bitmask", lambda t: t | 1, "places for .* values"),
}  # fmt: skip
UNORDERED = {"zeros": ("auto-round, gptq", "g_idx", 0), "minus one": ("packed 3, groups", "weight_g_idx", -1)}


@pytest.mark.parametrize("form", UNORDERED)
def test_orders_that_are_not_filled_in_are_consecutive_groups(form, model, tmp_path):
    case, name, value = UNORDERED[form]
    meant = external.write(model, tmp_path / "c", case)
    external.change(tmp_path / "c", f"{Q}.{name}", lambda t: torch.full((96,), value, dtype=torch.int32))
    loaded = obr.load(tmp_path / "c", device="cpu")
    assert torch.equal(loaded.get_parameter(f"{Q}.weight"), meant[f"{Q}.weight"])


def test_groups_that_name_a_layer_closest_describe_it(model, tmp_path):
    meant = external.write(model, tmp_path / "c", "packed 3, groups")
    path = tmp_path / "c" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = groups["group_0"] | {"targets": [r"re:.*_proj$"]}
    groups["group_0"] = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
    path.write_text(json.dumps(config), encoding="utf-8")
    loaded = obr.load(tmp_path / "c", device="cpu")
    assert torch.equal(loaded.get_parameter(f"{Q}.weight"), meant[f"{Q}.weight"])


@pytest.mark.parametrize("reason", BROKEN)
def test_layers_that_contradict_themselves_are_refused(reason, model, tmp_path):
    case, name, to, message = BROKEN[reason]
    external.write(model, tmp_path / "c", case)
    external.change(tmp_path / "c", name, to)
    with pytest.raises(ObrError, match=message):
        obr.load(tmp_path / "c", device="cpu")


def adopted(model, tmp_path, case, recipe, source=None):
    """The manifest of a checkpoint that the stages have taken over, in tmp_path / "out"."""
    download_released({"source": "path", "path": str(source or tmp_path / "c")}, tmp_path / "r", rerun=True)
    recipe = Recipe.parse({"method": "external", **recipe})
    return import_external(model, tmp_path / "r", recipe, tmp_path / "out")


ADOPTED = {
    "gptq 4, ordered": ({"bits": 4, "group": 32}, 4 + (16 + 4) / 32, 0.0),
    "packed 4": ({"bits": 4}, 4.0, 0.0),
    "2:4": ({"bits": 16, "pattern": "2:4"}, 16 / 2 + 1, 0.5),
    "2:4, integers": ({"bits": 8, "pattern": "2:4"}, 8 / 2 + 1, 0.5),
    "bitmask": ({"bits": 16, "sparsity": 0.5}, 16 / 2 + 1, 0.5),
}


@pytest.mark.parametrize("case", ADOPTED)
def test_adopted_checkpoints_have_their_own_bits_zeros_and_bytes(case, model, windows, tmp_path):
    recipe, bits, sparsity = ADOPTED[case]
    meant = external.write(model, tmp_path / "c", case)
    (tmp_path / "c" / "made.json").write_text(json.dumps({"program": "p", "seconds": 12.5}))
    manifest = adopted(model, tmp_path, case, recipe)
    linear = {name: weight for name, weight in meant.items() if "_proj" in name}
    zeros = sum(int((weight == 0).sum()) for weight in linear.values()) / sum(w.numel() for w in linear.values())
    assert manifest["bits_per_weight"]["theoretical"] == pytest.approx(bits, abs=0.05)
    assert manifest["zeros"] == pytest.approx(zeros) and manifest["sparsity"] == pytest.approx(sparsity, abs=0.02)
    assert manifest["file_bytes"] == (tmp_path / "c" / "model.safetensors").stat().st_size
    stored = load_file(tmp_path / "c" / "model.safetensors")
    assert manifest["linear_bytes"] == sum(t.nbytes for name, t in stored.items() if "_proj" in name)
    assert manifest["seconds"] == 12.5 and manifest["external"]["made"]["program"] == "p"
    assert verify_checkpoint(tmp_path / "out") == []
    loaded = obr.load(tmp_path / "out", device="cpu")
    assert torch.equal(loaded.get_parameter(layer(0, "mlp.up_proj.weight")), meant[layer(0, "mlp.up_proj.weight")])
    assert obr.perplexity(loaded, windows) == obr.perplexity(obr.load(tmp_path / "c", device="cpu"), windows)
    external.change(tmp_path / "c", layer(0, "input_layernorm.weight"), lambda t: t * 2)
    with pytest.raises(ObrError, match="not the file that it was made from"):
        obr.load(tmp_path / "out", device="cpu")


def test_a_gguf_file_is_adopted_too(model, tiny_folder, windows, tmp_path):
    plain = obr.load_model(model, device="cpu")
    obr.save(
        obr.compress(plain, windows, {"method": "rtn"}, progress=False), tmp_path / "ours", load_tokenizer(model)
    )
    command = ["export", str(tmp_path / "ours"), "--format", "gguf", "--out", str(tmp_path / "m.gguf")]
    assert main(command) == 0
    manifest = adopted(model, tmp_path, "", {"bits": 4}, tmp_path / "m.gguf")
    assert manifest["bits_per_weight"] == {"theoretical": 4.5, "file": 4.5}
    assert manifest["file_bytes"] == (tmp_path / "m.gguf").stat().st_size and manifest["seconds"] is None
    assert verify_checkpoint(tmp_path / "out") == []
    expected = obr.perplexity(obr.load(tmp_path / "ours", device="cpu"), windows)
    assert obr.perplexity(obr.load(tmp_path / "out", device="cpu"), windows) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("case", "recipe", "message"),
    [
        ("packed 4", {"bits": 3}, "'bits': 3, 'group': None.*which has .*'bits': 4"),
        ("awq", {"bits": 4, "group": 64}, "which has .*'group': 32"),
        ("packed 4", {"bits": 4, "sparsity": 0.5}, "% zeros, the recipe's sparsity is 0.5"),
        ("bitmask", {"bits": 16, "pattern": "2:4"}, "keeps more weights in a group"),
    ],
)
def test_recipes_that_misstate_a_checkpoint_are_refused(case, recipe, message, model, tmp_path):
    external.write(model, tmp_path / "c", case)
    with pytest.raises(ObrError, match=message):
        adopted(model, tmp_path, case, recipe)


def test_a_checkpoint_of_another_model_is_refused(model, tmp_path):
    external.write(model, tmp_path / "c", "packed 4")
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ObrError, match=r"lacks 1 tensors|tie_word_embeddings"):
        adopted(other, tmp_path, "packed 4", {"bits": 4})


def test_the_command_evaluates_a_folder_of_another_program(model, tiny_folder, tmp_path, capsys):
    external.write(model, tmp_path / "c", "awq")
    text = tmp_path / "t.txt"
    text.write_text((tiny_folder / "heldout.txt").read_text()[:2000])
    command = ["evaluate", str(tmp_path / "c"), "--texts", str(text), "--seqlen", "64", "--out", str(tmp_path / "s")]
    assert main(command) == 0 and "perplexity" in capsys.readouterr().out
    found = json.loads((tmp_path / "s").read_text())
    assert found["setting"] == "W4g32A16KV16" and found["perplexity"]["t"]["value"] > 1
    assert main(command) == 0
    assert json.loads((tmp_path / "s").read_text())["computed"] == []


@pytest.mark.parametrize("form", ["compressed-tensors", "gguf"])
def test_perplexity_of_models_that_transformers_dequantises(form, model, windows, tmp_path):
    if form == "gguf":
        write_gguf(tmp_path / "m.gguf")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
        ours, tokens = obr.load(tmp_path / "m.gguf", device="cpu"), windows % 64
    else:
        rounded = obr.compress(obr.load_model(model, device="cpu"), windows, {"method": "rtn"}, progress=False)
        obr.save(rounded, tmp_path / "ours")
        export(tmp_path / "ours", form, tmp_path / "c")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32)
        ours, tokens = obr.load(tmp_path / "c", device="cpu"), windows
    assert obr.perplexity(theirs, tokens) == pytest.approx(obr.perplexity(ours, tokens), rel=1e-5)
    with pytest.raises(ObrError, match="quantised already"):
        obr.compress(theirs, tokens, {"method": "rtn"}, progress=False)


def test_folders_of_other_programs_are_refused_by_obr_load(model, tmp_path):
    with pytest.raises(ObrError, match=r"is no packed checkpoint.*plain model with obr\.load_model"):
        obr.load(model)
    external.write(model, tmp_path / "c", "awq")
    with pytest.raises(ObrError, match="no packed form"):
        obr.load(tmp_path / "c", packed=True)
    with pytest.raises(ObrError, match="obr evaluate read what other programs quantised"):
        obr.load_model(tmp_path / "c")
