"""One more mask, method, rotation, family and table: an entry each, and its function where it has one.

The copy of the package has them from the start of a process, so the whole tiny workflow and its plan know them.
"""

import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
import transformers

import obr
from helpers.paths import ROOT
from helpers.workflow_runs import CONFIG, SMOKE, environment, snakemake
from obr.models.architectures import FAMILIES, Layout

pytestmark = pytest.mark.workflow

ENTRIES = {
    "config/methods.py": """
MASKS["input_norm"] = Mask()
METHODS["floor"] = Method("Floor", "1", "round_down", prunes=True, masks=("input_norm",), solver="rounding")
""",
    "config/rotations.py": """
ROTATIONS["signs"] = RotationKind("Signs")
DRAWN = tuple(name for name, kind in ROTATIONS.items() if kind.class_name)
""",
    "models/architectures.py": """
FAMILIES["helium"] = Layout()
""",
    "methods/masks.py": """

def input_norm(weight, hessian, seed):
    return hessian.diagonal.expand_as(weight)
""",
    "methods/rounding.py": """

def round_down(layer: Layer) -> Solution:
    down = layer.grid.round(layer.weight - layer.grid.scale / 2)
    return Solution(down * layer.mask, layer.mask, layer.grid)
""",
    "rotations/quarot.py": """

class Signs(QuaRot):
    kind = "signs"
""",
}
RECIPE = {
    "method": "floor",
    "bits": 4,
    "rotation": "signs",
    "calibration": "train",
    "hessian": "cached",
    "label": "Floor",
}


def helium(vocabulary: int) -> transformers.HeliumForCausalLM:
    """A random model of a family that the package does not know."""
    config = transformers.HeliumConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.HeliumForCausalLM(config).eval()


@pytest.fixture(scope="module")
def extended(tiny_folder, tmp_path_factory):
    """(folder, copy of the project): the tiny workflow with the additions, by a package that has them."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("extended")
    shutil.copytree(tiny_folder / "model", folder / "model")
    helium(512).save_pretrained(folder / "model")
    for part in ("workflow", "envs", "config"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("Snakefile", "config.yaml"):
        shutil.copy(ROOT / part, source)
    for name, text in ENTRIES.items():
        with open(source / "workflow/obr" / name, "a", encoding="utf-8") as file:
            file.write(text)
    table = {"title": "Additions", "models": ["mine"], "rows": ["dense", "floor"], "perplexity": ["heldout"]}
    figure = {"kind": "perplexity_bits", "models": ["mine"], "rows": ["dense", "floor"], "perplexity": "heldout"}
    config = {
        **CONFIG,
        "models": {"mine": {**CONFIG["models"]["tiny"], "source": {"source": "path", "path": str(folder / "model")}}},
        "recipes": {"dense": CONFIG["recipes"]["dense"], "floor": RECIPE},
        "rotations": {"signs": {"kind": "signs", "seed": 3}},
        "tables": {"additions": table}, "figures": {"additions": figure}, "layer_options": {},
    }  # fmt: skip
    run = snakemake(folder, config, source=source)
    assert run.returncode == 0, run.stdout[-4000:]
    return folder, source


def test_added_mask_method_rotation_family_and_table_need_one_entry_each(extended):
    results = extended[0] / SMOKE
    table = pd.read_csv(results / "tables/additions.csv")
    assert list(table["method"]) == ["dense", "floor"]
    assert (results / "figures/additions.pdf").stat().st_size > 1000
    assert json.loads((results / "compressed/mine/floor/config.json").read_text())["model_type"] == "helium"
    manifest = json.loads((results / "compressed/mine/floor/manifest.json").read_text())
    assert manifest["recipe"]["mask"] == "input_norm" and manifest["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert manifest["rotation"]["kind"] == "signs" and manifest["rotation"].get("unrotated") is None


def test_plan_of_added_entries_needs_no_entry_of_its_own(extended):
    folder, source = extended
    command = [sys.executable, "-m", "obr", "plan", "--snakefile", str(source / "Snakefile"), "--configfile"]
    again = [str(folder / "config.test.yaml"), "--config", f"results={folder / 'none'}"]
    run = subprocess.run([*command, *again], text=True, capture_output=True, env=environment(source), cwd=folder)
    assert run.returncode == 0 and "compress" in run.stdout, run.stderr[-2000:]


def test_added_family_needs_one_entry_for_models_in_memory(monkeypatch):
    model = helium(64)
    tokens = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0))
    with pytest.raises(obr.ObrError, match="helium"):
        obr.compress(model, tokens, {"method": "obr_gptq"}, progress=False)
    monkeypatch.setitem(FAMILIES, "helium", Layout())
    before = model(input_ids=tokens).logits
    model = obr.rotate(model, "quarot", seed=0)
    assert torch.allclose(model(input_ids=tokens).logits, before, atol=2e-4)
    obr.compress(model, tokens, {"method": "obr_gptq", "bits": 4}, progress=False)
    assert float((model.model.layers[1].mlp.down_proj.weight == 0).float().mean()) >= 0.49
