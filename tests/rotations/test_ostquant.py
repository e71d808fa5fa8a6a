"""OSTQuant's model.bin: learned scales and rotations end up on the right side of the right layer."""

import pytest
import torch

from helpers.rotation_files import orthogonal, read, refused, rotated, scale, write_model

FAMILY = "llama"  # six heads share two KV heads


@pytest.fixture
def sizes(tmp_path):
    return write_model(tmp_path, FAMILY)


def model_bin(sizes, tied=True) -> dict:
    """The flat state dict of what OSTQuant trains."""
    k, m = sizes.kv_heads, sizes.head_dim
    state = {"R_res.weight": orthogonal(sizes.hidden, 0)}
    for index in range(sizes.blocks):
        keys = scale((k, m // 2), index).repeat(1, 2) if tied else scale((k, m), index)
        module = f"model.layers.{index}.R_S_modules"
        state |= {
            f"{module}.S_up_down.weight": scale((sizes.intermediate,), index + 1),
            f"{module}.S_qk.weight": keys.flatten(),
            f"{module}.S_ov.weight": scale((k * m,), index + 2),
            f"{module}.S_norm_qkv.weight": scale((sizes.hidden,), index + 3),
            f"{module}.S_norm_upgate.weight": scale((sizes.hidden,), index + 4),
        }
        state |= {f"{module}.R_ov.weight.{j}": orthogonal(m, 10 * index + j) for j in range(k)}
    return state


@pytest.mark.parametrize("online", [False, True])
def test_ostquant_file_leaves_logits_unchanged(online, sizes, tmp_path):
    rotation = read(tmp_path, "ostquant", model_bin(sizes), online_query_key=online)
    assert rotation.about()["online"] == ["down inputs"] + ["queries and keys"] * online
    assert "key_scale_untied" not in rotation.about()
    assert rotated(FAMILY, rotation)[2] < 1e-5  # the matrices are orthogonal to float32


def test_untied_key_scales_are_loaded_and_the_drift_is_recorded(sizes, tmp_path):
    """As published files have them: the 16-bit model is no longer what it was, and the manifest says so."""
    rotation = read(tmp_path, "ostquant", model_bin(sizes, tied=False))
    assert 0.1 < rotation.about()["key_scale_untied"] < 3
    assert rotated(FAMILY, rotation)[2] > 1e-3


def test_scales_and_rotations_are_where_the_formulas_have_them(sizes, tmp_path):
    contents = model_bin(sizes)
    plain, model, _ = rotated(FAMILY, read(tmp_path, "ostquant", contents))
    before, after = plain.model.layers[0], model.model.layers[0]
    wide = {k.removeprefix("model.layers.0.R_S_modules."): v.double() for k, v in contents.items()}
    r, s = wide["R_res.weight"], {name: wide[f"S_{name}.weight"] for name in ("qk", "ov", "up_down")}
    gain, norm = before.input_layernorm.weight, wide["S_norm_qkv.weight"]
    group = sizes.heads // sizes.kv_heads

    def of_queries(x):
        return x.view(sizes.kv_heads, 1, -1).expand(-1, group, -1).flatten()

    def reads(linear):
        return linear.weight * gain @ r * norm

    def close(a, b):
        assert torch.allclose(a, b, atol=1e-5)

    close(after.input_layernorm.weight, 1 / norm)
    attention, old = after.self_attn, before.self_attn
    close(attention.k_proj.weight, reads(old.k_proj) * s["qk"][:, None])
    close(attention.q_proj.weight, reads(old.q_proj) / of_queries(s["qk"])[:, None])
    matrices = [wide[f"R_ov.weight.{j}"] for j in range(sizes.kv_heads)]
    close(attention.v_proj.weight, torch.block_diag(*matrices).T @ (reads(old.v_proj) / s["ov"][:, None]))
    of_heads = torch.block_diag(*[matrices[i // group] for i in range(sizes.heads)])
    close(attention.o_proj.weight, r.T @ (old.o_proj.weight * of_queries(s["ov"])) @ of_heads)
    gain, norm = before.post_attention_layernorm.weight, wide["S_norm_upgate.weight"]
    close(after.post_attention_layernorm.weight, 1 / norm)
    close(after.mlp.up_proj.weight, reads(before.mlp.up_proj) / s["up_down"][:, None])
    close(after.mlp.gate_proj.weight, reads(before.mlp.gate_proj))
    hadamard = after.mlp.down_proj.transform.matrix()
    close(after.mlp.down_proj.weight, r.T @ (before.mlp.down_proj.weight * s["up_down"]) @ hadamard)
    assert torch.equal(model.model.norm.weight, torch.ones_like(model.model.norm.weight))


def test_misfit_ostquant_tensors_are_named(sizes, tmp_path):
    whole, module = model_bin(sizes), "model.layers.1.R_S_modules"

    def without(*names):
        return lambda: read(tmp_path, "ostquant", {k: v for k, v in whole.items() if k not in names})

    def instead(**tensors):
        changed = {f"{module}.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
        return lambda: read(tmp_path, "ostquant", whole | changed)

    refused(without("R_res.weight"), "lacks ['R_res']")
    refused(without(f"{module}.S_ov.weight"), "lacks ['blocks.1.S_ov']")
    refused(without(f"{module}.R_ov.weight.1"), "blocks.1.R_ov has no equal matrices for 2 KV heads")
    refused(without(*(name for name in whole if name.startswith(module))), "is for 1 blocks", "the model has 2")
    refused(instead(R_ov__weight__2=torch.eye(16)), "has ['blocks.1.R_ov.2'] too many")
    refused(instead(S_qk__weight=torch.ones(96)), "S_qk has 96 channels, the model has 2 KV heads of 16")
    refused(instead(S_up_gate__weight=torch.ones(344)), f"unexpected key '{module}.S_up_gate.weight'")
    refused(instead(S_up_down__weight=torch.zeros(344)), "blocks.1.S_up_down is a scale with zeros")
    refused(instead(R_ov__weight__0=2 * torch.eye(16)), "blocks.1.R_ov is not orthogonal")
