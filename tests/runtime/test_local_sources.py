"""The state of local sources: it changes with their contents."""

import os

from obr.runtime import local_sources


def test_a_file_changes_its_state_with_its_contents_and_not_with_its_time(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one", encoding="utf-8")
    source = {"source": "path", "path": str(path)}
    before = local_sources.state(source)
    os.utime(path, (0, 0))
    assert local_sources.state(source) == before
    path.write_text("two", encoding="utf-8")
    os.utime(path, (0, 0))
    assert local_sources.state(source) != before


def test_a_large_file_changes_its_state_with_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(local_sources, "HASHED", 2)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    source = {"source": "path", "path": str(tmp_path)}
    os.utime(path, ns=(0, 0))
    assert local_sources.state(source) == {"model.safetensors": [3, 0]}
    path.write_bytes(b"two")
    os.utime(path, ns=(0, 1))
    assert local_sources.state(source) == {"model.safetensors": [3, 1]}


def test_a_folder_counts_with_the_files_that_stages_read(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELS", str(tmp_path))
    folder = tmp_path / "small"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "notes.md", ".hidden.json"):
        (folder / name).write_bytes(b"x")
    found = local_sources.state({"source": "path", "path": "$MODELS/{model}"}, "small")
    assert list(found) == ["config.json", "model.safetensors"]


def test_remote_source_has_no_local_state_and_missing_file_an_empty_one(tmp_path):
    assert local_sources.state({"source": "hub", "repo": "some/model"}) is None
    assert local_sources.state({"source": "path", "path": str(tmp_path / "none")}) == {}
    assert local_sources.state({"source": "path", "file": str(tmp_path / "none.jsonl")}) == {}


def test_examples_of_a_task_change_its_state(tmp_path):
    for name in ("rows.jsonl", "examples.jsonl"):
        (tmp_path / name).write_text("{}\n", encoding="utf-8")
    source = {"source": "path", "task": "piqa", "file": str(tmp_path / "rows.jsonl")}
    source |= {"num_fewshot": 1, "examples": str(tmp_path / "examples.jsonl")}
    before = local_sources.state(source)
    (tmp_path / "examples.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    assert local_sources.state(source) != before
