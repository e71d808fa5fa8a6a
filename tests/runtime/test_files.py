"""Files and folders appear whole or not at all."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from obr.errors import ObrError
from obr.report.table_rows import value_of
from obr.runtime import files


def test_file_is_replaced_only_by_complete_file(tmp_path):
    path = tmp_path / "new" / "a.json"
    files.write_json({"é": [1, None]}, path)
    content = path.read_bytes()
    assert json.loads(content) == {"é": [1, None]} and "é".encode() in content and content.endswith(b"}\n")
    with pytest.raises(RuntimeError), files.atomic_write(path) as partial:
        partial.write_text("half")
        assert path.read_bytes() == content
        raise RuntimeError
    assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


def test_line_ends_are_left_alone(tmp_path):
    files.write_text("a\r\nb\n", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == b"a\r\nb\n"


def test_the_umask_decides_who_may_read_tensors(tmp_path):
    before = os.umask(0o027)
    try:
        with files.atomic_write(tmp_path / "a.safetensors") as partial:
            save_file({"a": torch.zeros(1)}, partial)
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_folder_is_replaced_only_by_complete_folder(tmp_path):
    out = tmp_path / "made" / "out"
    for text in ("old", "new"):
        with files.atomic_folder(out) as folder:
            (folder / "a").write_text(text)
            files.replace_folder(folder, out)
    with pytest.raises(RuntimeError), files.atomic_folder(out) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert (out / "a").read_text() == "new" and list(out.parent.iterdir()) == [out]


def test_leftovers_of_killed_writer_are_removed(tmp_path):
    path = tmp_path / "a.safetensors"
    (tmp_path / "a.safetensors.tmp").mkdir()
    (tmp_path / "a.safetensors.tmp" / ".tmpXYZ").write_text("half a file of safetensors")
    with files.atomic_write(path) as partial:
        save_file({"a": torch.zeros(1)}, partial)
    (tmp_path / "b.tmp").write_text("of an older version")
    files.write_text("b", tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b"]


HOLDER = "import sys, time; from obr.runtime import locks\n"
HOLDER += "locks.acquire(sys.argv[1]); print('held', flush=True); time.sleep(60)"


def test_second_writer_of_same_path_is_refused(tmp_path):
    path = tmp_path / "a"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for write in (lambda: files.write_text("x", path), lambda: files.atomic_folder(path).__enter__()):
            with pytest.raises(ObrError, match=rf"a is being written by process {holder.pid} on .*; wait for it or"):
                write()
        assert not path.exists()
    finally:
        holder.kill()
        holder.wait()
    files.write_text("x", path)  # a killed process holds nothing
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_older_folder_is_never_there_in_part(tmp_path, monkeypatch):
    """Killed between the two renamings, the older folder lies aside, whole; the next one removes it."""
    out = tmp_path / "out"
    for text in ("old", "new"):
        with files.atomic_folder(out) as folder:
            (folder / "a").write_text(text)
            if text == "old":
                files.replace_folder(folder, out)
            else:
                monkeypatch.setattr(os, "replace", lambda a, b: os.rename(a, b) if a == out else 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    files.replace_folder(folder, out)
    assert not out.exists() and (tmp_path / "out.old.tmp" / "a").read_text() == "old"
    monkeypatch.undo()
    with files.atomic_folder(out) as folder:
        (folder / "a").write_text("newer")
        files.replace_folder(folder, out)
    assert list(tmp_path.iterdir()) == [out] and (out / "a").read_text() == "newer"


def test_json_other_than_object_is_refused(tmp_path):
    for text, words in (("[1]", "holds a JSON list, not an object"), ("[" * 100_000, "cannot be read as JSON")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ObrError, match=words):
            files.read_json(tmp_path / "a.json")


def test_infinity_and_nan_are_refused_in_json_files(tmp_path):
    for value, place in (
        ({"layers": [{"loss": 1.0}, {"loss": float("inf")}]}, "layers.1.loss is inf"),
        ({"a": {"b": (float("nan"),)}}, "a.b.0 is nan"),
        (float("-inf"), "the value is -inf"),
    ):
        with pytest.raises(ObrError, match=f"{place}, which JSON cannot hold"):
            files.write_json(value, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


@given(st.floats())
def test_a_number_and_its_status_survive_json(value):
    text = files.json_text(files.finite("loss", value, "loss_status"), "it")
    read = value_of(json.loads(text, parse_constant=pytest.fail), "loss", "loss_status")
    assert read == value or (read != read and value != value)
