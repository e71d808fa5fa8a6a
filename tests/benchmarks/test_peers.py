"""The table beside other programs: rows match recipes, all are measured alike, environments are locked."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from helpers.paths import ROOT
from obr.config.config_files import load_config

FOLDER = ROOT / "benchmarks/peers"


@pytest.fixture
def module(monkeypatch):
    """Loads a module of the folder by name, under one that no other module has."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"peers_{name}", FOLDER / f"{name}.py")
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    yield load
    for name in ("beside", "measure"):
        sys.modules.pop(name, None)


def test_rows_are_the_external_recipes_of_the_table(module):
    run, recipes = module("run"), load_config().raw["recipes"]
    rows = {key: recipe for key, recipe in recipes.items() if recipe.get("method") == "external"}
    rows = {key: recipe for key, recipe in rows.items() if recipe["source"]["path"].startswith("results/peers/")}
    assert rows.keys() == run.ROWS.keys()
    for key, recipe in rows.items():
        assert recipe["source"]["path"] == f"results/peers/external/{run.folder_of(key)}"
        words = [word for word in run.ROWS[key] if word != "--ordered"]
        options = dict(zip(words[1::2], words[2::2], strict=True))
        assert ("--ordered" in run.ROWS[key]) == key.endswith("-ordered")
        assert int(options["--bits"]) == recipe["bits"] and run.ROWS[key][0] in key
        assert int(options.get("--group", 0)) == (recipe.get("group") or 0)
        assert float(options.get("--sparsity", 0)) == (recipe.get("sparsity") or 0)


def test_measure_notes_memory_time_and_status_of_a_child(tmp_path):
    def measured(code: str) -> tuple[int, dict]:
        note = tmp_path / "note.json"
        note.unlink(missing_ok=True)
        command = [sys.executable, FOLDER / "measure.py", note, sys.executable, "-c", code]
        status = subprocess.run(command).returncode
        return status, json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}

    filled = "held = bytearray({}); held[::4096] = bytes(len(held[::4096]))"
    (_, small), (_, large) = measured(filled.format(10**6)), measured(filled.format(2 * 10**8))
    assert 150 < large["peak_mb"] - small["peak_mb"] < 250
    busy = "import time\nwhile time.process_time() < 0.5: pass\n"
    status, used = measured(busy)
    assert status == 0 and used["processor_seconds"] >= 0.5 and used["seconds"] >= 0.5
    assert measured("raise SystemExit(3)") == (3, {}), "a command that fails leaves no note"


def test_the_measured_program_notes_compressions_and_passes_others_on(module, tmp_path):
    """It stands before `obr` on the path of the workflow's jobs."""
    real, notes = tmp_path / "obr real", tmp_path / "notes"
    real.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >>"{tmp_path}/said"\n', encoding="utf-8")
    real.chmod(0o755)
    notes.mkdir()
    shim = module("run").measured_obr(tmp_path, str(real), notes)
    for stage in ("evaluate", "compress"):
        subprocess.run([shim, stage, "--out", f"made/a-{stage}", "--threads", "1 2"], check=True)
    words = (tmp_path / "said").read_text(encoding="utf-8").splitlines()
    assert words[:5] == ["evaluate", "--out", "made/a-evaluate", "--threads", "1 2"]
    assert words[5:] == ["compress", "--out", "made/a-compress", "--threads", "1 2"]
    assert [path.name for path in notes.iterdir()] == ["a-compress.json"]


def test_the_table_has_scores_and_costs_of_each_row(module, tmp_path):
    beside = module("beside")
    heads = (
        "recipe,label,sparsity_measured,sotu_ours,continuation_ours,continuation_stderr,bits_per_weight_file,file_mb"
    )
    lines = [heads, "ours,A,0.5,20.125,80,5,3.05,150", "theirs,B,0,,,,4,100", "external,C,0,21,70,6,4.05,160.5"]
    (tmp_path / "scores.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    cost = {"seconds": 9.0, "processor_seconds": 7.4, "peak_mb": 1234, "program": "P 1.0"}
    (tmp_path / "external.json").write_text(json.dumps(cost), encoding="utf-8")
    beside.write(beside.collect(tmp_path / "scores.csv", tmp_path), tmp_path / "beside", "Title")
    rows = (tmp_path / "beside.md").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "**Title**"
    assert rows[4] == "| A | OBR-pipeline | 3.05 | 50.0 | 150.0 | 20.12 | 80.0 ± 5.0 | – | – |"
    assert rows[5] == "| C | P 1.0 | 4.05 | 0.0 | 160.5 | 21.00 | 70.0 ± 6.0 | 7 | 1,234 |" and rows[6] == ""
    assert (tmp_path / "beside.csv").read_text(encoding="utf-8").splitlines()[2].endswith(",7.4,9.0,1234")


@pytest.mark.parametrize("path", sorted((ROOT / "envs").glob("*/*.txt")), ids=lambda path: path.stem)
def test_environments_of_other_programs_are_locked_by_hash(path):
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    options = "--no-deps --generate-hashes --no-annotate --python-version 3.11"
    assert text.splitlines()[1] == f"#    uv pip compile {options} {name} -o {name}"
    entries = re.split(r"\n(?=\S)", text.split("\n", 2)[2])
    for entry in entries:
        assert re.match(r"[\w.-]+==\S+( ; .+)? \\\n( +--hash=sha256:[0-9a-f]{64}( \\)?\s*)+$", entry), entry[:80]
    # torch is this project's, in the build that suits the machine, or locked like the others.
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    with_torch = re.search(r"^WITH_TORCH := (.+)$", makefile, re.MULTILINE)[1].split()
    assert not (path.stem in with_torch and any(entry.startswith("torch==") for entry in entries))
