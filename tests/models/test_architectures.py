"""Families: fused layers taken apart, families that take no rotation, and one that is added at run time."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config

import obr
from helpers.family_models import EXPERTS, FAMILIES, RELATIVES, TOKENS, random_model
from obr.checkpoints.verify import verify_checkpoint
from obr.compression.stage import compress_stage
from obr.config.model_sizes import sizes_of
from obr.config.recipe import Recipe
from obr.models import architectures
from obr.models.architectures import Layout
from obr.models.blocks import StreamedBlocks, run_block
from obr.models.split import FusedLinear
from obr.report.table_notes import Evidence, _rotation_notes
from obr.rotations import obtain, registry
from obr.rotations.learning.registry import learn_rotation


def streamed_logits(folder, **options):
    blocks = StreamedBlocks(folder, dtype=torch.float32, device="cpu", **options)
    hidden, arguments = blocks.embed(TOKENS)
    for index in range(len(blocks)):
        block = blocks.load(index)
        hidden = [run_block(block, states, arguments[index]) for states in hidden]
    return blocks.logits(torch.cat(list(hidden)))


def test_fused_layers_are_parts_that_compute_the_same(tmp_path):
    model = random_model(FAMILIES["phi3, part of RoPE"], torch.float32)
    before, fused = model(TOKENS).logits, model.model.layers[0].self_attn.qkv_proj.weight.clone()
    obr.compress(model, None, {"method": "rtn", "bits": 8}, progress=False)
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.qkv_proj, FusedLinear)
    parts = [attention.qkv_proj.get_submodule(name).weight for name in ("q_proj", "k_proj", "v_proj")]
    assert [len(part) for part in parts] == [64, 32, 32]
    assert torch.allclose(torch.cat(parts), fused, atol=0.01 * float(fused.abs().max()))
    assert (model(TOKENS).logits - before).norm() < 0.1 * before.norm()
    obr.save(model, tmp_path)
    assert torch.equal(obr.load(tmp_path, device="cpu")(TOKENS).logits, model(TOKENS).logits)
    rows = (tmp_path / "layers.csv").read_text()
    assert rows.count("self_attn.qkv_proj.k_proj") == 2 and rows.count("mlp.gate_up_proj.up_proj") == 2


def test_a_fused_layer_of_other_sizes_is_refused(tmp_path):
    random_model(FAMILIES["phi3, part of RoPE"], torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
    with pytest.raises(obr.ObrError, match=r"qkv_proj.v_proj.weight is 48 x 64, by config.json it should be 16 x 64"):
        StreamedBlocks(tmp_path)


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "cohere"])
def test_a_family_that_takes_no_rotation_is_compressed_without_and_says_so(family, tmp_path, capsys):
    model = random_model(FAMILIES[family], torch.float32)
    model.save_pretrained(tmp_path / "model")
    rotation = tmp_path / "rotation.safetensors"
    obtain.make({"kind": "quarot"}, tmp_path / "model", rotation)
    assert f"quarot is not applied to {family} models: it" in capsys.readouterr().err
    recipe = Recipe.parse({"method": "rtn", "bits": 8, "rotation": "quarot"})
    manifest = compress_stage(tmp_path / "model", recipe, tmp_path / "packed", rotation=rotation, device="cpu")
    about = manifest["rotation"]
    assert about["kind"] == "none" and about["asked"] == "quarot" and not about["folded"] and not about["online"]
    notes = _rotation_notes(Evidence(manifests={("Model", "row 1"): manifest, ("Model", "row 2"): manifest}))
    assert notes == [f"Not rotated: Model in row 1, row 2, whose recipes ask for quarot; {about['reason']}."]
    before = model(TOKENS).logits
    obr.rotate(model, "ostquant")
    assert torch.allclose(model(TOKENS).logits, before, atol=1e-4 * float(before.abs().max()))
    assert model.obr_rotation.about()["asked"] == "ostquant"


def test_a_learned_rotation_that_a_family_does_not_take_is_left_out(tmp_path):
    random_model(FAMILIES["olmo2"], torch.float32).save_pretrained(tmp_path / "model")
    entry = {"kind": "spinquant", "learn": {"calibration": "c"}}
    rotation = learn_rotation(entry, tmp_path / "model", tmp_path / "no windows", tmp_path / "r.safetensors", "cpu")
    assert rotation.about()["asked"] == "spinquant"
    assert (tmp_path / "r.csv").read_text() == "step,loss\n"


EVERY = {**FAMILIES, **RELATIVES, **EXPERTS}
SAVED = ("llama", "glm4", "phi3, part of RoPE", "mixtral", "olmoe", "qwen3_moe, a dense block", "deepseek_v3")
RENAMED = ("glm4", "phi3, part of RoPE", "mixtral")


@pytest.mark.parametrize("family", SAVED)
def test_plain_folders_are_read_again_or_refused_where_names_differ(family, tmp_path):
    """transformers would draw at random what it finds under no name that it knows."""
    model = random_model(EVERY[family], torch.float32)
    model.save_pretrained(tmp_path / "model")
    compress_stage(tmp_path / "model", Recipe.parse({"method": "dense"}), tmp_path / "dense", device="cpu")
    compressed = obr.compress(model, None, {"method": "rtn", "bits": 8}, progress=False)
    for number, made in enumerate((obr.load(tmp_path / "dense", device="cpu"), compressed)):
        if family in RENAMED:
            with pytest.raises(obr.ObrError, match=r"cannot keep this model's .* layers taken apart"):
                made.save_pretrained(tmp_path / str(number))
            continue
        made.save_pretrained(tmp_path / str(number))
        reread = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), dtype=torch.float32)
        assert torch.allclose(reread(TOKENS).logits, made(TOKENS).logits, atol=1e-4)  # sums of experts in any order


TWICE = {
    "phi3, part of RoPE": ("mlp.gate_up_proj.gate_proj.weight", (96, 64)),
    "mixtral": ("mlp.experts.0.gate_proj.weight", (96, 64)),
    "olmoe": ("mlp.experts.gate_up_proj", (8, 64, 64)),
}


@pytest.mark.parametrize("family", TWICE)
def test_layers_that_a_file_has_fused_and_apart_are_refused(family, tmp_path):
    name, shape = TWICE[family]
    random_model(EVERY[family], torch.float32).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"model.layers.1.{name}"] = torch.ones(shape)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for read in (lambda: StreamedBlocks(tmp_path), lambda: obr.load_model(tmp_path)):
        with pytest.raises(obr.ObrError, match=r"has both \S+ and \S+, of which one would be left out"):
            read()


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "glm4", "cohere"])
def test_layers_whose_outputs_are_normalised_do_not_pay_back_what_the_stream_lacks(family):
    def compressed(**options):
        model = random_model(FAMILIES[family], torch.float32)
        return obr.compress(model, TOKENS, {"method": "gptq", **options}, progress=False)

    with pytest.raises(obr.ObrError, match="are not added to the residual stream one after the other"):
        compressed(residual=0.5)
    errors = {layer.layer: layer.relative_error for layer in compressed(asymmetry=0.5).obr_report.layers}
    assert max(errors.values()) < 0.5


@pytest.mark.parametrize("family", RELATIVES)
def test_relatives_of_families_are_streamed_rotated_and_read_again(family, tmp_path):
    model = random_model(RELATIVES[family], torch.float32)
    model.save_pretrained(tmp_path / "model")
    before = model(TOKENS).logits
    near = 1e-3 * float(before.abs().max())
    dimensions = architectures.Dimensions.of(model.config)
    for kind in ("quarot", "flatquant"):
        rotation = registry.draw(kind, dimensions, 3)
        assert (rotation.kind == kind) == (kind in architectures.FAMILIES[model.config.model_type].rotations)
        assert torch.allclose(streamed_logits(tmp_path / "model", rotation=rotation), before, atol=near)
    obr.rotate(model, "quarot", seed=3)
    assert torch.allclose(model(TOKENS).logits, before, atol=near)
    obr.compress(model, TOKENS, {"method": "obr_gptq"}, progress=False)
    obr.save(model, tmp_path / "packed")
    assert verify_checkpoint(tmp_path / "packed") == []
    assert torch.equal(obr.load(tmp_path / "packed", device="cpu")(TOKENS).logits, model(TOKENS).logits)


# The width of a head of latent attention has settings of its own.
@pytest.mark.parametrize("family", [name for name, layout in architectures.FAMILIES.items() if not layout.latent])
def test_families_have_the_head_dim_of_transformers(family):
    """Where config.json has none: read without transformers, from the entry alone."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    heads = {"hidden_size": 384, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = CONFIG_MAPPING[family](**heads)
    raw = {**heads, "model_type": family, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    found = sizes_of(architectures.with_defaults(raw), "m").head_dim
    assert found == architectures.Dimensions.of(config).head_dim


class MineConfig(LlamaConfig):
    model_type = "mine"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig


def test_a_family_is_added_by_one_entry(tmp_path, monkeypatch):
    """At run time, with nothing but the entry: rotated, compressed, saved, verified and read again."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto import configuration_auto, modeling_auto

    AutoConfig.register("mine", MineConfig)
    AutoModelForCausalLM.register(MineConfig, MineForCausalLM)
    monkeypatch.setitem(architectures.FAMILIES, "mine", Layout())
    try:
        config = MineConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
        model = random_model(config, torch.float32)
        model.save_pretrained(tmp_path / "model")
        before = model(TOKENS).logits
        assert torch.allclose(streamed_logits(tmp_path / "model"), before, atol=1e-4 * float(before.abs().max()))
        obr.rotate(model, "quarot", seed=3)
        assert torch.allclose(model(TOKENS).logits, before, atol=1e-3 * float(before.abs().max()))
        obr.compress(model, TOKENS, {"method": "obr_gptq"}, progress=False)
        obr.save(model, tmp_path / "packed")
        assert verify_checkpoint(tmp_path / "packed") == []
        assert torch.equal(obr.load(tmp_path / "packed", device="cpu")(TOKENS).logits, model(TOKENS).logits)
    finally:
        configuration_auto.CONFIG_MAPPING._extra_content.pop("mine")
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(MineConfig)


def test_phi_of_the_usual_rope_takes_every_rotation():
    config = Phi3Config(hidden_size=64, intermediate_size=96, num_attention_heads=4, pad_token_id=0)
    dimensions = architectures.Dimensions.of(config)
    assert dimensions.rotary == 16 and not any(map(dimensions.objection, architectures.EVERY))
