"""Released checkpoints of QuaRot's and SpinQuant's front ends: what is read computes what was saved."""

import copy
import json

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from helpers.family_models import TOKENS, random_model
from helpers.released_checkpoints import FORMS, pruned_and_rounded, wrapped_state, written
from helpers.rotation_files import refused
from obr.checkpoints.format import load
from obr.checkpoints.released.stage import import_released, summary
from obr.checkpoints.released.verified import Verified, distance_to_grid
from obr.config.recipe import Recipe

# 96 = 12 · 8 inputs of down_proj, and 12 heads: both transforms have a Hadamard matrix of order 12 in the file.
BASES = {
    "llama": LlamaConfig(hidden_size=96, intermediate_size=96, num_attention_heads=12, num_key_value_heads=4),
    "qwen2": Qwen2Config(
        hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6
    ),
    "llama, tied, biases everywhere": LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=1, attention_bias=True,
        mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-6,
    ),
}  # fmt: skip
ENTRY = {"method": "released", "bits": 4, "sparsity": 0.5}


@pytest.fixture(autouse=True)
def no_bill_of_software(monkeypatch):
    """Manifests of these tests do without what takes most of the time of so small models."""
    monkeypatch.setattr("obr.checkpoints.writer.software", dict)
    monkeypatch.setattr("obr.runtime.provenance.digest", str)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, kind) -> (folder of the base model, the rotated and compressed model, its state dict), made once."""
    found = {}

    def make(base: str = "llama", kind: str = "quarot"):
        if (base, kind) not in found:
            folder = tmp_path_factory.mktemp("released") / "model"
            model = random_model(BASES[base], torch.float32)
            model.save_pretrained(folder)
            found[base, kind] = folder, model, wrapped_state(model, kind)
        return found[base, kind]

    return make


def recipe(kind: str = "quarot", **more) -> Recipe:
    return Recipe.parse({**ENTRY, "rotation": kind, **more})


def check_same(checkpoint, model) -> None:
    with torch.no_grad():
        expected, found = model(TOKENS).logits, load(checkpoint, device="cpu")(TOKENS).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_files_have_the_keys_that_the_front_ends_write(made):
    """Every linear layer of the whole model is wrapped, the head too."""
    _, _, state = made()
    assert {name for name in state if "layers" not in name} == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "lm_head.module.weight",
        *(f"lm_head.{q}.{part}" for q in ("quantizer", "out_quantizer") for part in ("maxq", "scale", "zero")),
    }  # fmt: skip
    block = {name.removeprefix("model.layers.1.") for name in state if name.startswith("model.layers.1.")}
    assert {"self_attn.o_proj.had_K", "mlp.down_proj.had_K", "input_layernorm.weight"} < block
    assert "self_attn.apply_rotary_pos_emb_qk_rotation_wrapper.k_quantizer.scale" in block
    assert state["model.norm.weight"].shape == (1,) and state["model.layers.0.mlp.down_proj.had_K"].shape == (12, 12)
    assert len(block) == 2 + 7 * 8 + 3 + 2
    assert {name for name in made("qwen2")[2] if name.endswith("k_proj.module.bias")}


@pytest.mark.parametrize("form", FORMS)
def test_file_forms_import_to_same_model(made, tmp_path, form):
    folder, model, state = made()
    import_released(folder, written(tmp_path, state, form), recipe(), tmp_path / "out")
    check_same(tmp_path / "out", model)


@pytest.mark.parametrize("kind", ["quarot", "spinquant"])
@pytest.mark.parametrize("base", BASES)
def test_the_adopted_model_computes_what_the_released_one_does(made, tmp_path, base, kind):
    folder, model, state = made(base, kind)
    manifest = import_released(folder, written(tmp_path, state), recipe(kind), tmp_path / "out")
    check_same(tmp_path / "out", model)
    assert manifest["bits_per_weight"]["theoretical"] == 3.0 and 8.5 < manifest["bits_per_weight"]["file"] < 9.5
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rms_norm_eps"] == (1e-5 if kind == "quarot" else BASES[base].rms_norm_eps)
    assert config["tie_word_embeddings"] is False and manifest["dtype"] == "float16"
    verified = json.loads((tmp_path / "out/manifest.json").read_text())["released"]
    assert verified["layout"] == kind == manifest["rotation"]["kind"] and manifest["rotation"]["seed"] is None
    assert verified["rows"] == sum(v.shape[0] for k, v in state.items() if k.endswith("_proj.weight"))
    assert 3 <= verified["levels"] <= 16 and verified["off_grid"] == 0 and verified["likeness"] is None
    assert 0.5 <= verified["least_zeros"] <= verified["most_zeros"] < 1
    assert f"layout of {kind}" in summary(manifest) and "0 rows off a grid" in summary(manifest)
    heads = {"queries and keys", "down inputs"} | ({"o inputs"} if kind == "quarot" else set())
    assert set(manifest["rotation"]["online"]) == heads


def test_hadamard_matrix_of_file_is_needed(made, tmp_path):
    """Another matrix of order 12 is as orthogonal, and wrong."""
    folder, model, state = made()
    for number, path in enumerate(("o_proj", "down_proj")):
        other = {k: v.roll(1, 0) if k.endswith(f"{path}.had_K") else v for k, v in state.items()}
        import_released(folder, written(tmp_path / path, other), recipe(), tmp_path / f"out{number}")
        with pytest.raises(AssertionError):
            check_same(tmp_path / f"out{number}", model)


# --- Names of one tensor ----------------------------------------------------------------------------------


def without(*ends):
    """The state dict without the tensors whose names end so."""
    return lambda state: {k: v for k, v in state.items() if not k.endswith(ends)}


def changed(end, change):
    return lambda state: {k: change(v) if k.endswith(end) else v for k, v in state.items()}


def more(**tensors):
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


Q = "layers.1.self_attn.q_proj"
SHARED = [
    without("lm_head.weight"),
    without("lm_head.module.weight"),
    without(f"{Q}.weight", f"{Q}.module.bias"),
    without(f"{Q}.module.weight", f"{Q}.bias"),
]


@pytest.mark.parametrize("change", SHARED, ids=["head inside", "head outside", "layer inside", "layer outside"])
def test_shared_tensor_may_have_one_name(made, tmp_path, change):
    folder, model, state = made("qwen2")
    import_released(folder, written(tmp_path, change(state)), recipe(), tmp_path / "out")
    check_same(tmp_path / "out", model)


@pytest.mark.parametrize("missing", ["embed_tokens.weight", ("lm_head.weight", "lm_head.module.weight")])
def test_a_tied_model_needs_embeddings_or_head(made, tmp_path, missing):
    """QuaRot's front end rotates the one tensor of both twice, and saves it under three names."""
    folder, model, state = made("llama, tied, biases everywhere")
    both = state["model.embed_tokens.weight"]
    state = {k: both if k.startswith("lm_head") and k.endswith("weight") else v for k, v in state.items()}
    changes = without(*([missing] if isinstance(missing, str) else missing))
    model = copy.deepcopy(model)
    model.lm_head.weight.data = both.float()
    import_released(folder, written(tmp_path, changes(state)), recipe(), tmp_path / "out")
    check_same(tmp_path / "out", model)


# --- What is refused --------------------------------------------------------------------------------------


def both_weights(change):
    return lambda state: {k: change(v) if Q in k and k.endswith(".weight") else v for k, v in state.items()}


def all_kept(weight):
    return torch.where(weight == 0, weight.abs().max() / 7, weight)


def too_fine(weight):
    return weight + (weight != 0) * torch.linspace(0, 0.001, weight.numel()).view_as(weight).half()


def spoilt(value):
    def spoil(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return spoil


EVERY_Q = (f"{Q}.weight", f"{Q}.module.weight")
WIDE = ("input_layernorm.weight", lambda w: torch.rand(96))
REFUSED = {
    "no layer": (without(*EVERY_Q), "has no 'model.layers.1.self_attn.q_proj.weight'; it is not a whole released"),
    "no head": (without("lm_head.weight", "lm_head.module.weight"), "has no 'lm_head.weight'"),
    "no embeddings": (without("embed_tokens.weight"), "has no 'model.embed_tokens.weight'"),
    "no matrix": (without("down_proj.had_K"), "has no mlp.down_proj.had_K, but 96 is no power of two"),
    "no matrix for heads": (without("o_proj.had_K"), "has no self_attn.o_proj.had_K, but 12 is no power of two"),
    "a matrix in one block": (without("1.mlp.down_proj.had_K"), "has no 'model.layers.1.mlp.down_proj.had_K'"),
    "two matrices": (changed("1.mlp.down_proj.had_K", lambda m: m.roll(1, 0)), "had_K of mlp.down_proj differ "),
    "no Hadamard matrix": (changed("down_proj.had_K", lambda m: m.abs()), "down_proj.had_K (12, 12) is no Hadamard"),
    "a matrix that does not fit": (changed("down_proj.had_K", lambda m: m[:1, :1]), "had_K does not divide 96"),
    "one too many": (more(model__layers__0__more=torch.ones(1)), "unexpected tensors, such as 'model.layers.0.more'"),
    "another block": (more(model__layers__2__mlp__up_proj__weight=torch.ones(1)), "1 unexpected tensors, such as"),
    "a bias": (more(model__layers__0__mlp__up_proj__bias=torch.ones(96)), "'model.layers.0.mlp.up_proj.bias'"),
    "two weights": (changed(f"{Q}.weight", lambda w: w * 2), "two weights of model.layers.1.self_attn.q_proj differ"),
    "two heads": (changed("lm_head.module.weight", lambda w: w * 2), "the two weights of lm_head differ"),
    "fewer tokens": (changed("embed_tokens.weight", lambda w: w[:9]), "shape (9, 96), the model needs (64, 96)"),
    "a transposed layer": (changed("k_proj.weight", lambda w: w.T), "shape (96, 32), the model needs (32, 96)"),
    "a norm with a weight": (changed(*WIDE), "input_layernorm has a weight, so its model was not rotated as QuaRot"),
    "NaN": (both_weights(spoilt(torch.nan)), "q_proj.module.weight has NaN or infinite values"),
    "infinity": (changed("embed_tokens.weight", spoilt(torch.inf)), "model.embed_tokens.weight has NaN or infinite"),
    "a matrix with NaN": (changed("down_proj.had_K", spoilt(torch.nan)), "mlp.down_proj.had_K has NaN or infinite"),
    "integers": (both_weights(lambda w: w.to(torch.uint8)), "q_proj.module.weight holds integers, not float16"),
    "doubles": (both_weights(lambda w: w.double()), "q_proj.module.weight holds float64, not float16"),
    "dense": (both_weights(all_kept), "% zeros, fewer than the 50.00 %"),
    "finer": (both_weights(too_fine), "different values, more than the 16 of 4 bits"),
}  # fmt: skip


@pytest.mark.parametrize("change, sentence", REFUSED.values(), ids=REFUSED)
def test_deviating_state_dict_is_refused(made, tmp_path, change, sentence):
    folder, _, state = made()
    released = written(tmp_path, change(state))
    refused(lambda: import_released(folder, released, recipe(), tmp_path / "out"), sentence)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    "base, change, sentence",
    [
        ("qwen2", changed(f"{Q}.module.bias", lambda b: b + 1), "the two biases of model.layers.1.self_attn.q_proj"),
        ("qwen2", without(f"{Q}.bias", f"{Q}.module.bias"), "has no 'model.layers.1.self_attn.q_proj.bias'"),
        ("qwen2", changed(f"{Q}.bias", lambda b: b[:8]), "q_proj.bias has shape (8,), the model needs (64,)"),
        ("qwen2", changed(f"{Q}.bias", spoilt(torch.nan)), "q_proj.bias has NaN or infinite values"),
    ],
)
def test_biases_are_checked_as_weights_are(made, tmp_path, base, change, sentence):
    folder, _, state = made(base)
    refused(lambda: import_released(folder, written(tmp_path, change(state)), recipe(), tmp_path / "out"), sentence)


def plain(state):
    """What transformers saves of a model that nobody has rotated."""
    return {
        k: torch.rand(96) if "norm" in k else v
        for k, v in state.items()
        if k.endswith(".weight") and ".module." not in k
    }


@pytest.mark.parametrize(
    "kind, change, sentence",
    [
        ("quarot", plain, "is in none of the layouts of QuaRot, SpinQuant and FlatQuant"),
        ("quarot", without("norm.weight"), "is in none of the layouts of QuaRot, SpinQuant and FlatQuant"),
        ("spinquant", changed("1.input_layernorm.weight", lambda w: w * 2), "layernorm has a weight other than one"),
        ("spinquant", without("1.input_layernorm.weight"), "has no 'model.layers.1.input_layernorm.weight'"),
        ("spinquant", more(model__layers__0__self_attn__o_proj__had_K=torch.ones(1, 1)), "unexpected tensors"),
    ],
)  # fmt: skip
def test_unknown_layout_is_refused(made, tmp_path, kind, change, sentence):
    folder, _, state = made("llama", kind)
    refused(
        lambda: import_released(folder, written(tmp_path, change(state)), recipe(kind), tmp_path / "out"), sentence
    )


def test_a_recipe_that_contradicts_the_file_is_refused(made, tmp_path):
    folder, _, state = made("qwen2", "spinquant")
    released = written(tmp_path, state)
    refused(
        lambda: import_released(folder, released, recipe("quarot"), tmp_path / "out"),
        "is in the layout of spinquant, but the recipe's rotation is quarot",
    )
    refused(
        lambda: import_released(folder, released, recipe("spinquant", blocks="0:1"), tmp_path / "out"),
        "is taken whole",
    )
    import_released(folder, released, recipe("a_name_of_the_config"), tmp_path / "out")


def test_a_base_model_of_another_family_is_refused(made, tmp_path):
    from transformers import Qwen3Config

    _, _, state = made("qwen2", "spinquant")
    config = Qwen3Config(
        hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    random_model(config, torch.float32).save_pretrained(tmp_path / "model")
    released = written(tmp_path, state)
    refused(
        lambda: import_released(tmp_path / "model", released, recipe("spinquant"), tmp_path / "out"),
        "qwen3 models have self_attn.q_norm.weight, which released checkpoints do not hold",
    )


# --- What is verified -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_keep_the_type_and_the_values_of_the_file(made, tmp_path, dtype):
    folder, _, state = made("qwen2")
    weights = {k: pruned_and_rounded(v.float(), dtype) for k, v in state.items() if k.endswith("_proj.weight")}
    weights |= {k.replace("_proj.weight", "_proj.module.weight"): v for k, v in weights.items()}
    others = {k: v.to(dtype) for k, v in state.items() if v.dtype == torch.float16}
    manifest = import_released(folder, written(tmp_path, {**state, **others, **weights}), recipe(), tmp_path / "out")
    assert manifest["dtype"] == str(dtype).removeprefix("torch.") and manifest["released"]["off_grid"] == 0
    found = load(tmp_path / "out", device="cpu", dtype=torch.float32)
    for name, weight in weights.items():
        if ".module." not in name:
            assert torch.equal(found.get_submodule(name.removesuffix(".weight")).weight, weight.float()), name
    assert torch.equal(found.lm_head.weight, others["lm_head.weight"].float())


def test_mixed_types_are_kept_in_one_that_holds_them_all(made, tmp_path):
    folder, _, state = made("qwen2")
    state = changed("embed_tokens.weight", lambda w: w.bfloat16())(state)
    assert import_released(folder, written(tmp_path, state), recipe(), tmp_path / "out")["dtype"] == "float32"


def test_down_proj_at_8_bits_may_have_more_values(made, tmp_path):
    folder, _, state = made()
    state = changed(("down_proj.weight", "down_proj.module.weight"), lambda w: too_fine(w) * (w != 0))(state)
    released = written(tmp_path, state)
    manifest = import_released(folder, released, recipe(int8_down_proj=True), tmp_path / "out")
    assert 16 < manifest["released"]["levels"] <= 256 and manifest["bits_per_weight"]["theoretical"] > 3
    refused(lambda: import_released(folder, released, recipe(), tmp_path / "other"), "more than the 16 of 4 bits")


def test_patterns_are_checked_group_by_group():
    row = torch.tensor([[1.0, 0, 0, 2, 0, 3, 0, 0], [1.0, 2, 0, 0, 0, 0, 3, 3]])
    Verified().add(row, recipe(pattern="2:4"), "layer")
    Verified().add(row[1:], recipe(pattern="paired 2:4"), "layer")
    refused(lambda: Verified().add(row, recipe(pattern="paired 2:4"), "layer"), "layer: group 0 of row 0 keeps more")
    uneven = torch.tensor([[1.0, 2, 3, 0, 0, 0, 0, 1]])
    refused(lambda: Verified().add(uneven, recipe(pattern="2:4"), "layer"), "keeps more than the pattern 2:4")


def test_distance_to_grid_matches_nearest_level():
    steps = torch.tensor([[-8.0, 3, 0, 7], [-7, 3, 0, 7], [5, 2, 0, 1]]) * torch.tensor([[0.013], [0.5], [2.0]])
    assert distance_to_grid(steps.half(), 4).max() < 0.01
    assert distance_to_grid(torch.tensor([[0.0, 7.0, 3.4, 1.55, 6.2, 2.3, 4.9]]), 4) > 0.1


def test_rows_off_a_grid_are_counted():
    verified = Verified()
    weight = torch.tensor([[0.0, 0, 0, 7.0, 3.4, 1.55], [0.0, 0, 0, 7, 3, 2], [0.0, 0, 0, 0, 0, 0]])
    verified.add(weight, recipe(), "layer")
    assert (verified.rows, verified.levels, verified.off_grid) == (3, 4, 1)
    other = Verified()
    other.add(weight[1:], recipe(), "layer")
    other.resembles(0.9)
    verified.join(other)
    assert (verified.rows, verified.off_grid, verified.likeness) == (5, 1, 0.9) and verified.most_zeros == 1.0
