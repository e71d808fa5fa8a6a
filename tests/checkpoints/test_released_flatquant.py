"""Released checkpoints of FlatQuant's front end: what is read computes what a naively written model does."""

import json

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from helpers.family_models import TOKENS, random_model
from helpers.released_checkpoints import CACHE, ENTRY, FORMS, QUANTISED, FlatModel, pruned_and_rounded, written
from helpers.rotation_files import invertible, refused
from obr.checkpoints.format import load
from obr.checkpoints.released.stage import import_released, summary
from obr.config.recipe import Recipe

BASES = {
    "qwen2, 14 heads": Qwen2Config(
        hidden_size=112, intermediate_size=296, num_attention_heads=14, num_key_value_heads=2, rms_norm_eps=1e-6
    ),
    "llama, tied": LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True
    ),
}
RECIPE = Recipe.parse(ENTRY | QUANTISED)
NAME = "qwen2, 14 heads"


@pytest.fixture(autouse=True)
def no_bill_of_software(monkeypatch):
    """Manifests of these tests do without what takes most of the time of so small models."""
    monkeypatch.setattr("obr.checkpoints.writer.software", dict)
    monkeypatch.setattr("obr.runtime.provenance.digest", str)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, free) -> (folder of the base model, the naive model, its state dict), made once."""
    found = {}

    def make(base: str = NAME, free: bool = False):
        if (base, free) not in found:
            folder = tmp_path_factory.mktemp("released") / "model"
            model = random_model(BASES[base], torch.float32)
            model.save_pretrained(folder)
            flat = FlatModel(model, free)
            found[base, free] = folder, flat, flat.state_dict()
        return found[base, free]

    return make


def check_same(checkpoint, flat, recipe=None) -> None:
    """Token by token: a rounding that falls the other way would show in one and those after it."""
    expected, found = flat(TOKENS), load(checkpoint, recipe, device="cpu")(TOKENS).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("free", [False, True], ids=["svd", "direct_inv"])
@pytest.mark.parametrize("base", BASES)
def test_the_adopted_model_computes_what_the_naive_one_does(made, tmp_path, base, free):
    folder, flat, state = made(base, free)
    manifest = import_released(folder, written(tmp_path, state), RECIPE, tmp_path / "out")
    check_same(tmp_path / "out", flat)
    assert manifest["dtype"] == "bfloat16" and manifest["rotation"]["clipped"] is True
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rms_norm_eps"] == BASES[base].rms_norm_eps
    assert config["tie_word_embeddings"] is BASES[base].tie_word_embeddings
    verified = manifest["released"]
    assert verified["layout"] == "flatquant" and verified["off_grid"] == 0 and 0.9 < verified["likeness"] < 1
    assert verified["rows"] == sum(v.shape[0] for k, v in state.items() if k.endswith("_proj.linear.weight"))
    assert "resemble the base model's, folded, by a cosine of 0.9" in summary(manifest)
    assert manifest["rotation"]["online"] == [
        "qkv inputs", "up_gate inputs", "down inputs", "o inputs", "queries and keys"
    ]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_file_forms_import_to_same_model(made, tmp_path, form):
    folder, flat, state = made("llama, tied", True)
    import_released(folder, written(tmp_path, state, form), RECIPE, tmp_path / "out")
    check_same(tmp_path / "out", flat)


def test_learned_ranges_of_file_are_needed(made, tmp_path):
    folder, flat, state = made()
    import_released(folder, written(tmp_path, state), RECIPE, tmp_path / "out")
    plain = {**ENTRY, "activations": {"bits": 4}, "keys": CACHE, "values": CACHE}
    with pytest.raises(AssertionError):
        check_same(tmp_path / "out", flat, plain)


def test_weights_and_biases_are_kept_to_the_last_bit(made, tmp_path):
    folder, _, state = made()
    import_released(folder, written(tmp_path, state), RECIPE, tmp_path / "out")
    found = load(tmp_path / "out", device="cpu", dtype=torch.bfloat16)
    linears = [name for name in state if ".linear." in name and "_proj" in name]
    norms = [name for name in state if name.endswith("norm.weight")]
    blocks = found.config.num_hidden_layers
    assert len(linears) >= 7 * blocks and len(norms) == 2 * blocks + 1
    for name in (*linears, *norms):
        assert torch.equal(found.get_parameter(name.replace(".linear.", ".")), state[name]), name


def test_queries_take_the_inverse_that_the_file_holds(made, tmp_path):
    """A stored inverse is one to float32's rounding; taking another would round keys and queries otherwise."""
    folder, _, state = made()
    inverse = "model.layers.1.self_attn.kcache_trans.matrix_inv_t"
    state = {k: v * 1.001 if k == inverse else v for k, v in state.items()}
    import_released(folder, written(tmp_path, state), RECIPE, tmp_path / "out")
    quantizer = load(tmp_path / "out", device="cpu").model.layers[1].self_attn.key_value_quantizer
    assert torch.allclose(quantizer.query_transform.matrix().float(), state[inverse])


def without(*parts):
    return lambda state: {k: v for k, v in state.items() if not any(part in k for part in parts)}


@pytest.mark.parametrize("part", ["clip_factor_w", "clip_factor_a", "kcache_trans", "diag_scale"])
def test_file_without_optional_part_is_imported(made, tmp_path, part):
    """Scales and weights' clips have acted already; they are needed to compare layers with the base model's."""
    folder, flat, state = made()
    manifest = import_released(folder, written(tmp_path, without(part)(state)), RECIPE, tmp_path / "out")
    assert ("queries and keys" in manifest["rotation"]["online"]) == (part != "kcache_trans")
    if part in ("clip_factor_w", "diag_scale"):
        check_same(tmp_path / "out", flat)
    if part == "clip_factor_a":
        refused(lambda: load(tmp_path / "out", device="cpu"), "the rotation has learned no range")


# --- What is refused --------------------------------------------------------------------------------------


def changed(end, change):
    return lambda state: {k: change(v) if k.endswith(end) else v for k, v in state.items()}


def more(name, tensor):
    return lambda state: state | {name: tensor}


def spoilt(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[0] = torch.nan
    return tensor


def all_kept(weight):
    return torch.where(weight == 0, weight.abs().max() / 7, weight)


def transposed(*modules):
    """Matrices and their inverses, which stay inverses of each other."""
    return lambda state: {k: v.T if any(f".{m}.matrix" in k for m in modules) else v for k, v in state.items()}


def swapped(state):
    """Left matrices for right ones, where they are of one size."""
    names = {"matrix_left": "matrix_right", "matrix_right": "matrix_left"}
    return {k: state[next((k.replace(a, b) for a, b in names.items() if a in k), k)] for k in state}


def shuffled(state):
    """Layers of a model with other weights."""
    return {k: v.roll(1, 0) if k.endswith("up_proj.linear.weight") else v for k, v in state.items()}


P, Q = "model.layers.1.self_attn", "model.layers.1.self_attn.q_proj"
REFUSED = {
    "no layer": (without(f"{Q}.linear.weight"), f"has no '{Q}.linear.weight'; it is not a whole released"),
    "no bias": (without(f"{Q}.linear.bias"), f"has no '{Q}.linear.bias'"),
    "no head": (without("lm_head"), "has no 'lm_head.weight'"),
    "no norm": (without("1.input_layernorm"), "has no 'model.layers.1.input_layernorm.weight'"),
    "no transform": (without(f"{P}.ln_trans.matrix_left"), f"has no '{P}.ln_trans.matrix_left'"),
    "no inverse": (without("mlp.down_trans.matrix_right_inv"), "'model.layers.0.mlp.down_trans.matrix_right_inv'"),
    "no inverse of keys": (without("kcache_trans.matrix_inv_t"), "self_attn.kcache_trans.matrix_inv_t'"),
    "one scale": (without("1.mlp.down_trans.diag_scale"), "has no 'model.layers.1.mlp.down_trans.diag_scale'"),
    "half a clip": (without(f"{Q}.clip_factor_w_min"), f"has no '{Q}.clip_factor_w_min'"),
    "half a range": (without("0.self_attn.v_cache_quantizer.clip_factor_a_max"), "clip_factor_a_max'; it is not"),
    "half the matrices": (without("1.self_attn.o_trans.matrix"), f"has no '{P}.o_trans.matrix'"),
    "one too many": (more("model.layers.0.more", torch.ones(1)), "unexpected tensors, such as 'model.layers.0.more'"),
    "ranges of queries": (
        more(f"{P}.q_cache_quantizer.clip_factor_a_max", torch.ones(1)), "q_cache_quantizer.clip_factor_a_max'"
    ),
    "two matrices": (more(f"{P}.o_trans.linear.weight", torch.eye(14)), f"the two matrices of {P}.o_trans differ"),
    "of other heads": (changed("o_trans.matrix", lambda m: m[:7, :7]), "o_trans.matrix has shape (7, 7), the model"),
    "of another size": (changed(f"{Q}.linear.weight", lambda w: w[:, :64]), "linear.weight has shape (112, 64)"),
    "NaN": (changed(f"{Q}.linear.weight", spoilt), "q_proj.linear.weight has NaN or infinite values"),
    "NaN in a norm": (changed("model.norm.weight", spoilt), "model.norm.weight has NaN or infinite values"),
    "NaN in a matrix": (changed(f"{P}.ln_trans.matrix_left", spoilt), "ln_trans.matrix_left has NaN or infinite"),
    "NaN in a range": (changed("k_cache_quantizer.clip_factor_a_min", spoilt), "clip_factor_a_min has NaN"),
    "a scale of zero": (changed("1.mlp.down_trans.diag_scale", lambda c: c * 0), "is a scale with zeros in it"),
    "a singular matrix": (changed(f"{P}.ln_trans.matrix_left", lambda m: m * 0), "matrix_left has condition number"),
    "a transposed matrix": (changed(f"{P}.ln_trans.matrix_left", lambda m: m.T), "left_inv is not the inverse"),
    "a transposed inverse": (changed(f"{P}.vcache_trans.matrix_inv_t", lambda m: m.T), "matrix_inv_t is not the"),
    "another inverse": (changed("1.mlp.up_gate_trans.matrix_right_inv", lambda m: 2 * m), "right_inv is not the"),
    "transposed throughout": (transposed("ln_trans"), "block 0 self_attn.q_proj resembles the base model's layer"),
    "heads transposed": (transposed("o_trans"), "block 0 self_attn.o_proj resembles the base model's layer"),
    "values transposed": (transposed("vcache_trans"), "block 0 self_attn.v_proj"),
    "of another model": (shuffled, "block 0 mlp.up_proj resembles the base model's layer"),
    "packed": (changed(f"{Q}.linear.weight", lambda w: w.to(torch.uint8)), "q_proj.linear.weight holds integers"),
    "dense": (changed(f"{Q}.linear.weight", all_kept), "% zeros, fewer than the 50.00 %"),
    "not quantised": (changed(f"{Q}.linear.weight", lambda w: w * torch.rand_like(w)), "more than the 16 of 4 bits"),
}  # fmt: skip


@pytest.mark.parametrize("change, sentence", REFUSED.values(), ids=REFUSED)
def test_deviating_state_dict_is_refused(made, tmp_path, change, sentence):
    folder, _, state = made()
    released = written(tmp_path, change(state))
    refused(lambda: import_released(folder, released, RECIPE, tmp_path / "out"), sentence)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_left_and_right_of_one_size_may_not_be_swapped(made, tmp_path):
    """64 = 8 · 8: no shape tells them apart."""
    folder, _, state = made("llama, tied")
    narrow = {k: v for k, v in state.items() if "down_trans" not in k}
    state = {**state, **swapped(narrow)}
    refused(
        lambda: import_released(folder, written(tmp_path, state), RECIPE, tmp_path / "out"),
        "block 0 self_attn.q_proj resembles the base model's layer, folded by the file's own transforms",
    )


def test_values_that_are_transformed_for_every_token_are_refused(made, tmp_path):
    """separate_vtrans has the same names, but vcache_trans is not in v_proj."""
    folder, _, state = made()
    state = dict(state)
    for index in range(2):
        path = f"model.layers.{index}.self_attn"
        value = state[f"{path}.vcache_trans.matrix"]
        weight = state[f"{path}.v_proj.linear.weight"].float()
        before = torch.block_diag(*[value] * 2).inverse().T @ weight
        state[f"{path}.v_proj.linear.weight"] = pruned_and_rounded(before, torch.bfloat16)
    refused(
        lambda: import_released(folder, written(tmp_path, state), RECIPE, tmp_path / "out"),
        "block 0 self_attn.v_proj was folded without vcache_trans (separate_vtrans)",
    )


def test_transforms_as_they_are_learned_are_refused(made, tmp_path):
    folder, _, state = made()
    state = {k: v for k, v in state.items() if "_trans" not in k}
    state["model.layers.0.self_attn.ln_trans.linear_left.weight"] = invertible(8, 0)
    refused(
        lambda: import_released(folder, written(tmp_path, state), RECIPE, tmp_path / "out"),
        "FlatQuant's transforms as they are learned, such as 'model.layers.0.self_attn.ln_trans.linear_left.weight'",
    )


def test_a_recipe_of_another_rotation_is_refused(made, tmp_path):
    folder, _, state = made()
    other = Recipe.parse({**ENTRY, "rotation": "quarot"})
    refused(
        lambda: import_released(folder, written(tmp_path, state), other, tmp_path / "out"),
        "is in the layout of flatquant, but the recipe's rotation is quarot",
    )


def test_a_tied_model_with_two_different_ends_is_refused(made, tmp_path):
    folder, _, state = made("llama, tied")
    state = {**state, "lm_head.weight": state["lm_head.weight"] * 2}
    refused(lambda: import_released(folder, written(tmp_path, state), RECIPE, tmp_path / "out"), "the two weights of")
