"""Small files beside the weights travel with them: through download, checkpoint, export and push."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import obr
from obr.checkpoints.verify import verify_checkpoint
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.export.dispatch import export
from obr.export.hub import push
from obr.models.configuration import generation_config
from obr.models.download import download_model
from obr.models.side_files import is_side_file, side_files

obr.register_with_transformers()

RTN = Recipe.parse({"method": "rtn", "bits": 8})
SETTINGS = {"eos_token_id": [1, 67], "do_sample": True, "temperature": 0.6, "pad_token_id": 1}
TEXT = "The Union, and <extra> more."
CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def source(tiny_folder, tmp_path_factory) -> Path:
    """The tiny model with all that its tokenizer and `generate` may read."""
    folder = Path(shutil.copytree(tiny_folder / "model", tmp_path_factory.mktemp("sidefiles") / "source"))
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_special_tokens(["<extra>"])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    inner.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps(SETTINGS))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool.jinja").write_text("tool {{ messages[0].content }}")
    for name in ("added_tokens.json", "special_tokens_map.json", "vocab.json"):
        (folder / name).write_text("{}")
    for name in ("merges.txt", "tokenizer.model", "tekken.json", "qwen.tiktoken", "LICENSE.txt", "NOTICE"):
        (folder / name).write_text("x")
    for name in ("README.md", "training_args.bin", "trainer_state.json", "own.py"):
        (folder / name).write_text("no part of the model")
    return folder


SMALL = {
    "added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model", "tekken.json",
    "qwen.tiktoken", "LICENSE.txt", "NOTICE", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "chat_template.jinja", "additional_chat_templates/tool.jinja",
}  # fmt: skip


@pytest.fixture(scope="module")
def copies(source, tmp_path_factory) -> dict[str, Path]:
    """Every kind of folder that is made of it."""
    folder = tmp_path_factory.mktemp("copies")
    download_model({"source": "path", "path": str(source)}, folder / "download")
    compress_stage(folder / "download", RTN, folder / "checkpoint", device="cpu")
    export(folder / "checkpoint", "compressed-tensors", folder / "export")
    push(folder / "checkpoint", "you/name", folder / "push", "mit")
    return {name: folder / name for name in ("download", "checkpoint", "export", "push")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["download", "checkpoint", "export", "push"])
def test_side_files_arrive_as_they_are(kind, copies, source):
    assert set(side_files(source)) == SMALL == set(side_files(copies[kind]))
    for name in SMALL:
        assert (copies[kind] / name).read_bytes() == (source / name).read_bytes(), name
    assert not {"training_args.bin", "trainer_state.json", "own.py"} & {p.name for p in copies[kind].iterdir()}


@pytest.mark.parametrize("kind", ["download", "checkpoint", "export", "push"])
def test_source_and_copy_tokenise_alike(kind, copies, source):
    theirs, ours = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(copies[kind])
    for options in ({}, {"add_special_tokens": False}):
        assert ours(TEXT, **options)["input_ids"] == theirs(TEXT, **options)["input_ids"]
    assert ours(TEXT)["input_ids"][0] == 0 and ours(TEXT)["input_ids"][-1] == 1
    assert ours.special_tokens_map == theirs.special_tokens_map
    for template in (None, "tool"):
        chats = [t.apply_chat_template(CHAT, chat_template=template, tokenize=False) for t in (ours, theirs)]
        assert chats[0] == chats[1] and "Hello" in chats[0]


@pytest.mark.parametrize("kind", ["download", "checkpoint", "export", "push"])
def test_generation_reads_the_same_settings(kind, copies, source):
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (source, copies[kind])]
    if kind in ("checkpoint", "push"):
        models.append(obr.load(copies[kind], device="cpu"))
    for model in models:
        settings = model.generation_config
        assert (settings.eos_token_id, settings.do_sample, settings.temperature) == ([1, 67], True, 0.6)
    written = [model.generate(torch.tensor([[0, 5, 9]]), max_new_tokens=20, do_sample=False) for model in models[1:]]
    assert all(torch.equal(written[0], other) for other in written)


def test_a_checkpoint_is_verified_with_them(copies, tmp_path):
    assert verify_checkpoint(copies["checkpoint"]) == [] == verify_checkpoint(copies["push"])
    files = json.loads((copies["checkpoint"] / "manifest.json").read_text())["files"]
    assert set(files) >= SMALL
    altered = Path(shutil.copytree(copies["checkpoint"], tmp_path / "c"))
    (altered / "additional_chat_templates/tool.jinja").write_text("other")
    (altered / "additional_chat_templates/stray.jinja").write_text("other")
    assert [problem.split("/")[-1][:11] for problem in verify_checkpoint(altered)] == ["tool.jinja ", "stray.jinja"]
    source = json.loads((copies["download"] / "source.json").read_text())
    assert set(source["sha256"]) >= SMALL


def test_settings_of_a_model_in_memory_are_saved(source, tmp_path):
    model = obr.load_model(source, device="cpu")
    model.generation_config.max_new_tokens = 7
    model.generation_config.do_sample = False  # with a temperature, which save_pretrained refuses
    obr.save(obr.compress(model, None, {"method": "rtn"}, progress=False), tmp_path / "c")
    for loaded in (obr.load(tmp_path / "c"), AutoModelForCausalLM.from_pretrained(tmp_path / "c")):
        settings = loaded.generation_config
        assert (settings.eos_token_id, settings.max_new_tokens, settings.temperature) == ([1, 67], 7, 0.6)


def test_settings_that_older_models_keep_in_their_config_are_not_lost(source, tmp_path):
    """config.json of a checkpoint has no room for them."""
    folder = Path(shutil.copytree(source, tmp_path / "m"))
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"do_sample": True, "top_k": 11, "repetition_penalty": 1.5})
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder).generation_config
    download_model({"source": "path", "path": str(folder)}, tmp_path / "d")
    compress_stage(tmp_path / "d", RTN, tmp_path / "c", device="cpu")
    for settings in (theirs, obr.load(tmp_path / "c").generation_config):
        assert (settings.do_sample, settings.top_k, settings.repetition_penalty) == (True, 11, 1.5)


def test_a_model_without_settings_gets_none(tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder / "model", tmp_path / "m"))
    (folder / "generation_config.json").unlink()
    compress_stage(folder, RTN, tmp_path / "c", device="cpu")
    assert generation_config(folder) is None and not (tmp_path / "c/generation_config.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"cache_implementation": 3, "num_beams": "x"}'])
def test_settings_that_cannot_be_read_are_refused(text, tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder / "model", tmp_path / "m"))
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(
        ObrError, match=r"generation_config\.json of .* cannot be read .*correct it, or choose another"
    ):
        download_model({"source": "path", "path": str(folder)}, tmp_path / "d")


def test_weights_and_code_are_no_side_files():
    for name in (
        "model.safetensors", "tokenizer.py", "tokenization_own.py", "config.json", "source.json", "manifest.json",
        "layers.csv", "sub/tokenizer.json", "additional_chat_templates/x.py", "pytorch_model.bin", "README.md",
    ):  # fmt: skip
        assert not is_side_file(name), name
