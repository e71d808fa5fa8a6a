"""Folders that a command replaces: only absent or empty ones, or earlier results of the same command."""

import json
import shutil
from pathlib import Path

import pytest

import obr
from obr.checkpoints.released.download import download_released
from obr.cli import main
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.evaluation.tasks import download_task
from obr.export.dispatch import export
from obr.export.hub import push
from obr.models.download import download_model
from obr.runtime.files import replace_folder

RTN = Recipe.parse({"method": "rtn"})


@pytest.fixture(scope="module")
def inputs(tiny_folder, tmp_path_factory) -> Path:
    """A folder with a downloaded model, a checkpoint of it, rows of a task and a released checkpoint."""
    folder = tmp_path_factory.mktemp("inputs")
    download_model({"source": "path", "path": str(tiny_folder / "model")}, folder / "model")
    compress_stage(folder / "model", RTN, folder / "checkpoint", device="cpu")
    rows = [{"passage": "Sky.", "question": "is it blue", "label": i % 2, "idx": i} for i in range(2)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def writers(inputs: Path) -> dict:
    """Each command that replaces a folder: a function of that folder."""
    local = {"source": "path", "path": str(inputs / "model")}
    task = {"source": "path", "task": "boolq", "file": str(inputs / "rows.jsonl")}

    def save(out):
        model = obr.load_model(inputs / "model", device="cpu")
        obr.save(obr.compress(model, None, RTN, progress=False), out)

    return {
        "download-model": lambda out: download_model(local, out),
        "download-released": lambda out: download_released(local, out),
        "download-task": lambda out: download_task(task, out),
        "export": lambda out: export(inputs / "checkpoint", "compressed-tensors", out),
        "push": lambda out: push(inputs / "checkpoint", "you/name", out, "mit"),
        "save": save,
        "compress": lambda out: compress_stage(inputs / "model", RTN, out, device="cpu"),
    }


COMMANDS = ("download-model", "download-released", "download-task", "export", "push", "save", "compress")
# Files that a user may have: none of them is a result of any command.
OWN = ("thesis.txt", "train.py", "README.md", "LICENSE", "data.jsonl", "model.safetensors", "config.json",
       "tokenizer.json", "notes/a.txt", "poetry.lock", "additional_chat_templates/x.jinja", ".git/HEAD")  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_with_files_of_a_user_is_left_intact(command, inputs, tmp_path):
    write = writers(inputs)[command]
    for number, name in enumerate(OWN):
        if command == "compress" and name == ".git/HEAD":
            continue  # written beside what is there, which hidden files outlive
        out = tmp_path / f"{number}"
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("{}", encoding="utf-8")
        with pytest.raises(ObrError, match=rf"holds {name}"):
            write(out)
        assert contents(out) == {name: b"{}"}, name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in tmp_path.glob("[0-9]*"))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_an_earlier_result_is_replaced_unless_a_user_has_added_a_file(command, inputs, tmp_path):
    write, out = writers(inputs)[command], tmp_path / "out"
    out.mkdir()
    write(out)  # an empty folder
    first = contents(out)
    write(out)
    assert set(contents(out)) == set(first)
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    before = contents(out)
    with pytest.raises(ObrError, match=r"holds notes\.txt"):
        write(out)
    assert contents(out) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_files_and_links_are_no_folders_to_replace(command, inputs, tmp_path):
    write = writers(inputs)[command]
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises((ObrError, OSError), match=r"is a file|exists"):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    if command != "compress":  # which writes into the folder that the link names
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ObrError, match="is a symbolic link"):
            write(tmp_path / "link")


@pytest.mark.parametrize("name", ["download-model", "download-task", "download-released"])
def test_leftovers_of_snakemake_are_replaced_only_with_rerun(name, inputs, tmp_path, capsys):
    """Snakemake removes the declared outputs of a job before the job runs again."""
    source = {"source": "path", "path": str(inputs / "model")}
    if name == "download-task":
        source = {"source": "path", "task": "boolq", "file": str(inputs / "rows.jsonl")}
    entry = source if name == "download-released" else {"source": source}
    out = tmp_path / "out"
    command = [name, "--settings", json.dumps(entry), "--out", str(out)]
    assert main.main(command) == 0
    whole = set(contents(out))
    for declared in ("source.json", "config.json", "task.json"):
        (out / declared).unlink(missing_ok=True)
    if name != "download-released":  # of a local folder nothing else is kept
        assert main.main(command) == 1 and "move what is in it" in capsys.readouterr().err
    assert main.main([*command, "--rerun"]) == 0 and set(contents(out)) == whole
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    (out / ("task.json" if name == "download-task" else "source.json")).unlink()
    assert main.main([*command, "--rerun"]) == 1 and "holds notes.txt" in capsys.readouterr().err
    assert (out / "notes.txt").exists()


def test_a_backup_beside_the_folder_is_left_alone(inputs, tmp_path):
    write = writers(inputs)["push"]
    write(tmp_path / "c")
    shutil.copytree(tmp_path / "c", tmp_path / "c.old")
    write(tmp_path / "c")
    assert contents(tmp_path / "c.old") == contents(tmp_path / "c")


def test_replacing_leaves_no_folder_aside(tmp_path):
    for name in ("new", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name, encoding="utf-8")
    replace_folder(tmp_path / "new", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out/a").read_bytes() == b"new"


def test_code_beside_checkpoint_counts_only_if_config_names_it(inputs, tmp_path):
    out = Path(shutil.copytree(inputs / "checkpoint", tmp_path / "c"))
    (out / "train.py").write_text("mine", encoding="utf-8")
    with pytest.raises(ObrError, match=r"holds train\.py, which is no part of a checkpoint"):
        compress_stage(inputs / "model", RTN, out, device="cpu")
    assert (out / "train.py").read_text(encoding="utf-8") == "mine"
