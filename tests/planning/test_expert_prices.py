"""Prices of mixtures of experts: what a token passes is what costs time, all weights are what costs storage."""

import json

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.family_models import EXPERTS
from helpers.paths import ROOT
from obr.config.model_sizes import sizes_of
from obr.config.recipe import Recipe
from obr.config.workflow import check_widths
from obr.errors import ObrError
from obr.models.architectures import layout_of
from obr.models.split import take_model_apart
from obr.planning import cost_model, memory, tensor_sizes
from obr.planning.plan import plan_of, summary

# The sizes in config.json of Qwen3-30B-A3B.
A3B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 48,
    "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
}  # fmt: skip
SIZES = {
    "hidden": 2048, "intermediate": 6144, "heads": 32, "kv_heads": 4, "head_dim": 128, "blocks": 48,
    "vocabulary": 151936, "experts": {"number": 128, "chosen": 8, "width": 768},
}  # fmt: skip


def test_a_30b_a3b_has_30_billion_weights_and_3_active():
    sizes = tensor_sizes.Sizes.of(A3B, "a3b")
    assert sizes == tensor_sizes.Sizes.from_config(SIZES)
    assert sizes.block * sizes.blocks + sizes.ends == pytest.approx(30.5e9, rel=0.01)
    assert sizes.active * sizes.blocks + sizes.ends == pytest.approx(3.35e9, rel=0.03)
    recipe = Recipe.parse({"method": "obr_gptq", "calibration": "c", "sparsity": 0.5, "rotation": "quarot"})
    packed = cost_model.checkpoint_bytes(sizes, recipe)
    assert packed == pytest.approx(30e9 * 3 / 8 + 2 * sizes.ends, rel=0.02)
    host, gpu = memory.memory("compress", sizes, 128 * 2048, 2048, True, recipe)
    assert gpu < 24 and host < 16
    dense = tensor_sizes.Sizes.estimate(30.5)
    assert sizes.forward(1000, 2048) < dense.forward(1000, 2048) / 5
    assert sizes.hessians(1000) < 0.1 * 2.0 * 1000 * sizes.blocks * sum(n**2 for n in sizes.inputs)


@pytest.mark.parametrize("family", EXPERTS)
def test_layers_are_counted_as_they_are(family):
    """All blocks count as ones with experts."""
    config = EXPERTS[family]
    dense = {"first_k_dense_replace": 0, "mlp_only_layers": []}
    raw = {**config.to_dict(), "num_hidden_layers": 2, "vocab_size": 64, "model_type": config.model_type}
    raw = {key: value for key, value in raw.items() if key not in ("layer_types", "dtype")}
    raw |= {key: value for key, value in dense.items() if key in raw}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    layout = layout_of(model.config)
    take_model_apart(model, layout)
    block = model.model.layers[1]
    own = layout.in_block(block)
    found = {tuple(block.get_submodule(name).weight.shape) for name in own.linears}
    sizes = tensor_sizes.Sizes.of(json.loads(model.config.to_json_string()), family)
    assert sizes.block == sum(block.get_submodule(name).weight.numel() for name in own.linears)
    assert sizes.inputs.count(64) >= 1 and set(sizes.layers) == found
    assert len(sizes.inputs) == len(own.groups)


def test_a_pattern_must_divide_the_width_of_experts():
    check_widths(A3B, {"r": "2:4"}, "a3b")
    with pytest.raises(ObrError, match="down_proj of experts of a3b"):
        check_widths(A3B | {"moe_intermediate_size": 770}, {"r": "2:4"}, "a3b")
    assert sizes_of(A3B, "a3b").widths()["down_proj of experts"] == 768


@pytest.mark.workflow
def test_plan_prices_a_30b_a3b(tmp_path):
    """With half a dozen rows, from a configuration of one's own."""
    entry = {"label": "Qwen3-30B-A3B", "parameters": 30.5, "sizes": SIZES, "source": {
        "source": "hub", "repo": "Qwen/Qwen3-30B-A3B", "revision": "main"}}  # fmt: skip
    rows = [{"recipe": "dense"}] + [
        {"recipe": name, "activations": "a4kv4"}
        for name in ("gptq-w4-quarot", "gptq-w3-quarot", "obr_gptq-w4s50-quarot")
    ]
    table = {"title": "experts", "models": ["a3b"], "rows": rows, "perplexity": ["wikitext2"]}
    config = {"experiments": [], "models": {"a3b": entry}, "tables": {"experts": table}, "device": "cuda"}
    (tmp_path / "experts.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    plan = plan_of(
        ROOT / "Snakefile", [tmp_path / "experts.yaml"], {"results": str(tmp_path / "r")}, [], 16, 1, gpu_memory=24
    )
    assert set(plan.by_model) >= {"a3b"} and plan.gpu < 24
    assert 55 < plan.fetched < 70  # 16 bits of each of 30.5 billion weights
    assert 3600 < plan.busy < 100 * 3600 and "Every job fits into a GPU of 24 GB." in summary(plan)
