"""One more mask, method, rotation, family and table: an entry each, and its function where it has one.

The copy of the package has them from the start of a process, so the whole tiny workflow knows them.
"""

import json
import shutil

import pandas as pd
import pytest
import torch
import transformers

import obr
from helpers.paths import ROOT
from helpers.workflow_runs import CONFIG, SMOKE, snakemake
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


@pytest.fixture(scope="module")
def extended(tiny_folder, tmp_path_factory):
    """The results of the tiny workflow for a table with the additions, by a package that has them."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("extended")
    for part in ("workflow", "envs", "config"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("Snakefile", "config.yaml"):
        shutil.copy(ROOT / part, source)
    for name, text in ENTRIES.items():
        with open(source / "workflow/obr" / name, "a", encoding="utf-8") as file:
            file.write(text)
    table = {"title": "Additions", "models": ["tiny"], "rows": ["dense", "floor"], "perplexity": ["heldout"]}
    figure = {"kind": "perplexity_bits", "models": ["tiny"], "rows": ["dense", "floor"], "perplexity": "heldout"}
    config = {
        **CONFIG,
        "recipes": {"dense": CONFIG["recipes"]["dense"], "floor": RECIPE},
        "rotations": {"signs": {"kind": "signs", "seed": 3}},
        "tables": {"additions": table}, "figures": {"additions": figure}, "layer_options": {},
    }  # fmt: skip
    run = snakemake(folder, config, source=source)
    assert run.returncode == 0, run.stdout[-4000:]
    return folder / SMOKE


def test_added_mask_method_rotation_and_table_need_one_entry_each(extended):
    table = pd.read_csv(extended / "tables/additions.csv")
    assert list(table["method"]) == ["dense", "floor"]
    assert (extended / "figures/additions.pdf").stat().st_size > 1000
    manifest = json.loads((extended / "compressed/tiny/floor/manifest.json").read_text())
    assert manifest["recipe"]["mask"] == "input_norm" and manifest["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert manifest["rotation"]["kind"] == "signs"


def test_added_family_needs_one_entry(monkeypatch):
    name, kind = "helium", transformers.HeliumConfig
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = kind(
        **sizes, num_key_value_heads=2, head_dim=8, vocab_size=64, pad_token_id=0, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = transformers.HeliumForCausalLM(config).eval()
    tokens = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0))
    with pytest.raises(obr.ObrError, match=name):
        obr.compress(model, tokens, {"method": "obr_gptq"}, progress=False)
    monkeypatch.setitem(FAMILIES, name, Layout())
    before = model(input_ids=tokens).logits
    model = obr.rotate(model, "quarot", seed=0)
    assert torch.allclose(model(input_ids=tokens).logits, before, atol=2e-4)
    obr.compress(model, tokens, {"method": "obr_gptq", "bits": 4}, progress=False)
    assert float((model.model.layers[1].mlp.down_proj.weight == 0).float().mean()) >= 0.49
