"""Scales of channels as SmoothQuant, AWQ and OmniQuant publish them."""

import pytest
import torch

from helpers.family_models import FAMILIES, exact_model
from helpers.rotation_files import inputs_of, read, refused, rotated, scale, write_model
from obr.models.architectures import Dimensions
from obr.rotations import apply, fold

LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("up", "gate", "down")]
WHOLE, GROUPED = "llama, all heads apart", "qwen2, 14 heads"


def act_scales(sizes) -> dict:
    """{layer: largest |input|} of all linear layers, those of one group alike."""
    columns = {"self_attn.o_proj": sizes.heads * sizes.head_dim, "mlp.down_proj": sizes.intermediate}
    return {
        f"model.layers.{i}.{path}": 10 * scale((columns.get(path, sizes.hidden),), i + ("mlp" in path))
        for i in range(sizes.blocks)
        for path in LINEARS
    } | {"lm_head": torch.ones(sizes.hidden)}


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothquant_scales_match_formula(alpha, tmp_path):
    """s = max|X|^α / max|W|^(1-α), W over all layers of the group, divides what they read."""
    sizes = write_model(tmp_path, GROUPED)
    contents = act_scales(sizes)
    rotation = read(tmp_path, "smoothquant", contents, alpha=alpha)
    plain, model, error = rotated(GROUPED, rotation)
    assert error < 1e-9 and rotation.about()["alpha"] == alpha
    mlp = plain.model.layers[0].mlp
    heaviest = torch.maximum(mlp.up_proj.weight.abs().amax(0), mlp.gate_proj.weight.abs().amax(0))
    s = contents["model.layers.0.mlp.up_proj"] ** alpha / heaviest ** (1 - alpha)
    expected = inputs_of(plain, "mlp.up_proj", False) / s
    assert torch.allclose(inputs_of(model, "mlp.up_proj", True), expected, rtol=1e-4)
    down = "mlp.down_proj"
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, plain.model.layers[1].mlp.down_proj.weight), down

    def attempt(change):
        return lambda: read(tmp_path, "smoothquant", change)

    name = "model.layers.1.self_attn.q_proj"
    refused(attempt({k: v for k, v in contents.items() if k != name}), f"lacks '{name}'")
    refused(attempt(contents | {"model.layers.2.mlp.up_proj": torch.ones(112)}), "key 'model.layers.2.mlp.up_proj'")
    refused(attempt(contents | {name: torch.ones(64)}), f"{name} has shape (64,), the model 112 channels")


def awq_search(sizes) -> dict:
    names, clips = [], []
    for i in range(sizes.blocks):
        layer = f"model.layers.{i}"
        q, k, v, o, up, gate, down = (f"{layer}.{path}" for path in LINEARS)
        names.append((f"{layer}.input_layernorm", (q, k, v), scale((sizes.hidden,), i)))
        if sizes.heads == sizes.kv_heads:
            names.append((v, (o,), scale((sizes.hidden,), i + 1)))
        names.append((f"{layer}.post_attention_layernorm", (gate, up), scale((sizes.hidden,), i + 2)))
        names.append((up, (down,), scale((sizes.intermediate,), i + 3)))
        clips += [(v, 0.01 * scale((sizes.rows()["v"], 2, 1), i)), (up, 0.01 * scale((sizes.intermediate, 2, 1), i))]
    return {"scale": names, "clip": clips}


@pytest.mark.parametrize("family", [WHOLE, GROUPED])
def test_awq_scales_match_formula(family, tmp_path):
    """Scales leave the model alone; clips hold for the scaled weights, group by group."""
    sizes = write_model(tmp_path, family)
    contents = awq_search(sizes)
    rotation = read(tmp_path, "awq", contents)
    plain, model, error = rotated(family, rotation)
    assert error < 1e-9
    s = contents["scale"][-1][2]  # of up and down, in the last block
    last, before = model.model.layers[-1].mlp, plain.model.layers[-1].mlp
    assert torch.allclose(last.down_proj.weight, before.down_proj.weight * s)
    norm = contents["scale"][-2][2]
    assert torch.allclose(last.up_proj.weight, before.up_proj.weight * norm / s[:, None])
    clipped = exact_model(FAMILIES[family])
    apply.rotate(clipped, rotation, clip=True)
    limit = contents["clip"][-1][1].double()
    expected = last.up_proj.weight.unflatten(1, (2, -1)).clamp(-limit, limit).flatten(1)
    assert torch.allclose(clipped.model.layers[-1].mlp.up_proj.weight, expected)
    assert rotation.has_clips()
    refused(lambda: read(tmp_path, "awq", {"scale": []}), "no lists 'scale' and 'clip'")
    wrong = {**contents, "scale": [*contents["scale"], ("model.layers.0.mlp.act_fn", (), torch.ones(4))]}
    refused(lambda: read(tmp_path, "awq", wrong), "unexpected key 'model.layers.0.mlp.act_fn'")


def omni_parameters(sizes, shifted=True, groups=1) -> dict:
    m, layers = sizes.head_dim, {}
    for i in range(sizes.blocks):
        layer = {}
        for name, n in (("qkv", sizes.hidden), ("out", sizes.heads * m), ("fc1", sizes.hidden)):
            layer[f"{name}_smooth_scale"] = scale((n,), i)
            layer[f"{name}_smooth_shift"] = scale((n,), i + 1) - 1 if shifted else torch.zeros(n)
        layer["qkt_smooth_scale"] = scale((sizes.heads, m // 2), i).repeat(1, 2).flatten()
        for path, rows in zip(LINEARS, sizes.rows().values(), strict=True):
            for bound, value in (("up", 1.0), ("low", 2.0)):
                layer[f"{path}.weight_quantizer.{bound}bound_factor"] = torch.full((rows * groups, 1), value)
        layers[i] = layer
    return layers


@pytest.mark.parametrize("groups", [1, 4])
def test_omniquant_scales_match_formula(groups, tmp_path):
    """(x - δ) / s in front of qkv and of up and gate, in values, and s on keys; biases give the shifts back."""
    sizes = write_model(tmp_path, WHOLE)
    contents = omni_parameters(sizes, groups=groups)
    rotation = read(tmp_path, "omniquant", contents)
    plain, model, error = rotated(WHOLE, rotation)
    assert error < 1e-9
    wide = {name: tensor.double() for name, tensor in contents[0].items()}
    for name, path in (("qkv", "self_attn.q_proj"), ("fc1", "mlp.gate_proj"), ("out", "self_attn.o_proj")):
        expected = (inputs_of(plain, path, False) - wide[f"{name}_smooth_shift"]) / wide[f"{name}_smooth_scale"]
        assert torch.allclose(inputs_of(model, path, True), expected, atol=1e-6), path
    keys = model.model.layers[0].self_attn.k_proj.weight
    original = plain.model.layers[0].self_attn.k_proj.weight * wide["qkv_smooth_scale"]
    assert torch.allclose(keys, original * wide["qkt_smooth_scale"][:, None])
    assert rotation.parameters["blocks.0.q.clip_high"].shape == (64, groups)
    weight = plain.model.layers[0].mlp.gate_proj.weight
    shrunk, _ = fold.fold_linear("gate", weight, None, rotation.changes(0), clip=True)
    whole, _ = fold.fold_linear("gate", weight, None, rotation.changes(0))
    halves = whole.unflatten(1, (groups, -1)).amax(-1) * torch.tensor(1.0).sigmoid()
    assert torch.allclose(shrunk.unflatten(1, (groups, -1)).amax(-1), halves)


def test_omniquant_files_that_do_not_fit_are_refused(tmp_path):
    sizes = write_model(tmp_path, WHOLE)
    whole = omni_parameters(sizes)
    refused(lambda: read(tmp_path, "omniquant", {0: whole[0]}), "is for 1 blocks", "but the model has 2")
    odd = {i: layer | {"fc2_smooth_scale": torch.ones(96)} for i, layer in whole.items()}
    refused(lambda: read(tmp_path, "omniquant", odd), "unexpected key 'fc2_smooth_scale'")
    name = "mlp.up_proj.weight_quantizer.upbound_factor"
    odd = {i: layer | {name: torch.ones(97, 1)} for i, layer in whole.items()}
    refused(lambda: read(tmp_path, "omniquant", odd), "no whole groups in 96 rows")
    grouped = write_model(tmp_path, GROUPED)
    full = omni_parameters(Dimensions(**{**vars(grouped), "kv_heads": grouped.heads}))
    refused(lambda: read(tmp_path, "omniquant", full), "112 channels, the model has 2 KV heads of 8", "not grouped")
