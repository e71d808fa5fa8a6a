"""Files that belong together: statistics, recipes and outputs of another model, rotation or kind are refused."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import obr
from obr.calibration.collect_hessians import hessian_stage
from obr.checkpoints.format import CheckpointBlocks, load
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.data.token_windows import calibrate
from obr.errors import ObrError
from obr.evaluation.language_model import PlainLM
from obr.evaluation.tasks import download_task
from obr.evaluation.zero_shot import zero_shot
from obr.export.dispatch import export
from obr.models.download import download_model
from obr.models.loading import load_tokenizer
from obr.rotations.obtain import make

GPTQ = {"method": "gptq", "calibration": "c", "hessian": "cached"}


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory) -> Path:
    """Two models of one shape, a rotation, windows, Hessians of the first model, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("belonging")
    other = Path(shutil.copytree(tiny_folder / "model", folder / "source"))
    tensors = load_file(other / "model.safetensors")
    save_file({name: 1.01 * t for name, t in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    for name, path in (("model", tiny_folder / "model"), ("other", other)):
        download_model({"source": "path", "path": str(path)}, folder / name)
    make({"kind": "quarot", "seed": 0}, folder / "model", folder / "rotation.safetensors")
    calibrate(
        folder / "model", tiny_folder / "train.txt", {"nsamples": 4, "seqlen": 64}, folder / "tokens.safetensors"
    )
    hessian_stage(folder / "model", None, folder / "tokens.safetensors", folder / "hessians", device="cpu")
    compress_stage(folder / "model", Recipe.parse({"method": "rtn", "bits": 4}), folder / "checkpoint", device="cpu")
    return folder


def test_hessians_of_another_model_or_rotation_are_refused(folder, tmp_path):
    def compressed(model, rotation):
        recipe = Recipe.parse(GPTQ | {"rotation": "quarot" if rotation else "none"})
        given = {"rotation": rotation, "hessians": folder / "hessians", "device": "cpu"}
        return compress_stage(folder / model, recipe, tmp_path / "out", **given)

    with pytest.raises(ObrError, match=r"are of another model than .*other \(its model\.safetensors differs\)"):
        compressed("other", None)
    with pytest.raises(ObrError, match=r"are not of the model rotated by .*rotation\.safetensors"):
        compressed("model", folder / "rotation.safetensors")
    assert compressed("model", None)["recipe"]["method"] == "gptq"


def test_hessians_of_a_rotated_model_are_refused_without_its_rotation(folder, tmp_path):
    hessian_stage(
        folder / "model", folder / "rotation.safetensors", folder / "tokens.safetensors", tmp_path / "h", device="cpu"
    )
    with pytest.raises(ObrError, match="are not of the model without a rotation; measure them with the rotation"):
        compress_stage(folder / "model", Recipe.parse(GPTQ), tmp_path / "out", hessians=tmp_path / "h", device="cpu")


@pytest.mark.parametrize("key, value", [("bits", 2), ("sparsity", 0.7), ("rotation", "quarot"), ("group", 32)])
def test_a_recipe_for_evaluation_cannot_say_other_of_the_weights(folder, key, value):
    method = "obr_rtn" if key == "sparsity" else "rtn"
    given = {"method": method, "calibration": "c", key: value}
    for way in (lambda: load(folder / "checkpoint", given), lambda: obr.load(folder / "checkpoint", given)):
        with pytest.raises(
            ObrError, match=rf"The recipe's {key} is {value!r}, but the weights of .* were compressed"
        ):
            way()
    blocks = CheckpointBlocks(
        folder / "checkpoint", Recipe.parse({"method": "rtn", "keys": {"bits": 4}}), None, "cpu"
    )
    assert blocks.recipe.keys.bits == 4


def test_an_export_compares_the_weights_with_the_manifest(folder, tmp_path):
    copy = Path(shutil.copytree(folder / "checkpoint", tmp_path / "c"))
    (copy / "block_000.safetensors").rename(copy / "aside")
    (copy / "block_001.safetensors").rename(copy / "block_000.safetensors")
    (copy / "aside").rename(copy / "block_001.safetensors")
    for form in ("compressed-tensors", "gguf"):
        with pytest.raises(ObrError, match=r"block_000\.safetensors is not the file that was written"):
            export(copy, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gguf_replaces_a_gguf_file_alone(folder, tmp_path):
    export(folder / "checkpoint", "gguf", tmp_path / "m.gguf")
    export(folder / "checkpoint", "gguf", tmp_path / "m.gguf")
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ObrError, match=r"thesis\.txt is there and is no GGUF file"):
        export(folder / "checkpoint", "gguf", tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.slow
def test_a_task_is_not_scored_by_attention_that_leaves_quantisers_out(folder, tmp_path):
    rows = [{"passage": "Sky.", "question": "is it blue", "label": i % 2, "idx": i} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    download_task({"source": "path", "task": "boolq", "file": str(tmp_path / "rows.jsonl")}, tmp_path / "task")
    recipe = {"method": "rtn", "keys": {"bits": 2}, "values": {"bits": 2}}
    model, tokenizer = obr.load_model(folder / "model", device="cpu"), load_tokenizer(folder / "model")
    obr.compress(model, None, recipe, progress=False)
    assert zero_shot(model, tokenizer, tmp_path / "task")["n"] == 2
    model.set_attn_implementation("sdpa")
    with pytest.raises(ObrError, match="which attention 'sdpa' leaves out"):
        zero_shot(model, tokenizer, tmp_path / "task")


def test_a_space_after_a_question_belongs_to_its_answer(folder):
    """As in lm-eval: a question that ends in a space would be tokenised otherwise than the text it begins."""
    model = PlainLM.__new__(PlainLM)
    model.tokenizer, model.before, model.truncated = load_tokenizer(folder / "model"), [], 0
    model.max_length = 64
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("The sky is", "The sky is blue")]
    question, answer = model._encode_pair("The sky is ", "blue")
    assert question == ids[0] and question + answer == ids[1]
