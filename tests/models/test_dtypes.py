"""The dtype of a recipe's computation: which one counts, where it is recorded, what must share it."""

import json
import re

import pytest
import torch

import obr
from helpers.configs import RAW, replaced
from helpers.workflow_runs import CONFIG, snakemake
from obr.calibration import collect_hessians
from obr.checkpoints.format import CheckpointBlocks, read_manifest
from obr.cli.main import main
from obr.compression.recompute import Places, repeat
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.config.workflow import Config
from obr.data import token_windows
from obr.errors import ObrError
from obr.evaluation.perplexity import perplexity
from obr.models import dtypes
from obr.rotations.obtain import make

BASE = {"method": "gptq", "bits": 4, "rotation": "quarot", "calibration": "train", "online": "model"}
WINDOWS = {"nsamples": 4, "seqlen": 64}


@pytest.fixture(scope="module")
def prepared(tiny_folder, tmp_path_factory):
    """Folder with rotation, windows and two sets of cached Hessians of the tiny model."""
    folder = tmp_path_factory.mktemp("precision")
    model = tiny_folder / "model"
    make({"kind": "quarot", "seed": 0}, model, folder / "rotation.safetensors")
    token_windows.calibrate(model, tiny_folder / "train.txt", WINDOWS, folder / "tokens.safetensors")
    for name in ("float32", "bfloat16"):
        collect_hessians.hessian_stage(
            model, folder / "rotation.safetensors", folder / "tokens.safetensors", folder / name, getattr(torch, name)
        )
    return folder


def compressed(model, prepared, out, recipe: dict, *flags: str, given: str = "tokens") -> dict:
    """The manifest of what the command makes."""
    where = {"tokens": prepared / "tokens.safetensors", "hessians": prepared / "float32"}[given]
    command = ["compress", "--recipe", json.dumps({**BASE, **recipe}), "--model", str(model), "--out", str(out)]
    command += ["--rotation", str(prepared / "rotation.safetensors"), f"--{given}", str(where), *flags]
    assert main(command) == 0
    return read_manifest(out)


@pytest.mark.parametrize(
    "own, flag, used",
    [
        (None, None, "float32"),
        ("bfloat16", None, "bfloat16"),
        (None, "float16", "float16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_the_command_line_wins_over_the_recipe(own, flag, used, tiny_folder, prepared, tmp_path):
    flags = ["--dtype", flag] if flag else []
    manifest = compressed(tiny_folder / "model", prepared, tmp_path / "c", {"dtype": own}, *flags)
    assert manifest["computed_in"] == used and manifest["inputs"]["dtype"] == f"torch.{used}"
    kept = used if own else None
    assert manifest["recipe"]["dtype"] == kept and manifest["inputs"]["recipe"].get("dtype") == kept
    assert CheckpointBlocks(tmp_path / "c", device="cpu").dtype == getattr(torch, kept or "float32")
    assert repeat(tmp_path / "c", 3, Places(tiny_folder / "model", *_places(prepared)), "cpu")[0].identical


def _places(prepared):
    return prepared / "rotation.safetensors", prepared / "tokens.safetensors"


def test_evaluation_has_the_dtype_of_the_recipe(tiny_folder, prepared, tmp_path):
    manifest = compressed(tiny_folder / "model", prepared, tmp_path / "c", {"dtype": "bfloat16"})
    text = ["--text", "t", str(tiny_folder / "heldout.txt"), "seqlen=128", "tokens=1024"]

    def evaluated(*flags: str) -> tuple[str, float]:
        assert main(["evaluate", str(tmp_path / "c"), *text, "--out", str(tmp_path / "p.json"), *flags]) == 0
        found = json.loads((tmp_path / "p.json").read_text())["perplexity"]["t"]
        return found["dtype"], found["value"]

    borrowed = json.dumps({**manifest["recipe"], "dtype": None})
    found = [evaluated(), evaluated("--recipe", borrowed), evaluated("--dtype", "float16")]
    assert [dtype for dtype, _ in found] == ["bfloat16", "float32", "float16"]
    values = [value for _, value in found]
    assert len(set(values)) == 3 and max(values) / min(values) < 1.02
    model = obr.load(tmp_path / "c", device="cpu")
    assert model.dtype == torch.bfloat16 and model.obr_recipe.dtype == "bfloat16"
    assert obr.load(tmp_path / "c", dtype=torch.float32, device="cpu").obr_recipe.dtype == "float32"


def test_packed_weights_compute_the_same_in_bfloat16(tiny_folder, prepared, tmp_path):
    quantised = {"activations": {"bits": 8}, "keys": {"bits": 8}, "values": {"bits": 8}}
    compressed(tiny_folder / "model", prepared, tmp_path / "c", {"dtype": "bfloat16", **quantised})
    windows = torch.arange(256).view(2, 128) % 500
    packed, plain = (perplexity(obr.load(tmp_path / "c", packed=p, device="cpu"), windows) for p in (True, False))
    assert packed == pytest.approx(plain, rel=0.02)


def test_shared_statistics_of_another_dtype_are_refused(tiny_folder, prepared, tmp_path, capsys):
    recipe = {"dtype": "bfloat16", "hessian": "cached"}
    command = [{**BASE, **recipe}, tiny_folder / "model", tmp_path / "c"]
    with pytest.raises(ObrError, match=r"float32 was computed in float32, but the recipe's dtype is bfloat16; comp"):
        _cached(*command, prepared, "float32")
    assert not (tmp_path / "c" / "manifest.json").exists()
    assert _cached(*command, prepared, "bfloat16")["computed_in"] == "bfloat16"
    unnamed = json.loads((prepared / "float32" / "hessian.json").read_text()) | {"dtype": None}
    with pytest.raises(ObrError, match=r"notes was computed in a dtype that it does not name, but the recipe's"):
        dtypes.check_shared(Recipe.parse({**BASE, **recipe}), unnamed["dtype"], "notes")
    dtypes.check_shared(Recipe.parse({**BASE, "hessian": "cached"}), None, "notes")  # names no dtype: takes any


def _cached(recipe: dict, model, out, prepared, name: str) -> dict:
    return compress_stage(
        model, Recipe.parse(recipe), out,
        rotation=prepared / "rotation.safetensors", hessians=prepared / name, device="cpu",
    )  # fmt: skip


def test_a_model_in_memory_must_have_the_dtype_of_the_recipe(tiny_folder):
    model = obr.load_model(tiny_folder / "model", device="cpu")
    with pytest.raises(ObrError, match="dtype is bfloat16, but the model is in float32; load it with"):
        obr.compress(model, None, {"method": "rtn", "dtype": "bfloat16"}, progress=False)
    model = obr.load_model(tiny_folder / "model", torch.bfloat16, "cpu")
    obr.compress(model, None, {"method": "rtn", "dtype": "bfloat16"}, progress=False)
    assert model.obr_report.computed_in == torch.bfloat16


def test_a_dtype_decides_a_checkpoint_and_a_borrower_may_have_its_own():
    plain = Recipe.parse({**BASE, "hessian_inputs": "plain"})
    assert "dtype" not in plain.decisive() and "online" not in plain.decisive()
    assert Recipe.parse({**BASE, "dtype": "float16"}).decisive()["dtype"] == "float16"
    assert Recipe.parse({**BASE, "hessian_inputs": "quantised"}).decisive()["online"] == "model"
    with pytest.raises(ObrError, match=r"dtype is 'float8'; choose one of float32, float16, bfloat16"):
        Recipe.parse({"method": "rtn", "dtype": "float8"})
    config = Config(replaced(RAW, recipes__obr__dtype="bfloat16", activations__a4__dtype=None))
    assert config.parsed["obr"].dtype == "bfloat16" and config.evaluated("obr", "a4").dtype is None
    assert json.loads(config.weight_entry("obr"))["dtype"] == "bfloat16"
    assert json.loads(config.evaluation_entry("obr", "a16"))["dtype"] == "bfloat16"
    inherited = Config(replaced(RAW, recipes__obr__dtype="bfloat16"))
    assert inherited.evaluated("obr", "a4").dtype == "bfloat16"
    overrides = {"models": ["large"], "calibrations": {}, "perplexity": ["wiki"], "zero_shot": [], "dtype": "float16"}
    changed = Config(replaced(RAW, recipes__obr__dtype="bfloat16", activations__a4__dtype=None, overrides=overrides))
    assert {recipe.dtype for recipe in changed.parsed.values()} == {"float16"}
    assert changed.evaluated("obr", "a4").dtype == "float16"


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"hessian": "cached"}, "cached Hessians"),
        ({"method": "joint", "scope": "layer", "row_weights": "gradient"}, "output gradients"),
        ({"allocation": {"bits": 4.0, "options": "some"}}, "predicted losses"),
    ],
)
def test_a_config_cannot_share_statistics_between_dtypes(changes, what):
    options = {"some": [{"method": "gptq", "bits": 4}]}
    recipe = {**RAW["recipes"]["obr"], **changes, "dtype": "bfloat16"}
    own = {"recipes__obr": recipe, "layer_options": options}
    with pytest.raises(ObrError, match=rf"recipes.obr.dtype is 'bfloat16', but its {what} are .* which is float16"):
        Config(replaced(RAW, dtype="float16", **own))
    Config(replaced(RAW, dtype="bfloat16", **own))
    own["recipes__obr"] = {**recipe, "dtype": None}
    config = Config(replaced(RAW, **own, activations__a4__dtype="bfloat16"))
    assert config.evaluated("obr", "a4").dtype == "bfloat16"  # an evaluation shares nothing


@pytest.mark.slow
@pytest.mark.workflow
def test_the_workflow_gives_the_configs_dtype_to_recipes_without_their_own(tiny_folder, tmp_path):
    recipes = {"own": {"method": "rtn", "dtype": "bfloat16"}, "none": {"method": "rtn"}}
    schemes = {"single": {"dtype": "float32"}, "configs": {"dtype": None}}
    rows = ["own", "none", {"recipe": "none", "activations": "single"}, {"recipe": "own", "activations": "configs"}]
    table = {"title": "T", "models": ["tiny"], "rows": rows, "perplexity": ["heldout"]}
    config = {**CONFIG, "recipes": recipes, "tables": {"t": table}, "figures": {}, "dtype": "float16"}
    config["activations"] = schemes
    run = snakemake(tmp_path, config, "--dry-run", "--printshellcmds")
    assert run.returncode == 0, run.stdout[-2000:]
    wanted = {"own": "bfloat16", "none": None, "none/single": "float32", "own/configs": None}
    wanted |= {"own/a16": "bfloat16", "none/a16": None}
    found = re.findall(r"^Shell command: (obr (?:compress|evaluate) .*--out \S+?/tiny/(\S+).*)$", run.stdout, re.M)
    found = [(line, place.removesuffix(".json")) for line, place in found]
    assert sorted(place for _, place in found) == sorted(wanted)
    for line, place in found:
        assert ("--dtype float16" in line) == (wanted[place] is None), line
        assert (f" dtype={wanted[place]} " in line) == (wanted[place] is not None), line
