"""`obr quantize` and `obr.quantize` give the checkpoint that the stages give one by one; `obr recipes` says why."""

import doctest
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import obr
from helpers.paths import HELPERS, ROOT
from helpers.workflow_runs import digests
from obr.cli.main import main
from obr.cli.parser import BY_HAND, parser
from obr.config.config_files import load_config
from obr.config.oneshot_job import resolve
from obr.config.oneshot_options import OneShot
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.planning.dry_run import pending

SMALL = {"samples": 4, "seqlen": 64, "device": "cpu"}
DEMO = ROOT / "config/experiments/demo.yaml"


@pytest.fixture(scope="module")
def command(tiny_folder):
    """(out, more arguments) -> arguments of a small run of `obr quantize` on the tiny model."""

    def arguments(out: Path, *more, model=tiny_folder / "model", text=tiny_folder / "train.txt") -> list[str]:
        small = ["--samples", 4, "--seqlen", 64, "--device", "cpu", "--calibration", text]
        return [str(part) for part in ("quantize", model, "--out", out, *small, *more)]

    return arguments


@pytest.fixture(scope="module")
def checkpoint(command, tmp_path_factory) -> Path:
    """The checkpoint of a small run."""
    out = tmp_path_factory.mktemp("oneshot") / "out"
    assert main(command(out, "--sparsity", 0.5, "--bits", 4)) == 0
    return out


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same bytes, but for the seconds that they took."""
    return digests(one) == digests(other)


def stages(folder: Path, model: Path, text: Path, recipe: dict, *options: str) -> Path:
    """The checkpoint that the stages give, called one by one as the rules call them."""
    entry = json.dumps({"source": {"source": "path", "path": str(model)}})
    calibration = json.dumps({"text": text.stem, "nsamples": 4, "seqlen": 64})
    copy, tokens, rotation = folder / "model", folder / "t.safetensors", folder / "r.safetensors"
    common = ["--model", copy, "--rotation", rotation]
    files = {"TOKENS": tokens, "HESSIANS": folder / "h"}
    for arguments in (
        ["download-model", "--settings", entry, "--out", copy],
        ["download-rotation", "--settings", '{"kind": "quarot", "seed": 0}', "--model", copy, "--out", rotation],
        ["calibrate", "--settings", calibration, "--model", copy, "--text", text, "--out", tokens],
        ["hessian", *common, "--tokens", tokens, "--out", folder / "h"],
        ["compress", "--recipe", json.dumps(recipe), *common, *options, "--out", folder / "checkpoint"],
    ):
        assert main([str(files.get(part, part)) for part in arguments]) == 0
    return folder / "checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("hessian", ["sequential", "cached"])
def test_the_checkpoint_has_the_bytes_that_the_stages_give(hessian, checkpoint, command, tiny_folder, tmp_path):
    recipe = {"method": "obr_gptq", "bits": 4, "sparsity": 0.5, "rotation": "quarot", "calibration": "train"}
    flags = ["--tokens", "TOKENS"] if hessian == "sequential" else ["--hessians", "HESSIANS"]
    expected = stages(
        tmp_path, tiny_folder / "model", tiny_folder / "train.txt", recipe | {"hessian": hessian}, *flags
    )
    if hessian == "cached":
        checkpoint = tmp_path / "out"
        assert main(command(checkpoint, "--hessian", "cached")) == 0
    assert same(checkpoint, expected)


@pytest.mark.slow
def test_the_library_gives_the_bytes_of_the_command(checkpoint, tiny_folder, tmp_path):
    found = obr.quantize(
        tiny_folder / "model", tmp_path / "out", sparsity=0.5, bits=4, calibration=tiny_folder / "train.txt", **SMALL
    )
    assert found.folder == tmp_path / "out" and found.perplexity is None
    assert same(found.folder, checkpoint)


@pytest.mark.slow
def test_the_example_of_the_library_runs(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/model").symlink_to(tiny_folder / "model")
    (tmp_path / "text.txt").symlink_to(tiny_folder / "train.txt")
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder().find(obr.quantize, "quantize", globs={"obr": obr})
    assert doctest.DocTestRunner().run(example) == (0, 2)


def test_options_of_command_equal_parameters_of_library():
    parameters = set(inspect.signature(obr.quantize).parameters)
    options = set(vars(parser().parse_args(["quantize", "m", "--out", "o"])))
    assert parameters == {field.name for field in fields(OneShot)}
    assert options - parameters == {"stage", "threads", "dry_run", "print_recipe"} and parameters <= options


def test_the_result_loads_and_generates(checkpoint, capsys):
    model = obr.load(checkpoint)
    tokens = model.generate(__import__("torch").tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape[0] == 1 and tokens.shape[1] > 3
    assert main(["verify", str(checkpoint)]) == 0


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_bytes(checkpoint, command, tmp_path):
    server = subprocess.Popen(
        [sys.executable, str(HELPERS / "killable_commands.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    out = tmp_path / "out"

    def run(kill):
        request = {"arguments": command(out), "log": str(tmp_path / "log"), "kill": kill}
        print(json.dumps(request | {"unfinished": f"{out}.unfinished"}), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())["status"]

    with server:
        assert run({"notes": 2, "seconds": 0.001}) in (-signal.SIGPROF, -signal.SIGKILL)
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.unfinished").glob("block_*.json")}
        assert kept and not (out / "manifest.json").exists()
        made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.work").rglob("*.safetensors")}
        assert run({"moves": 2, "folder": str(out)}) == -signal.SIGKILL  # blocks are being moved into the folder
        assert run(None) == 0
        server.stdin.close()
    assert {path: path.stat().st_mtime_ns for path in made} == made, "model, rotation and windows were made twice"
    assert "going on with an interrupted run" in (tmp_path / "log").read_text()
    assert not list(tmp_path.glob("*.unfinished"))
    manifest = json.loads((out / "manifest.json").read_text())
    expected = json.loads((checkpoint / "manifest.json").read_text())
    blocks = [name for name in manifest["files"] if name.endswith(".safetensors")]
    assert len(blocks) == 3 and all(manifest["files"][name] == expected["files"][name] for name in blocks)


@pytest.mark.slow
def test_a_finished_run_started_again_only_evaluates(command, tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(out)) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(command(out, "--evaluate", tiny_folder / "heldout.txt")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert [line.split("  ")[0] for line in lines] == [
        "bits per weight", "size", "relative error", "perplexity", "load it",
    ]  # fmt: skip
    tokenizer = __import__("transformers").AutoTokenizer.from_pretrained(out)
    tokens = __import__("torch").tensor(tokenizer((tiny_folder / "heldout.txt").read_text())["input_ids"])
    windows = obr.evaluation_windows(tokens, 64)
    values = [obr.perplexity(model, windows) for model in (obr.load(out), obr.load_model(tiny_folder / "model"))]
    assert f"{values[0]:.2f} on heldout, {values[1]:.2f} before" in lines[3]
    manifest = json.loads((out / "manifest.json").read_text())
    assert f"{manifest['file_bytes'] / 1e6:.1f} MB" in lines[1] and "3.00 in theory" in lines[0]
    assert f"{manifest['relative_error']:.4f}, mean over 14 layers" in lines[2]


@pytest.mark.slow
def test_checkpoint_of_other_settings_is_replaced_only_with_overwrite(command, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(out, "--method", "rtn", "--bits", 8)) == 1  # rtn reads no windows
    assert "--calibration" in capsys.readouterr().err
    assert main(command(out, "--method", "gptq")) == 0
    before = digests(out)
    assert main(command(out, "--method", "gptq", "--bits", 3)) == 1
    assert "is not empty: it holds" in capsys.readouterr().err and digests(out) == before
    assert main(command(out, "--method", "gptq", "--bits", 3, "--overwrite")) == 0
    assert json.loads((out / "manifest.json").read_text())["recipe"]["bits"] == 3
    (out / "notes.md").write_text("mine")
    assert main(command(out, "--method", "gptq", "--overwrite")) == 1
    assert "notes.md" in capsys.readouterr().err and (out / "notes.md").read_text() == "mine"


@pytest.mark.slow
def test_blocks_of_another_run_are_dropped_only_if_asked(command, tmp_path, capsys):
    out, unfinished = tmp_path / "out", tmp_path / "out.unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text("{}")
    assert main(command(out)) == 1
    assert "--overwrite" in capsys.readouterr().err and unfinished.exists()
    assert main(command(out, "--overwrite")) == 0 and not unfinished.exists()


@pytest.fixture
def broken(tmp_path) -> dict[str, Path]:
    """Files and folders that cannot be used."""
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "list.yaml").write_text("- method: rtn\n")
    (tmp_path / "typed.yaml").write_text("method: obr_gptq\npattern: 2:4\n")
    (tmp_path / "unknown.yaml").write_text("method: obr_gptq\nsparse: 0.5\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    return {path.stem: path for path in tmp_path.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more, said",
    [
        (["--sparsity", "0.5", "--pattern", "2:4"], "are both given"),
        (["--sparsity", "1.5"], "recipe.sparsity is 1.5"),
        (["--bits", "9"], "recipe.bits is 9"),
        (["--pattern", "4"], "Pattern '4'"),
        (["--pattern", "7:14"], "does not divide"),
        (["--method", "sparsegpt_gptq", "--group", "128"], "recipe.group is 128"),
        (["--method", "gptq", "--sparsity", "0.5"], "--sparsity 0.5 would change nothing"),
        (["--method", "joint", "--alpha", "0.5"], "--alpha 0.5 would change nothing"),
        (["--method", "wanda", "--mask", "random"], "takes the mask wanda or wanda_harmonic"),
        (["--kv-bits", "1"], "recipe.keys: bits 1"),
        (["--rotation", "spin"], "--rotation spin is neither"),
        (["--rotation", "{latin}"], "is not a rotation of this project"),
        (["--recipe", "nonsense"], "nonsense is neither a YAML file nor a recipe"),
        (["--recipe", "{list}"], "holds a YAML list"),
        (["--recipe", "{typed}"], "recipe.pattern is 124, which is not text"),
        (["--recipe", "{unknown}"], "unknown key 'sparse'"),
        (["--recipe", "missing.yaml"], "missing.yaml cannot be read"),
        (["--calibration", "nonsense"], "--calibration nonsense is neither"),
        (["--calibration", "{latin}"], "not text in UTF-8"),
        (["--calibration", "{short}"], "the text has"),
        (["--evaluate", "nonsense"], "--evaluate nonsense is neither"),
        (["--samples", "0"], "--samples is 0"),
        (["--seqlen", "1024"], "give --seqlen 512 or less"),
        (["--configfile", "{list}", "--recipe", "dense"], "holds a YAML list"),
        (["--out", "{file}"], "is a file"),
        (["--out", "{empty}/.."], "is not empty"),
    ],
)
def test_errors_are_one_sentence(more, said, broken, command, tmp_path, capfd):
    given = [part.format(**broken) for part in more]
    assert main([*command(tmp_path / "new/out"), *given]) == 1
    lines = capfd.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith("obr: ")]
    assert len(told) == 1 and told[0] == lines[-1] and said in told[0] and told[0].endswith("."), lines
    assert not (tmp_path / "new/out/manifest.json").exists()


@pytest.mark.parametrize(
    "option, said",
    [
        ({"device": "gpu"}, "device is 'gpu'; choose one of auto, cpu, cuda"),
        ({"dtype": "int3"}, "dtype is 'int3'; choose one of float32, float16, bfloat16"),
        ({"activations_memory": "a"}, "activations_memory is 'a'; it must be a number of MB"),
        ({"activations_memory": -1}, "activations_memory is -1; it must be a number of MB"),
        ({"activations_memory": float("nan")}, "activations_memory is nan"),
        ({"seed": -1}, "seed is -1; it must be a whole number from 0 on"),
        ({"recipe": [1]}, "recipe is [1]; give a name"),
        ({"configfile": "gone.yaml"}, "gone.yaml cannot be read"),
    ],
)
def test_the_library_refuses_what_the_parser_of_the_command_would(option, said, tiny_folder, tmp_path):
    with pytest.raises(ObrError, match=re.escape(said)):
        obr.quantize(tiny_folder / "model", tmp_path / "out", **{"recipe": "dense", **option})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, said", [("{empty}", "config.json is missing"), ("{file}", "is a file"), ("x", "x is no folder")]
)
def test_models_that_are_none_are_refused(model, said, broken, command, tmp_path, capsys):
    assert main(command(tmp_path / "out", model=model.format(**broken))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and line.endswith(".")


def test_types_are_checked_in_the_library_too(tiny_folder, tmp_path):
    for wrong in ({"bits": "4"}, {"sparsity": "half"}, {"group": 1.5}, {"seed": "a"}, {"recipe": {"activations": 4}}):
        with pytest.raises(ObrError, match=r"which is not a|must be a whole number"):
            obr.quantize(tiny_folder / "model", tmp_path / "out", calibration=tiny_folder / "train.txt", **wrong)


@pytest.mark.slow
def test_without_a_network_the_default_calibration_names_the_option(tiny_folder, tmp_path):
    """In a process of its own: huggingface_hub reads the variable once."""
    arguments = ["quantize", str(tiny_folder / "model"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "obr", *arguments], text=True, capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "workflow")},
    )  # fmt: skip
    assert done.returncode == 1
    assert "wikitext" in done.stderr.splitlines()[-1] and "--calibration FILE.txt" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work/models").exists()


def test_a_recipe_of_the_config_is_changed_by_options():
    def job(**options):
        return resolve(OneShot("smollm2-135m", Path("out"), configfile=[DEMO], **options))

    key = "obr_gptq-w4s50-quarot-sotu"
    found = job(recipe=key, activations="a8kv8", pattern="2:4", activation_bits=4, seed=7, samples=3, evaluate="sotu")
    config = load_config([DEMO])
    assert found.entry["source"] == config.raw["models"]["smollm2-135m"]["source"]
    assert found.recipe.pattern == "2:4" and found.recipe.activations.bits == 4 and found.recipe.keys.bits == 8
    assert found.recipe.hessian == "cached"  # of the recipe
    assert found.rotation == {**config.raw["rotations"]["quarot"], "seed": 7}
    assert found.calibrations["sotu"] == {**config.raw["calibrations"]["sotu"], "seed": 7, "nsamples": 3}
    assert found.perplexity["tokens"] == 4096
    for name in (name for name in config.parsed if name.endswith("-sotu")):
        assert job(recipe=name).recipe == config.parsed[name], name
    assert job(recipe="rtn-w4-quarot-sotu").calibrations  # cached Hessians measure the error of RTN, too
    assert not job(recipe="dense").calibrations


def test_a_printed_recipe_is_a_recipe(command, tmp_path, capsys):
    assert main(command(tmp_path / "out", "--pattern", "2:4", "--kv-bits", 8, "--print-recipe")) == 0
    printed = capsys.readouterr().out
    assert "pattern: '2:4'" in printed and printed.count("# --pattern") == 1
    assert "follows from the pattern" in printed and not list(tmp_path.iterdir())
    (tmp_path / "recipe.yaml").write_text(printed)
    again = command(tmp_path / "out", "--recipe", tmp_path / "recipe.yaml", "--print-recipe")
    assert main(again) == 0
    values = [yaml.safe_load(text) for text in (printed, capsys.readouterr().out)]
    assert values[0] == values[1]


def test_a_dry_run_leaves_nothing_behind(command, tmp_path, capsys):
    assert main(command(tmp_path / "out", "--dry-run", "--bits", 3)) == 0
    shown = capsys.readouterr().out
    assert "W3A16KV16" in shown and "4 windows of 64 tokens" in shown and "2.50 bits per weight" in shown
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_reads_no_windows_gets_none(tiny_folder, tmp_path):
    recipe = {"method": "rtn", "bits": 8, "calibration": "wikitext2"}
    found = obr.quantize(tiny_folder / "model", tmp_path / "out", recipe=recipe, device="cpu")
    assert found.manifest["calibration"] is None and found.manifest["recipe"]["rotation"] == "none"
    assert "not measured" in found.lines()[2]


@pytest.mark.slow
def test_an_allocation_runs_all_of_its_stages(tiny_folder, tmp_path):
    options = [{"method": "gptq", "bits": 4}, {"method": "gptq", "bits": 2}]
    recipe = {"method": "gptq", "rotation": "quarot", "allocation": {"bits": 3.0, "options": options}}
    found = obr.quantize(
        tiny_folder / "model", tmp_path / "out", recipe=recipe, calibration=tiny_folder / "train.txt", **SMALL
    )
    assert found.manifest["bits_per_weight"]["theoretical"] <= 3.0
    assert {layer["option"] for layer in found.manifest["allocation"]["layers"]} == {0, 1}
    with pytest.raises(ObrError, match="--bits 4 would change nothing"):
        obr.quantize(tiny_folder / "model", tmp_path / "no", recipe=recipe, bits=4)


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("files", "given"),
    [
        ([], {}),
        ([DEMO], {}),
        ([ROOT / "config/experiments/small.yaml"], {"experiments": ["joint", "seeds"], "quick": "true"}),
        ([ROOT / "tests/config.yaml"], {"threads": {"compress": 3}}),
    ],
    ids=["paper", "demo", "small", "tests"],
)
def test_a_config_is_read_as_snakemake_reads_it(tiny_folder, tmp_path, files, given):
    """With all its layers, and the defaults of the schema."""
    given = {"results": str(tmp_path / "results"), **given}
    results = tmp_path / ("results-quick" if "quick" in given else "results")
    expected, _ = pending(
        ROOT / "Snakefile", files, given, [f"{results}/rotations/quarot/smollm2-135m.safetensors"], 1
    )
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(given))
    assert load_config([*files, tmp_path / "given.yaml"]).raw == expected


def test_recipes_are_listed_and_shown(capsys):
    assert main(["recipes", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    config, key = load_config(), "obr_gptq-w4s50-flatquant"
    assert [line.split()[0] for line in listed[1:]] == list(config.recipes)
    for scheme, expected in ((), config.parsed[key]), (("a8kv8",), config.evaluated(key, "a8kv8")):
        assert main(["recipes", "show", key, *(("--activations", *scheme) if scheme else ())]) == 0
        shown = capsys.readouterr().out
        assert Recipe.parse(yaml.safe_load(shown)) == expected
        origins = {line.split(":")[0]: line.rpartition("# ")[2] for line in shown.splitlines()}
        assert origins["keys"] == f"activations.{scheme[0] if scheme else 'flatquant-a4kv4'}"
        assert origins["alpha"] == f"recipes.{key}" and origins["damp"] == "default"
        assert "\n# rotations.flatquant" in shown and "\n# calibrations." in shown
    assert main(["recipes", "show", "obr_gpt"]) == 1
    assert "such as obr_gptq" in capsys.readouterr().err


def test_the_help_has_commands_for_people_first(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    names = [line.split()[0] for line in shown.splitlines() if line.startswith("  ") and line[2] != "-"]
    assert names[:9] == [*BY_HAND] and names[0] == "quantize"
    assert shown.index("\ncommands:") < shown.index("\nworkflow stages (called by Snakemake")
    assert set(names) == set(parser()._subparsers._group_actions[0].choices)


def test_a_revision_is_that_of_a_hub_repository(tmp_path, tiny_folder):
    def source(model: str, **options) -> dict:
        return resolve(OneShot(model, tmp_path / "out", calibration=str(tiny_folder / "train.txt"), **options)).entry

    assert source("owner/name")["source"]["revision"] == "main"
    assert source("owner/name", revision="abc123")["source"]["revision"] == "abc123"
    for model, options in ((str(tiny_folder / "model"), {}), ("smollm2-135m", {"configfile": [DEMO]})):
        with pytest.raises(ObrError, match="--revision abc123 would change nothing"):
            source(model, revision="abc123", **options)
