"""At 16 bits no rotation changes what a model of any family computes, and every wrong fold shows."""

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Gemma3Config, StableLmConfig

import obr
from helpers.family_models import FAMILIES, TOKENS, change, exact_model, random_model
from obr.errors import ObrError
from obr.models import online_transforms
from obr.models.architectures import Dimensions, layout_of
from obr.models.blocks import StreamedBlocks, run_block
from obr.models.hadamard import random_orthogonal
from obr.rotations import fold, registry
from obr.rotations.flatquant import random_scale


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", registry.KINDS)
def test_logits_do_not_change(family, kind):
    assert change(exact_model(FAMILIES[family]), lambda m: obr.rotate(m, kind, seed=7)) < 1e-11
    assert change(random_model(FAMILIES[family], torch.float32), lambda m: obr.rotate(m, kind, seed=7)) < 1e-3


def fits(block: int, sizes: Dimensions) -> bool:
    return all(n <= block or n % block == 0 for n in (sizes.hidden, sizes.intermediate, sizes.head_dim))


BLOCKED = [(name, b) for name, c in FAMILIES.items() for b in (16, 32, 64, 128) if fits(b, Dimensions.of(c))]


@pytest.mark.parametrize(("family", "block"), BLOCKED)
def test_rotations_in_blocks_do_not_change_logits(family, block):
    def rotate(model):
        obr.rotate(model, registry.draw("quarot", Dimensions.of(model.config), 7, block=block))

    assert change(exact_model(FAMILIES[family]), rotate) < 1e-11


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_rotation_changes_no_logits_and_computes_nothing_at_run_time(family):
    def rotate(model):
        obr.rotate(model, registry.draw("quarot", Dimensions.of(model.config), 7, fused=True))
        assert not any(
            online_transforms.specs(block) for block in model.get_submodule(layout_of(model.config).blocks)
        )

    assert change(exact_model(FAMILIES[family]), rotate) < 1e-11


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_blocks_compute_the_same(family, tmp_path):
    """A folder on disk, read and rotated block by block, with what the family keeps beside its weights."""
    model = random_model(FAMILIES[family], torch.float32)
    model.save_pretrained(tmp_path)
    plain = model(TOKENS).logits
    rotation = registry.draw("ostquant", Dimensions.of(model.config), 3)
    blocks = StreamedBlocks(tmp_path, rotation, dtype=torch.float32, device="cpu")
    hidden, arguments = blocks.embed(TOKENS)
    for index in range(len(blocks)):
        block = blocks.load(index)
        hidden = [run_block(block, states, arguments[index]) for states in hidden]
    logits = blocks.logits(torch.cat(list(hidden)))
    assert torch.allclose(logits, plain, atol=1e-3 * float(plain.abs().max()))


@pytest.mark.parametrize(
    "config, reason",
    [
        (Gemma3Config(), "'gemma3' is not supported: it reads images beside text"),
        (StableLmConfig(), "'stablelm' is not supported: its norms subtract the mean and have biases"),
    ],
)
def test_families_that_are_not_read_are_refused_with_the_reason(config, reason):
    with pytest.raises(ObrError, match=reason):
        layout_of(config)


def drawn(model, kind="ostquant"):
    return registry.draw(kind, Dimensions.of(model.config), 1)


def wrong_change(family, rotate) -> float:
    return change(random_model(FAMILIES[family]), rotate)


@pytest.mark.parametrize("kind", ["quarot", "spinquant", "flatquant", "ostquant"])
def test_an_unrotated_value_bias_shows(kind, monkeypatch):
    per_head = fold.per_head
    monkeypatch.setattr(fold, "per_head", lambda x, p: x if x.ndim == 1 else per_head(x, p))
    assert wrong_change("qwen2, 14 heads", lambda m: obr.rotate(m, kind)) > 1e-3


@pytest.mark.parametrize("kind", ["flatquant", "ostquant"])
def test_the_inverse_in_place_of_its_transpose_shows(kind, monkeypatch):
    from obr.models import hadamard

    for module in (fold, hadamard):
        monkeypatch.setattr(module, "inverse_transposed", lambda x: torch.linalg.inv(x.double()))
    assert wrong_change("llama", lambda m: obr.rotate(m, kind)) > 1e-3


def test_key_scales_untied_within_a_rope_pair_show_and_are_recorded():
    def rotate(model):
        rotation = drawn(model)
        for index in range(2):
            rotation.parameters[f"blocks.{index}.S_qk"] = random_scale((2, 16), torch.Generator().manual_seed(index))
        assert rotation.about()["key_scale_untied"] > 0.1
        obr.rotate(model, rotation)

    assert wrong_change("llama", rotate) > 1e-3
    assert "key_scale_untied" not in drawn(random_model(FAMILIES["llama"])).about()


def test_key_scales_that_norms_of_heads_do_not_let_through_are_refused():
    model = random_model(FAMILIES["qwen3, head_dim apart"])
    rotation = drawn(model)
    rotation.parameters["blocks.1.S_qk"] = torch.rand(2, 16).repeat(1, 2) + 0.5
    with pytest.raises(ObrError, match="normalises queries and keys with one gain for all heads"):
        obr.rotate(model, rotation)


def test_value_rotations_given_to_the_wrong_heads_show(monkeypatch):
    """Query head i reads KV head i // g, not i modulo k."""
    per_head = fold.per_head

    def interleaved(x, matrices):
        heads = x.shape[-1] // matrices.shape[-1]
        return per_head(x, matrices.repeat(heads // len(matrices), 1, 1))

    monkeypatch.setattr(fold, "per_head", interleaved)
    assert wrong_change("llama", lambda m: obr.rotate(m, "ostquant")) > 1e-3
    assert wrong_change("llama", lambda m: obr.rotate(m, "spinquant")) < 1e-5  # one matrix for all heads


@pytest.mark.parametrize("kind", ["quarot", "spinquant", "ostquant"])
def test_a_residual_matrix_that_is_not_orthogonal_shows(kind):
    def rotate(model):
        rotation = drawn(model, kind)
        noise = 0.1 * random_orthogonal(96, torch.Generator().manual_seed(0))
        wrong = rotation.residual().matrix() + noise
        rotation.residual = lambda: fold.Kronecker.right([wrong])
        obr.rotate(model, rotation)

    assert wrong_change("llama", rotate) > 1e-3


@pytest.mark.parametrize("kind", ["quarot", "spinquant", "ostquant"])
def test_norms_that_are_not_folded_show(kind, monkeypatch):
    fold_linear = fold.fold_linear
    monkeypatch.setattr(fold, "fold_linear", lambda r, w, b, c, gain, *rest: fold_linear(r, w, b, c, None, *rest))
    assert wrong_change("llama", lambda m: obr.rotate(m, kind)) > 1e-3


def test_gemma_gains_are_one_more_than_their_weights(monkeypatch):
    from obr.models import architectures

    family = FAMILIES["gemma"]
    monkeypatch.setitem(architectures.FAMILIES, "gemma", architectures.Layout())
    assert wrong_change("gemma", lambda m: obr.rotate(m, "spinquant")) > 1e-3
    assert family.model_type == "gemma"


def test_centred_embeddings_show():
    def rotate(model):
        embed = model.model.embed_tokens.weight
        embed -= embed.mean(1, keepdim=True)
        obr.rotate(model, "quarot")

    assert wrong_change("llama", rotate) > 1e-3


def test_embeddings_left_tied_show():
    def rotate(model):
        obr.rotate(model, "spinquant")
        model.lm_head.weight = model.model.embed_tokens.weight

    assert wrong_change("llama, tied, 9 heads", rotate) > 1e-3


@pytest.mark.parametrize(
    "kind, parts",
    [
        ("quarot", ["o_proj.transform", "down_proj.transform"]),
        ("spinquant", ["down_proj.transform"]),
        ("flatquant", ["q_proj.transform", "o_proj.transform", "gate_proj.transform", "query_transform"]),
        ("ostquant", ["down_proj.transform"]),
        ("scaling", ["v_proj.shift", "up_proj.shift"]),
    ],
)
def test_an_online_part_left_out_shows(kind, parts):
    for part in parts:

        def rotate(model, part=part):
            obr.rotate(model, kind)
            for block in model.model.layers:
                found = [path for path in dict(block.named_modules()) if path.endswith(part)]
                assert len(found) == 1, part
                parent, _, name = found[0].rpartition(".")
                setattr(block.get_submodule(parent), name, None)

        assert wrong_change("llama", rotate) > 1e-3, part


@pytest.mark.parametrize("kind", registry.KINDS)
def test_compressed_checkpoints_compute_what_the_model_in_memory_does(kind, tmp_path):
    """With quantised activations, keys and values, learned ranges where there are some, and everything online."""
    model = random_model(FAMILIES["llama, all heads apart"], torch.float32)
    obr.rotate(model, kind, seed=2, clip=kind == "flatquant")
    low = {"bits": 6, "clip_ratio": "learned" if kind == "flatquant" else 0.9}
    recipe = {
        "method": "rtn", "bits": 8, "clip": "learned" if kind == "flatquant" else "mse", "activations": low,
        "o_inputs": {**low, "group_size": "head"}, "queries": {"bits": 8, "group_size": "head"},
        "keys": {**low, "symmetric": False, "group_size": "head"}, "values": low,
    }  # fmt: skip
    obr.compress(model, None, recipe, progress=False)
    manifest = obr.save(model, tmp_path)
    loaded = obr.load(tmp_path, device="cpu")
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert manifest["rotation"]["kind"] == kind and manifest["rotation"]["folded"]
    block = loaded.model.layers[1]
    assert block.self_attn.o_proj.activations.group_size == 16 and block.mlp.down_proj.activations.group_size is None
    plain = obr.load(tmp_path, {"method": "dense"}, device="cpu")
    assert not torch.equal(plain(TOKENS).logits, loaded(TOKENS).logits)
    assert change_of(plain, FAMILIES["llama, all heads apart"]) < 0.1  # 8-bit weights and fp16 gains alone


def change_of(model, config) -> float:
    before = random_model(config, torch.float32)(TOKENS).logits
    return float((model(TOKENS).logits - before).norm() / before.norm())


@pytest.mark.parametrize("kind", registry.KINDS)
def test_a_real_model_keeps_its_logits(kind, real_model):
    """Folded and online parts of each kind, on SmolLM2-135M and a real sentence."""
    tokens = AutoTokenizer.from_pretrained(real_model)(
        "The State of the Union is a report of the President to Congress, which in most years is a speech.",
        return_tensors="pt",
    )["input_ids"]
    model = obr.load_model(real_model, device="cpu")
    before = model(tokens).logits
    rotation = registry.draw(kind, Dimensions.of(AutoConfig.from_pretrained(real_model)), 1)
    after = obr.rotate(model, rotation)(tokens).logits
    assert float((after - before).abs().max() / before.abs().max()) < 1e-3
    assert torch.equal(after.argmax(-1), before.argmax(-1))
    first = model.model.layers[0]
    if kind != "scaling":
        assert first.mlp.down_proj.transform is not None
        first.mlp.down_proj.transform = None
        assert float((model(tokens).logits - before).abs().max() / before.abs().max()) > 1e-2
