"""Text files as they are read, and what is said of doubtful windows."""

import json

import pytest
import torch

from helpers.single_scores import text_score
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.data.sampling import sample_windows
from obr.data.texts import wikitext_rows
from obr.data.token_windows import calibrate, load_tokens
from obr.data.tokenize import read_text
from obr.errors import ObrError

TEXT = "One line.\nAnother, with é.\n"


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.txt", "plain".encode("utf-16-le"), "a.txt has NUL characters, as UTF-16 has: convert it"),
        ("rows.jsonl", b'\n{"text": "One line."}\n{"text": "Two."}\n', "rows.jsonl holds JSON"),
        ("rows.JSON", json.dumps([{"text": "One"}], indent=1).encode(), "rows.JSON holds JSON"),
        ("rows.ndjson", b'"One line."\n"Two."\n', "rows.ndjson holds JSON"),
    ],
)
def test_a_file_of_another_kind_is_no_text(name, data, sentence, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ObrError, match=sentence):
        read_text(tmp_path / name)


def test_prose_in_a_file_with_a_suffix_of_json_is_text(tmp_path):
    (tmp_path / "a.json").write_text(TEXT, encoding="utf-8")
    (tmp_path / "a.txt").write_text('{"text": "JSON that is meant"}', encoding="utf-8")
    assert read_text(tmp_path / "a.json") == TEXT and read_text(tmp_path / "a.txt").startswith("{")


def test_wikitext_with_line_ends_of_windows_is_refused():
    with pytest.raises(ObrError, match="lines that end in CR LF, unlike the hub's"):
        wikitext_rows(" \r\n = Title = \r\n")


@pytest.mark.parametrize(
    ("nsamples", "seqlen", "seed", "name"),
    [(2.5, 4, 0, "nsamples 2.5"), (2, 4.0, 0, "seqlen 4.0"), (2, 4, None, "seed None"), (2, 4, "0", "seed '0'")],
)
def test_numbers_of_windows_are_whole(nsamples, seqlen, seed, name):
    with pytest.raises(ObrError, match=f"{name} must be a whole number"):
        sample_windows(torch.arange(100), nsamples, seqlen, seed)


def test_windows_beyond_the_positions_and_line_ends_of_windows_are_told(tiny_folder, tmp_path):
    """The tiny model has 512 positions."""
    text = (tiny_folder / "heldout.txt").read_text(encoding="utf-8")[:8000]
    for name, end in (("unix", "\n"), ("windows", "\r\n")):
        (tmp_path / f"{name}.txt").write_bytes(text.replace("\n", end).encode())
    crs = f"{text.count(chr(10)):,} lines of the text end in CR LF, and each CR counts as text"
    longer = "windows of 600 tokens are longer than the 512 positions of the model's configuration"
    compress_stage(tiny_folder / "model", Recipe.parse({"method": "dense"}), tmp_path / "packed")
    for name, seqlen, note in (("unix", 512, None), ("windows", 512, crs), ("windows", 600, f"{longer}; {crs}")):
        score = text_score(tmp_path / "packed", tmp_path / f"{name}.txt", {"seqlen": seqlen, "tokens": 600})
        assert score.get("note") == note
        spec = {"nsamples": 1, "seqlen": seqlen}
        calibrate(tiny_folder / "model", tmp_path / f"{name}.txt", spec, tmp_path / "c")
        assert load_tokens(tmp_path / "c")[1].get("note") == note
