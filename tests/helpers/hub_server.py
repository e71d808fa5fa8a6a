"""A hub on this machine: as much of its protocol as huggingface_hub asks for, and a model that it serves."""

import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest

from obr.runtime.files import sha256_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_MODEL = {"source": "hub", "repo": "some/model", "revision": "v1"}


@pytest.fixture(scope="module")
def sharded_model(tmp_path_factory):
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


class Hub(http.server.BaseHTTPRequestHandler):
    """/api/models/OWNER/NAME/{revision,tree}/REV and /OWNER/NAME/resolve/REV/FILE over a folder of files."""

    folder: Path
    refusal: str | None = None
    claims: str | None = None  # the sha256 that the hub says its weights have
    asked: list[str]
    tokens: set[str | None]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        self.asked.append("/".join(parts))
        self.tokens.add(self.headers["Authorization"])
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
                    "sha256": self.claims or sha256_of(path),
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
def hub(sharded_model, tmp_path, monkeypatch):
    folder = tmp_path / "repository"
    shutil.copytree(sharded_model, folder)
    handler = type("ThisHub", (Hub,), {"folder": folder, "asked": [], "tokens": set()})
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
