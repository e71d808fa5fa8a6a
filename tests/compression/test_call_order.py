"""Models in memory and on disk: steps in any order agree with each other, or a sentence refuses them."""

import copy
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import obr
from helpers.single_scores import text_score
from obr.checkpoints.verify import verify_checkpoint
from obr.config.quantizer import QuantizerSettings
from obr.errors import ObrError
from obr.export.dispatch import export

obr.register_with_transformers()

WINDOWS = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))
RECIPES = {
    "weights": {"method": "rtn", "bits": 4},
    "sparse": {"method": "obr_rtn", "bits": 4, "sparsity": 0.5},
    "activations": {
        "method": "rtn",
        "bits": 8,
        "activations": {"bits": 8},
        "keys": {"bits": 8},
        "values": {"bits": 8},
    },
}


def plain_model() -> LlamaForCausalLM:
    """A random model of two blocks, with weights large enough that low precision changes its outputs."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    model = LlamaForCausalLM(config).float().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def own_loss(model) -> float:
    """Mean cross-entropy by the model's own forward pass."""
    with torch.no_grad():
        return float(torch.stack([model(input_ids=w[None], labels=w[None]).loss for w in WINDOWS]).mean())


def compressed(recipe: str = "sparse", rotation: str | None = None):
    model = plain_model()
    if rotation:
        obr.rotate(model, rotation, seed=0)
    return obr.compress(model, WINDOWS, RECIPES[recipe], progress=False)


STEPS = ["rotate", "fuse", *RECIPES, "save", "load", "pretrained", "perplexity", "save_pretrained", "export", "copy"]


def take(step: str, model, folder):
    """Take one step, check what it promises, and return the model after it."""
    before = own_loss(model)
    if step in ("rotate", "fuse"):
        from obr.models.architectures import Dimensions
        from obr.rotations.registry import draw

        rotation = draw("quarot", Dimensions.of(model.config), 0, fused=step == "fuse")
        obr.rotate(model, rotation)
        assert own_loss(model) == pytest.approx(before, abs=1e-4)
    elif step in RECIPES:
        obr.compress(model, WINDOWS, RECIPES[step], progress=False)
    elif step == "save":
        obr.save(model, folder / "packed")
        assert verify_checkpoint(folder / "packed") == []
        assert own_loss(obr.load(folder / "packed")) == before == own_loss(model)
    elif step == "load":
        model = obr.load(folder / "packed")
    elif step == "pretrained":
        model = AutoModelForCausalLM.from_pretrained(folder / "packed", dtype="float32")
        assert own_loss(model) == own_loss(obr.load(folder / "packed"))
    elif step == "perplexity":
        state, kept = copy.deepcopy(model.state_dict()), [(n, type(m), m.training) for n, m in model.named_modules()]
        assert obr.perplexity(model, WINDOWS) == pytest.approx(torch.tensor(before).exp().item(), rel=1e-5)
        assert [(n, type(m), m.training) for n, m in model.named_modules()] == kept
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    elif step == "save_pretrained":
        model.save_pretrained(folder / "plain")
        reread = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype="float32")
        assert own_loss(reread) == pytest.approx(before, abs=1e-5)
    elif step == "export":
        export(folder / "packed", "compressed-tensors", folder / "exported")
        reread = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype="float32")
        assert own_loss(reread) == pytest.approx(own_loss(obr.load(folder / "packed")), abs=1e-3)
    elif step == "copy":
        model = copy.deepcopy(model)
    if step not in ("rotate", "fuse", "load", "pretrained", *RECIPES):
        assert own_loss(model) == before
    return model


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(st.sampled_from(STEPS), min_size=2, max_size=6))
@example(["rotate", "sparse", "perplexity", "save", "load", "perplexity", "save_pretrained", "rotate"])
@example(["fuse", "weights", "save", "export", "save_pretrained", "pretrained", "sparse"])
@example(["activations", "save", "copy", "save", "load", "save", "pretrained", "perplexity"])
def test_steps_in_any_order_agree_or_are_refused_in_a_sentence(tmp_path_factory, steps):
    folder, model = tmp_path_factory.mktemp("order"), plain_model()
    for step in steps:
        try:
            model = take(step, model, folder)
        except (ObrError, ValueError) as error:  # transformers says that a packed model is not serializable
            said = str(error)
            assert (said[-1] == "." and "\n" not in said) or "not serializable" in said, said
            if step == "load" or step == "pretrained":
                assert not (folder / "packed").exists(), said
        except OSError:
            assert step == "pretrained" and not (folder / "packed").exists()


@pytest.mark.parametrize(
    ("make", "step", "refusal"),
    [
        (
            lambda: obr.rotate(plain_model(), "quarot", seed=0),
            lambda m: obr.rotate(m, "quarot", seed=1),
            "rotated already",
        ),
        (compressed, lambda m: obr.rotate(m, "quarot", seed=0), "compressed already"),
        (compressed, lambda m: obr.compress(m, WINDOWS, RECIPES["weights"]), "compressed already"),
        (
            compressed,
            lambda m: obr.compress(vars(m).pop("obr_recipe") and m, WINDOWS, RECIPES["weights"]),
            "compressed",
        ),
        (lambda: compressed(rotation="quarot"), lambda m: m.save_pretrained("nowhere"), "use obr.save"),
        (lambda: compressed("activations"), lambda m: m.save_pretrained("nowhere"), "use obr.save"),
        (lambda: compressed("activations"), lambda m: m.push_to_hub("me/nowhere"), "use obr.save"),
    ],
)
def test_a_step_that_cannot_follow_is_refused_and_changes_nothing(make, step, refusal):
    model = make()
    before = own_loss(model)
    with pytest.raises(ObrError, match=refusal):
        step(model)
    assert own_loss(model) == before


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda m: m.model.layers[0].mlp.up_proj.weight.data.mul_(1.01), "up_proj have changed since obr.compress"),
        (lambda m: m.model.layers[1].input_layernorm.weight.data.add_(1e-5), "input_layernorm.weight has changed"),
        (lambda m: m.model.embed_tokens.weight.data.add_(1e-5), "embed_tokens.weight has changed"),
        (
            lambda m: setattr(m.model.layers[0].mlp.up_proj, "activations", QuantizerSettings(bits=8)),
            "quantiser",
        ),
        (lambda m: m.model.layers.pop(1), "block|module"),
        (lambda m: setattr(m, "obr_unfinished", "obr.compress"), "did not finish"),
    ],
)
def test_a_model_that_was_changed_after_compression_is_not_saved(tmp_path, change, refusal):
    model = compressed()
    change(model)
    with pytest.raises(ObrError, match=refusal):
        obr.save(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def hooked(model, path):
    model.get_submodule(path).register_forward_hook(lambda *args: args[2] * 2)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda m: hooked(m, "model.layers.0.mlp.down_proj.transform"), "down_proj.transform has the hook"),
        (lambda m: setattr(m.model.layers[0].mlp.up_proj, "quantize", lambda x, *_: 0 * x), "another quantiser"),
        (lambda m: setattr(m.model.layers[0].mlp, "forward", lambda x: x), "another forward than its class"),
        (lambda m: delattr(m.model.layers[0].self_attn, "key_value_quantizer"), "lost its self_attn.key_value_quan"),
        (lambda m: m.set_attn_implementation("halved"), "attends by 'halved'"),
    ],
)
def test_parts_of_a_compressed_model_that_compute_otherwise_are_not_saved(tmp_path, change, refusal):
    AttentionInterface.register(
        "halved", lambda module, q, *args, **kw: sdpa_attention_forward(module, q / 2, *args, **kw)
    )
    model = compressed(rotation="quarot")
    change(model)
    with pytest.raises(ObrError, match=refusal):
        obr.save(model, tmp_path / "packed")


def test_a_model_without_generation_settings_is_saved(tmp_path):
    model = compressed("weights")
    model.generation_config = None
    obr.save(model, tmp_path / "packed")
    assert own_loss(obr.load(tmp_path / "packed")) == own_loss(model)


def test_a_step_that_fails_leaves_a_model_that_no_step_takes(monkeypatch, tmp_path):
    from obr.rotations.quarot import QuaRot

    def broken(self, block, index, layout):
        raise ObrError("The second block does not fit.")

    model = plain_model()
    monkeypatch.setattr(QuaRot, "fold_block", broken)
    with pytest.raises(ObrError, match="does not fit"):
        obr.rotate(model, "quarot", seed=0)
    monkeypatch.undo()
    for step in (
        lambda: obr.rotate(model, "quarot", seed=0),
        lambda: obr.compress(model, WINDOWS, RECIPES["weights"]),
        lambda: obr.save(model, tmp_path / "packed"),
        lambda: obr.perplexity(model, WINDOWS),
        lambda: model.save_pretrained(tmp_path / "plain"),
    ):
        with pytest.raises(ObrError, match=r"(obr\.rotate|A step) has begun to change this model and did not finish"):
            step()


@pytest.mark.slow
def test_saving_replaces_an_older_checkpoint_whole(tmp_path):
    obr.save(compressed(), tmp_path / "packed")
    (tmp_path / "packed/chat_template.jinja").write_text("old", encoding="utf-8")
    model = plain_model()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    manifest = obr.save(obr.compress(model, WINDOWS, RECIPES["weights"], progress=False), tmp_path / "packed")
    assert [name for name in manifest["files"] if "block" in name] == ["block_000.safetensors"]
    assert not (tmp_path / "packed/block_001.safetensors").exists()
    assert not (tmp_path / "packed/chat_template.jinja").exists() and verify_checkpoint(tmp_path / "packed") == []


@pytest.mark.slow
def test_saving_spares_a_folder_with_other_files(tmp_path):
    plain_model().save_pretrained(tmp_path / "dense")
    for folder, name in ((tmp_path / "dense", "config.json"), (tmp_path / "packed", "notes.txt")):
        if name == "notes.txt":
            obr.save(compressed(), folder)
            (folder / name).write_text("mine", encoding="utf-8")
        present = sorted(path.name for path in folder.iterdir())
        with pytest.raises(ObrError, match=f"holds {name}"):
            obr.save(compressed(), folder)
        assert sorted(path.name for path in folder.iterdir()) == present


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (
            lambda f: shutil.copy(f / "block_000.safetensors", f / "block_002.safetensors"),
            "block_002.* not in the manifest",
        ),
        (
            lambda f: shutil.copy(f / "ends.safetensors", f / "model.safetensors"),
            "model.safetensors is not in the manifest",
        ),
        (lambda f: (f / "block_001.safetensors").unlink(), "lacks block_001"),
        (
            lambda f: exchange(f, "block_000.safetensors", "block_001.safetensors"),
            "block_000.* is not the file that was",
        ),
        (lambda f: _edit(f / "manifest.json", sketches={}) or exchange(f), "block_000.*its sha256 differs"),
        (lambda f: foreign(f, "block_001.safetensors"), "block_001.* is not the file that was written"),
        (lambda f: foreign(f, "ends.safetensors"), "ends.* is not the file that was written"),
        (lambda f: (f / "adapter_config.json").write_text("{}", encoding="utf-8"), "adapter_config.json"),
        (lambda f: _edit(f / "config.json", rms_norm_eps=1e-2), "config.json is not the file that was written"),
        (lambda f: _edit(f / "generation_config.json", top_k=3), "generation_config.json is not the file"),
        (lambda f: _edit(f / "manifest.json", dtype="bfloat16"), "its manifest says bfloat16"),
        (lambda f: _edit(f / "manifest.json", blocks=1), "block_001"),
    ],
)
def test_a_folder_that_is_not_the_checkpoint_of_its_manifest_is_refused_by_all_readers(tmp_path, change, refusal):
    obr.save(compressed(), tmp_path / "packed")
    change(tmp_path / "packed")
    readers = (
        lambda: obr.load(tmp_path / "packed"),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "packed"),
        lambda: text_score(tmp_path / "packed", tmp_path / "none.txt", {"seqlen": 8}),
        lambda: export(tmp_path / "packed", "compressed-tensors", tmp_path / "exported"),
    )
    for reader in readers:
        with pytest.raises(ObrError, match=refusal):
            reader()
    assert verify_checkpoint(tmp_path / "packed") != []


def exchange(folder, one="block_000.safetensors", other="block_001.safetensors"):
    contents = (folder / one).read_bytes()
    shutil.move(folder / other, folder / one)
    (folder / other).write_bytes(contents)


def foreign(folder, name):
    """A file of another checkpoint of the same recipe and sizes."""
    model = plain_model()
    model.model.embed_tokens.weight.mul_(1.5)
    obr.save(obr.compress(model, WINDOWS, RECIPES["sparse"], progress=False), folder.parent / "other")
    shutil.copy(folder.parent / "other" / name, folder / name)


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
