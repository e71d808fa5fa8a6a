"""Files and folders appear whole or not at all."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from obr import files


def test_a_file_replaces_an_older_one_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.json"
    files.write_json({"é": [1, None]}, path)
    content = path.read_bytes()
    assert json.loads(content) == {"é": [1, None]} and "é".encode() in content and content.endswith(b"}\n")
    with pytest.raises(RuntimeError), files.whole(path) as partial:
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
        with files.whole(tmp_path / "a.safetensors") as partial:
            save_file({"a": torch.zeros(1)}, partial)
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_folder_replaces_an_older_one_only_when_it_is_whole(tmp_path):
    out = tmp_path / "made" / "out"
    for text in ("old", "new"):
        with files.whole_folder(out) as folder:
            (folder / "a").write_text(text)
            files.become(folder, out)
    with pytest.raises(RuntimeError), files.whole_folder(out) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert (out / "a").read_text() == "new" and list(out.parent.iterdir()) == [out]
