"""Publishing: the folder that would be uploaded, the card in it, and the upload to a stand-in of the hub."""

import base64
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import yaml

from helpers.fabricated_results import change_scores, evaluation, save_score
from obr.errors import ObrError
from obr.export.hub import push
from obr.export.model_card import model_card
from obr.runtime.files import finite

MANIFEST = {
    "format": 1,
    "recipe": {
        "method": "obr_gptq", "bits": 4, "sparsity": 0.5, "rotation": "quarot", "calibration": "wikitext2",
        "activations": {"bits": 4}, "keys": {"bits": 4}, "values": {"bits": 4}, "label": "OBR_GPTQ",
    },
    "bits_per_weight": {"theoretical": 3.0, "file": 3.05},
    "file_bytes": 156_338_816,
    "relative_error": 0.024,
    "flagged_layers": 2,
    "calibration": {"tokens": 262144, "text": "wikitext2_train"},
    "source": {"source": {"source": "hub", "repo": "meta-llama/Llama-2-7b-hf"}, "licence": "llama2"},
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint in a results folder, with evaluations of it and of the dense model."""
    folder = tmp_path / "results/compressed/llama/obr_gptq"
    folder.mkdir(parents=True)
    contents = {"block_000.safetensors": b"weights", "ends.safetensors": b"ends", "config.json": b"{}"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    (folder / "manifest.json").write_text(json.dumps({**MANIFEST, "blocks": 1, "files": files}))
    (folder / "leftover.tmp").write_text("half")
    (folder / "passwords.txt").write_text("no part of the checkpoint")
    (folder / "notes").mkdir()
    (folder / "notes/.env").write_text("no part of the checkpoint")
    for recipe, value in (("dense", 5.47), ("obr_gptq", 8.4)):
        for stage, name, content in (
            ("perplexity", "wikitext2", {"value": value}),
            ("zero_shot", "piqa", {"value": 0.7, "metric": "acc_norm"}),
        ):
            save_score((tmp_path / "results", "llama", recipe, "a16"), stage, name, content)
    return folder


def test_a_dry_run_writes_exactly_what_would_be_uploaded(checkpoint, tmp_path):
    out = tmp_path / "out"
    command = ["push", str(checkpoint), "me/small", "--dry-run", str(out)]
    run = subprocess.run([sys.executable, "-m", "obr", *command], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == str(out), run.stderr
    assert {p.name for p in out.iterdir()} == {
        "README.md", "block_000.safetensors", "config.json", "ends.safetensors", "manifest.json",
    }  # fmt: skip
    assert (out / "block_000.safetensors").read_bytes() == b"weights"
    assert not (checkpoint / "README.md").exists() and not list(checkpoint.parent.glob("*.push*"))


def test_model_card_states_recipe_scores_and_licence(checkpoint):
    card = model_card(checkpoint, MANIFEST, "me/small")
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "llama2" and metadata["base_model"] == "meta-llama/Llama-2-7b-hf"
    for text in (
        "# small",
        "meta-llama/Llama-2-7b-hf compressed by obr_gptq to W4A4KV4 at 50 % sparsity, rotated by quarot",
        "3.00 bits a weight in theory and 3.05",
        "| dense | 5.47 | 70.00 |",
        "| obr_gptq | 8.40 | 70.00 |",
        "relative error of the layers' outputs on the calibration data: 0.0240",
        "262,144 tokens of wikitext2_train",
        "--rotation ROTATION.safetensors --tokens TOKENS.safetensors",
        "stay under its licence, llama2",
        "2 layers did not go as asked",
        'obr.load(snapshot_download("me/small"))',
    ):
        assert text in card, text
    recipe = json.loads(re.search(r"```json\n(.*?)```", card, re.S)[1])
    assert recipe["alpha"] == 0.5 and recipe["keys"]["bits"] == 4


def test_the_card_says_what_was_measured_and_shows_infinities(checkpoint, tmp_path):
    path = evaluation(tmp_path / "results", "llama", "obr_gptq")
    change_scores(path, "perplexity", **finite("value", math.inf), definition="made up; no special tokens")
    change_scores(path, "zero_shot", prompts="no special tokens")
    card = model_card(checkpoint, MANIFEST, "me/small")
    assert "| obr_gptq | inf | 70.00 |" in card
    assert "WikiText-2 perplexity: made up; no special tokens. Zero-shot prompts: no special tokens." in card
    assert "None" not in card


def test_the_card_has_a_line_for_each_activation_scheme(checkpoint, tmp_path):
    save_score((tmp_path / "results", "llama", "obr_gptq", "a4kv4"), "perplexity", "wikitext2", {"value": 9.1})
    card = model_card(checkpoint, MANIFEST, "me/small")
    assert "| obr_gptq | 8.40 | 70.00 |" in card and "| obr_gptq, a4kv4 | 9.10 | – |" in card


def test_an_unknown_licence_must_be_given_and_an_odd_one_is_named(checkpoint):
    silent = {**MANIFEST, "source": None}
    with pytest.raises(ObrError, match="does not record its base model's licence; give it with --licence"):
        model_card(checkpoint, silent, "me/small")
    assert 'license_name: "my own"' in model_card(checkpoint, silent, "me/small", "my own")


def test_invalid_push_options_raise_one_sentence(checkpoint, tmp_path):
    with pytest.raises(ObrError, match="'small' is not the name of a hub repository; write it as owner/name"):
        push(checkpoint, "small", tmp_path / "out")
    with pytest.raises(ObrError, match=r"is no packed checkpoint: it has no manifest\.json"):
        push(tmp_path, "me/small", tmp_path / "out")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ObrError, match=r"holds thesis\.txt and is not a checkpoint"):
        push(checkpoint, "me/small", tmp_path / "thesis")


def test_the_upload_folder_shares_nothing_with_the_checkpoint(checkpoint, tmp_path):
    push(checkpoint, "me/small", tmp_path / "out")
    (tmp_path / "out/config.json").write_text("edited", encoding="utf-8")
    assert (checkpoint / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda folder: (folder / "block_000.safetensors").write_bytes(b"changed"), "block_000.* is not the file"),
        (lambda folder: (folder / "config.json").write_bytes(b"{ }"), "config.json is not the file"),
        (lambda folder: (folder / "ends.safetensors").unlink(), "lacks ends.safetensors"),
        (
            lambda folder: (folder / "block_001.safetensors").write_bytes(b"more"),
            "block_001.* is not in the manifest",
        ),
    ],
)
def test_a_checkpoint_that_is_not_as_written_is_not_pushed(checkpoint, tmp_path, change, refusal):
    change(checkpoint)
    with pytest.raises(ObrError, match=refusal):
        push(checkpoint, "me/small", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files needs; what was committed is kept."""

    committed: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    refuse = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        self.asked.append(self.path)
        if self.refuse:
            return self._answer({"error": "forbidden"}, 403)
        if self.path.endswith("/repos/create"):
            return self._answer({"url": f"http://{self.headers['Host']}/me/{json.loads(body)['name']}"})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"http://{self.headers['Host']}/me/small/commit/abc"
            return self._answer({"commitUrl": address, "commitOid": "abc", "hookOutput": "", "success": True})
        return self._answer({"errors": [], "warnings": []})

    def do_GET(self):
        self.asked.append(self.path)
        self._answer(
            {"id": "me/small", "sha": "abc", "siblings": [], "private": False, "downloads": 0, "likes": 0, "tags": []}
        )

    def _chunks(self) -> bytes:
        parts = b""
        while size := int(self.rfile.readline(), 16):
            parts += self.rfile.read(size)
            self.rfile.readline()
        return parts

    def _answer(self, content: dict, status: int = 200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    """A stand-in of the hub: its address, and what it was asked and given."""
    handler = type("Fresh", (Hub,), {"committed": {}, "asked": [], "refuse": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


def pushed(checkpoint, address: str) -> subprocess.CompletedProcess:
    """`obr push` to a hub at this address; huggingface_hub reads it from the environment when it is loaded."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "obr", "push", str(checkpoint), "me/small"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert environment["HF_TOKEN"] not in run.stdout + run.stderr
    return run


@pytest.mark.slow
def test_an_upload_commits_the_folder(hub, checkpoint):
    address, handler = hub
    run = pushed(checkpoint, address)
    assert run.returncode == 0 and run.stdout.strip() == f"{address}/me/small (abc)", run.stderr
    assert set(handler.committed) == {
        "README.md", "block_000.safetensors", "config.json", "ends.safetensors", "manifest.json",
    }  # fmt: skip
    assert handler.committed["block_000.safetensors"] == b"weights"
    assert b"license: llama2" in handler.committed["README.md"]
    assert any(path.endswith("/repos/create") for path in handler.asked)
    assert not list(checkpoint.parent.glob("*.push*"))


@pytest.mark.slow
def test_a_hub_that_refuses_or_is_not_there_is_told_in_a_sentence(hub, checkpoint):
    address, handler = hub
    handler.refuse = True
    run = pushed(checkpoint, address)
    assert run.returncode == 1 and "does not let you write to me/small; log in with `hf auth login`" in run.stderr
    run = pushed(checkpoint, "http://127.0.0.1:9")
    assert run.returncode == 1 and "the hub cannot be reached" in run.stderr and "Traceback" not in run.stderr
