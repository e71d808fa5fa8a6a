"""FlatQuant's flat_matrices.pth: every tensor of it lands where it was learned, or the file is refused."""

import pytest
import safetensors.torch
import torch

import obr
from helpers.family_models import FAMILIES, TOKENS, random_model
from helpers.rotation_files import inputs_of, invertible, read, refused, rotated, scale, write_model
from obr.compression.stage import compress_stage
from obr.config.quantizer import QuantizerSettings
from obr.config.recipe import Recipe
from obr.models.fake_quant import fake_quantize
from obr.rotations import registry
from obr.rotations.flatquant import factor_pair
from obr.rotations.fold import clip_learned

FAMILY = "qwen2, 14 heads"
LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("up", "gate", "down")]


@pytest.fixture
def sizes(tmp_path):
    return write_model(tmp_path, FAMILY)


def pair(name: str, n: int, seed: int) -> dict:
    left, right = (invertible(size, seed + i) for i, size in enumerate(factor_pair(n)))
    dual = {"left": torch.linalg.inv(left).T, "right": torch.linalg.inv(right).T}
    return {
        f"{name}.matrix_left": left, f"{name}.matrix_right": right, f"{name}.diag_scale": scale((n,), seed),
        f"{name}.matrix_left_inv": dual["left"], f"{name}.matrix_right_inv": dual["right"],
    }  # fmt: skip


def flat_matrices(sizes) -> dict:
    """{layer: tensors} as FlatQuant saves them at W4A4KV4 with LWC and LAC."""
    layers = {}
    for index in range(sizes.blocks):
        layer = pair("self_attn.ln_trans", sizes.hidden, index) | pair("mlp.up_gate_trans", sizes.hidden, index + 10)
        layer |= pair("mlp.down_trans", sizes.intermediate, index + 20)
        for name, size in (("o", sizes.heads), ("kcache", sizes.head_dim), ("vcache", sizes.head_dim)):
            matrix = invertible(size, index + size)
            layer[f"self_attn.{name}_trans.matrix"] = matrix
            layer[f"self_attn.{name}_trans.matrix_inv_t"] = torch.linalg.inv(matrix).T
        for path, rows in zip(LINEARS, sizes.rows().values()):
            for bound, value in (("max", 2.0), ("min", 1.0)):
                layer[f"{path}.clip_factor_w_{bound}"] = torch.full((rows, 1), value)
                layer[f"{path}.act_quantizer.clip_factor_a_{bound}"] = torch.full((1,), value + index)
        for cache in "kv":
            for bound in ("max", "min"):
                layer[f"self_attn.{cache}_cache_quantizer.clip_factor_a_{bound}"] = torch.full((1,), 3.0)
        layers[index] = layer
    return layers


def test_flatquant_file_leaves_logits_unchanged(sizes, tmp_path):
    contents = flat_matrices(sizes)
    rotation = read(tmp_path, "flatquant", contents)
    inverses = sum(name.endswith(("_inv", "_inv_t")) for layer in contents.values() for name in layer)
    assert len(rotation.parameters) == sum(map(len, contents.values())) - inverses
    assert torch.equal(rotation.parameters["blocks.1.down.left"], contents[1]["mlp.down_trans.matrix_left"])
    assert rotation.about()["online"] == [
        "qkv inputs", "up_gate inputs", "down inputs", "o inputs", "queries and keys"
    ]  # fmt: skip
    assert rotated(FAMILY, rotation)[2] < 1e-9


def test_activations_are_transformed_as_the_formulas_say(sizes, tmp_path):
    """In block 0: (x c)(L ⊗ R) in front of a group, Oᵀ X on heads, v P per head, k P and q P^-T after RoPE."""
    layer = flat_matrices(sizes)[0]
    plain, model, _ = rotated(FAMILY, read(tmp_path, "flatquant", {i: flat_matrices(sizes)[i] for i in range(2)}))
    wide = {name: tensor.double() for name, tensor in layer.items()}
    for trans, path in (
        ("self_attn.ln_trans", "self_attn.q_proj"),
        ("mlp.up_gate_trans", "mlp.gate_proj"),
        ("mlp.down_trans", "mlp.down_proj"),
    ):
        left, right = wide[f"{trans}.matrix_left"], wide[f"{trans}.matrix_right"]
        x = (inputs_of(plain, path, False) * wide[f"{trans}.diag_scale"]).unflatten(-1, (len(left), len(right)))
        assert torch.allclose(inputs_of(model, path, True), (left.T @ x @ right).flatten(1), atol=1e-8), path
    value, heads = wide["self_attn.vcache_trans.matrix"], wide["self_attn.o_trans.matrix"]
    x = inputs_of(plain, "self_attn.o_proj", False).unflatten(-1, (sizes.heads, sizes.head_dim))
    assert torch.allclose(inputs_of(model, "self_attn.o_proj", True), (heads.T @ (x @ value)).flatten(1), atol=1e-8)
    keys, quantizer = wide["self_attn.kcache_trans.matrix"], model.model.layers[0].self_attn.key_value_quantizer
    x = torch.randn(1, 2, 3, sizes.head_dim, dtype=torch.float64)
    query, key, same = quantizer(x, x, x)
    assert torch.allclose(key, x @ keys) and torch.allclose(query, x @ torch.linalg.inv(keys).T)
    assert torch.equal(same, x)


@pytest.mark.parametrize("left_out", ["diag_scale", "clip_factor", "kcache", "vcache"])
def test_flatquant_file_without_optional_part_is_read(left_out, sizes, tmp_path):
    contents = {i: {k: v for k, v in layer.items() if left_out not in k} for i, layer in flat_matrices(sizes).items()}
    assert rotated(FAMILY, read(tmp_path, "flatquant", contents))[2] < 1e-9


def test_misfit_flatquant_tensors_are_named(sizes, tmp_path):
    def attempt(change):
        contents = flat_matrices(sizes)
        change(contents)
        return lambda: read(tmp_path, "flatquant", contents)

    name = "self_attn.ln_trans.matrix_left"
    refused(attempt(lambda c: c.pop(1)), "is for 1 blocks", "but the model has 2")
    refused(attempt(lambda c: [layer.pop(name) for layer in c.values()]), "qkv.left.dual is not the inverse")
    refused(attempt(lambda c: c[1].pop("mlp.down_proj.clip_factor_w_max")), "lacks ['blocks.1.down.clip_high']")
    refused(attempt(lambda c: c[0].update(new=torch.ones(1))), "unexpected key 'new'")
    inverse = "self_attn.vcache_trans.matrix_inv_t"  # as if it held the inverse, not transposed
    refused(
        attempt(lambda c: c[0].update({inverse: c[0][inverse].T})), "layer 0 value.dual is not the inverse transpose"
    )
    narrow = {f"self_attn.vcache_trans.{part}": torch.eye(4) for part in ("matrix", "matrix_inv_t")}
    refused(attempt(lambda c: c[0].update(narrow)), "blocks.0.value has shape (4, 4), but the model needs (8, 8)")
    torch.save({"R1": torch.eye(2)}, tmp_path / "published.pth")
    refused(lambda: read(tmp_path, "flatquant", {"R1": torch.eye(2)}), "no dictionary by layer number")


def test_learned_clips_of_weights_come_between_inputs_and_outputs(sizes, tmp_path):
    """As FlatQuant does: values are mixed over the channels of a head after the rows have been clipped."""
    from obr.rotations import fold

    rotation = read(tmp_path, "flatquant", flat_matrices(sizes))
    weight = random_model(FAMILIES[FAMILY]).model.layers[0].self_attn.v_proj.weight
    changes = rotation.changes(0)
    read_in = changes.inputs["qkv"].dual()(weight / changes.norms["qkv"])
    low, high = read_in.amin(1, keepdim=True), read_in.amax(1, keepdim=True)
    expected = torch.minimum(
        torch.maximum(read_in, torch.tensor(1.0).sigmoid() * low), torch.tensor(2.0).sigmoid() * high
    )
    value = torch.block_diag(*[rotation.parameters["blocks.0.value"].double()] * sizes.kv_heads)
    clipped_weight, _ = fold.fold_linear("v", weight, None, changes, clip=True)
    assert torch.allclose(clipped_weight, value.T @ expected)
    unclipped, _ = fold.fold_linear("v", weight, None, changes)
    assert torch.allclose(unclipped, value.T @ read_in)


def test_clips_wide_open_are_no_clips():
    weight = torch.randn(3, 8, dtype=torch.float64)
    wide = torch.full((3, 1), 40.0, dtype=torch.float64)
    assert torch.allclose(clip_learned(weight, (wide, wide)), weight)
    four = torch.full((3, 1), 4.0)
    assert torch.allclose(clip_learned(weight, (four, four)).amax(1), 0.98201 * weight.amax(1), rtol=1e-5)
    groups = torch.tensor([[0.0, 40.0]]).expand(3, 2)  # the first half at half its range, the second as it is
    assert torch.allclose(clip_learned(weight, (groups, groups))[:, 4:], weight[:, 4:])
    assert torch.allclose(clip_learned(weight, (groups, groups))[:, :4].amax(1), weight[:, :4].amax(1) / 2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_learned_ranges_shrink_the_grid_of_activations(symmetric):
    from obr.models.online_transforms import Range

    x = torch.tensor([[-4.0, -1.0, 0.5, 2.0]])
    learned = QuantizerSettings(8, symmetric, clip_ratio="learned")
    whole = fake_quantize(x, learned, Range(torch.ones(1), torch.ones(1)))
    assert torch.allclose(whole, fake_quantize(x, QuantizerSettings(8, symmetric)))
    halved = fake_quantize(x, learned, Range(torch.tensor([0.5]), torch.tensor([0.5])))
    assert halved.min() == pytest.approx(-2.0, abs=0.03)
    assert halved.max() == pytest.approx(2.0 if symmetric else 1.0, abs=0.03)


def test_learned_clipping_of_recipe_is_applied(sizes, tmp_path):
    """Of weights only from a model whose weights were shrunk, of activations only where a range was learned."""
    rotation = read(tmp_path, "flatquant", flat_matrices(sizes))
    recipe = {"method": "rtn", "bits": 4, "clip": "learned", "activations": {"bits": 4, "clip_ratio": "learned"}}
    model = obr.rotate(random_model(FAMILIES[FAMILY], torch.float32), rotation)
    refused(lambda: obr.compress(model, None, recipe, progress=False), "rotate with clip=True")
    model = obr.rotate(random_model(FAMILIES[FAMILY], torch.float32), rotation, clip=True)
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    obr.compress(model, None, recipe, progress=False)
    linear = model.model.layers[0].self_attn.q_proj
    step = weight.abs().amax(1, keepdim=True) / 7  # minmax of what the fold has clipped
    assert ((linear.weight - weight).abs() <= step * 0.51).all()
    narrower = model(TOKENS).logits
    for linear in (module for name, module in model.named_modules() if name.endswith("_proj")):
        linear.range = type(linear.range)(linear.range.low / 2, linear.range.high / 2)
    assert not torch.equal(model(TOKENS).logits, narrower)
    quarot = obr.rotate(random_model(FAMILIES[FAMILY], torch.float32), "quarot")
    recipe = {"method": "rtn", "activations": {"bits": 4, "clip_ratio": "learned"}}
    refused(lambda: obr.compress(quarot, None, recipe, progress=False), "no range for the inputs of self_attn.q_proj")


PAIRS = {
    2048: (32, 64), 3584: (56, 64), 4096: (64, 64), 5120: (64, 80), 8192: (64, 128), 11008: (86, 128),
    13824: (108, 128), 14336: (112, 128), 18944: (128, 148), 27648: (144, 192), 28672: (128, 224), 6: (2, 3),
}  # fmt: skip


@pytest.mark.parametrize("n, expected", PAIRS.items())
def test_factor_pairs_are_those_of_the_published_files(n, expected):
    assert factor_pair(n) == expected


def compressed(folder, out, tokens, **options):
    """The stage on the model and rotation there; the checkpoint's model and manifest."""
    safetensors.torch.save_file({"tokens": tokens}, folder / "tokens.safetensors", metadata={"calibration": "{}"})
    recipe = Recipe.parse({"method": "gptq", "rotation": "flat", "calibration": "c", "clip": "learned", **options})
    manifest = compress_stage(
        folder / "model", recipe, out, rotation=folder / "rotation.safetensors", tokens=folder / "tokens.safetensors",
        device="cpu",
    )  # fmt: skip
    return obr.load(out, device="cpu"), manifest


@pytest.mark.slow
def test_the_stage_does_what_compressing_in_memory_does(sizes, tmp_path):
    """FlatQuant's own recipe: weights within learned bounds, Hessians of quantised inputs, learned ranges."""
    random_model(FAMILIES[FAMILY], torch.float16).save_pretrained(tmp_path / "model")  # the dtype of what is kept
    rotation = read(tmp_path, "flatquant", flat_matrices(sizes))
    low = {"bits": 4, "clip_ratio": "learned"}
    heads = {**low, "symmetric": False, "group_size": "head"}
    options = {"activations": low, "keys": heads, "values": heads}
    tokens = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    loaded, manifest = compressed(tmp_path, tmp_path / "a", tokens, hessian_inputs="quantised", **options)
    assert manifest["rotation"]["clipped"] and manifest["rotation"]["format"] == "flatquant"
    model = obr.rotate(obr.load_model(tmp_path / "model", device="cpu"), rotation, clip=True)
    recipe = {"method": "gptq", "clip": "learned", "hessian_inputs": "quantised", **options}
    obr.compress(model, tokens, recipe, progress=False)
    assert torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-4)
    plain, _ = compressed(tmp_path, tmp_path / "b", tokens, hessian_inputs="plain", **options)
    for name in ("q_proj", "o_proj"):  # the Hessian is another one from the first layer on
        first, second = (m.model.layers[0].self_attn.get_submodule(name).weight for m in (loaded, plain))
        assert not torch.equal(first, second), name
    spin = {"rotation": tmp_path / "spin.safetensors", "tokens": tmp_path / "tokens.safetensors", "device": "cpu"}
    registry.save(registry.draw("spinquant", sizes), spin["rotation"])
    recipe = Recipe.parse({"method": "gptq", "rotation": "spin", "calibration": "c", "clip": "learned"})
    refused(lambda: compress_stage(tmp_path / "model", recipe, tmp_path / "c", **spin), "learned weight clipping")


def test_observers_see_inputs_quantised_if_asked():
    model = obr.rotate(random_model(FAMILIES[FAMILY], torch.float32), "quarot")
    linear, seen = model.model.layers[0].mlp.down_proj, []
    linear.activations, linear.observer = QuantizerSettings(3), seen.append
    model(TOKENS)
    linear.observes_quantised = True
    model(TOKENS)
    assert torch.equal(fake_quantize(seen[0], QuantizerSettings(3)), seen[1]) and not torch.equal(*seen)
    assert max(len(row.unique()) for row in seen[1].flatten(0, -2)) <= 8


def test_recipes_with_options_that_exclude_each_other_are_refused():
    def attempt(**entry):
        return lambda: Recipe.parse({"method": "gptq", "calibration": "c", **entry})

    refused(attempt(hessian="cached", hessian_inputs="quantised"), "cached Hessians are of plain inputs")
    refused(attempt(activations={"clip_ratio": "learnt"}), "clip_ratio learnt must lie in (0, 1], or be learned")
    refused(attempt(keys={"group_size": "heads"}), "group_size heads must be positive, head, or null")
    refused(attempt(online="float16"), "online is 'float16'; choose one of model, float32, float64")
    quantised, plain = (
        Recipe.parse({"method": "rtn", "hessian_inputs": inputs, "activations": {"bits": 4}})
        for inputs in ("quantised", "plain")
    )
    assert "activations" in quantised.decisive() and "activations" not in plain.decisive()


@pytest.mark.parametrize("online", ["model", "float32", "float64"])
def test_online_transforms_are_as_precise_as_the_recipe_says(online):
    model = obr.rotate(random_model(FAMILIES[FAMILY], torch.float32), "quarot")
    obr.compress(model, None, {"method": "rtn", "bits": 8, "online": online}, progress=False)
    transform = model.model.layers[0].mlp.down_proj.transform
    x = torch.randn(64, 296, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() @ transform.matrix()
    error = float((transform(x).double() - exact).norm() / exact.norm())
    assert transform(x).dtype == torch.bfloat16
    assert 2e-3 < error < 2.5e-3 if online == "model" else error < 2e-3  # two roundings, or one
    wide = transform(x.float())
    assert wide.dtype == torch.float32
    if online == "float64":
        assert torch.equal(wide, exact.float())
