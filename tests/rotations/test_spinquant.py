"""SpinQuant's R.bin: read as it is published, applied as it was learned, and refused where it does not fit."""

import os

import pytest
import torch

from helpers.rotation_files import orthogonal, read, refused, rotated, write_model
from obr.errors import ObrError
from obr.rotations.obtain import make

FAMILY = "qwen2, 14 heads"  # with biases, and values shared by seven query heads


@pytest.fixture
def sizes(tmp_path):
    return write_model(tmp_path, FAMILY)


def r_bin(sizes, seed=0):
    heads = {f"model.layers.{i}.self_attn.R2": orthogonal(sizes.head_dim, seed + i + 1) for i in range(sizes.blocks)}
    return {"R1": orthogonal(sizes.hidden, seed)} | heads


def test_spinquant_file_leaves_logits_unchanged(sizes, tmp_path):
    contents = r_bin(sizes)
    rotation = read(tmp_path, "spinquant", {name: torch.nn.Parameter(t) for name, t in contents.items()})
    assert torch.equal(rotation.parameters["R1"], contents["R1"])
    assert torch.equal(rotation.parameters["blocks.1.R2"], contents["model.layers.1.self_attn.R2"])
    about = rotation.about()
    assert about["kind"] == about["format"] == "spinquant" and len(about["sha256"]) == 64
    assert about["folded"] == ["residual", "value"] and about["online"] == ["down inputs", "queries and keys"]
    assert rotated(FAMILY, rotation)[2] < 1e-5  # the matrices are orthogonal to float32


def test_matrices_multiply_from_the_right_as_they_were_learned(sizes, tmp_path):
    contents = r_bin(sizes)
    plain, model, _ = rotated(FAMILY, read(tmp_path, "spinquant", contents))
    r1, r2 = contents["R1"].double(), contents["model.layers.0.self_attn.R2"].double()
    before, after = plain.model.layers[0], model.model.layers[0]
    assert torch.allclose(model.model.embed_tokens.weight, plain.model.embed_tokens.weight @ r1)
    gain = plain.model.norm.weight
    assert torch.allclose(model.lm_head.weight, (plain.lm_head.weight * gain) @ r1)
    gain = before.input_layernorm.weight
    query = before.self_attn.q_proj.weight * gain @ r1
    assert torch.allclose(after.self_attn.q_proj.weight, query, atol=1e-6)
    blocks = torch.block_diag(*[r2] * sizes.kv_heads)
    assert torch.allclose(
        after.self_attn.v_proj.weight, blocks.T @ (before.self_attn.v_proj.weight * gain @ r1), atol=1e-6
    )
    assert torch.allclose(after.self_attn.v_proj.bias, before.self_attn.v_proj.bias @ blocks, atol=1e-6)
    blocks = torch.block_diag(*[r2] * sizes.heads)
    assert torch.allclose(after.self_attn.o_proj.weight, r1.T @ before.self_attn.o_proj.weight @ blocks, atol=1e-5)
    hadamard = after.mlp.down_proj.transform.matrix()
    assert torch.allclose(after.mlp.down_proj.weight, r1.T @ before.mlp.down_proj.weight @ hadamard, atol=1e-5)
    assert after.self_attn.o_proj.transform is None and after.self_attn.key_value_quantizer.transform is not None


def test_misfit_spinquant_tensors_are_named(sizes, tmp_path):
    whole = r_bin(sizes)

    def attempt(contents):
        return lambda: read(tmp_path, "spinquant", contents)

    last = f"model.layers.{sizes.blocks - 1}.self_attn.R2"
    refused(attempt({k: v for k, v in whole.items() if k != last}), "is for 1 blocks", "but the model has 2")
    refused(attempt({k: v for k, v in whole.items() if k != "R1"}), "lacks ['R1']")
    refused(
        attempt(whole | {"model.layers.0.self_attn.R4": whole["R1"]}), "unexpected key 'model.layers.0.self_attn.R4'"
    )
    refused(attempt(whole | {last: orthogonal(16, 0)}), "blocks.1.R2 has shape (16, 16), but the model needs (8, 8)")
    refused(attempt(whole | {"R1": orthogonal(64, 0)}), "R1 has shape (64, 64), but the model needs (112, 112)")
    refused(attempt(whole | {"R1": whole["R1"] * 1.01}), "R1 is not orthogonal")
    refused(attempt({0: whole}), "no dictionary of tensors by name")
    refused(attempt([whole["R1"]]), "no dictionary of tensors by name")


class Code:
    """What a pickle can hold besides data."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def test_a_file_that_would_run_code_is_refused(sizes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(
        lambda: read(tmp_path, "spinquant", {"R1": Code()}), "is refused", "asks for posix.system", "plain dictionary"
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("contents", [b"", b"no rotation at all", b"PK\x03\x04 half a zip archive"])
def test_invalid_spinquant_files_are_refused(contents, sizes, tmp_path):
    (tmp_path / "R.bin").write_bytes(contents)
    source = {"source": "path", "path": str(tmp_path / "R.bin")}
    with pytest.raises(ObrError, match=r"R\.bin is not a file that torch\.save wrote"):
        make({"kind": "file", "format": "spinquant", "source": source}, tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize(
    "name, folder",
    [("spinquant", "1R2zix4qeXBjcmgnJN1rny93cguJ4rEE8"), ("ostquant", "10kFP3G-qdDvpPik9F9jy49c3yQbGFG6N")],
)
def test_a_missing_file_says_where_to_get_it(name, folder, sizes, tmp_path):
    source = {"source": "path", "path": str(tmp_path / "{model}" / "R.bin")}
    entry = {"kind": "file", "format": name, "source": source}
    refused(
        lambda: make(entry, tmp_path / "model", tmp_path / "out"),
        str(tmp_path / "model" / "R.bin"), "does not exist", f"drive.google.com/drive/folders/{folder}",
    )  # fmt: skip
