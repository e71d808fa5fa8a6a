"""A mixture of experts that has learned something, through the commands that people type."""

import csv
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import obr
from helpers.single_scores import text_score
from helpers.tiny_model import train
from obr.cli.main import main
from obr.compression.recompute import Places, repeat
from obr.models.loading import load_tokenizer

pytestmark = pytest.mark.slow

SPEC = {"seqlen": 64, "tokens": 2048}


@pytest.fixture(scope="module")
def model(tiny_folder, tmp_path_factory):
    """Folder of a model with eight experts, of which a token gets two, and with the tiny model's tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("experts") / "model", load_tokenizer(tiny_folder / "model")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, moe_intermediate_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    tokens = torch.tensor(tokenizer((tiny_folder / "train.txt").read_text())["input_ids"])
    trained = train(AutoModelForCausalLM.from_config(config), tokens, steps=300, batch=16)
    trained.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantize(model, out, tiny_folder, *more) -> dict:
    small = ["--samples", 16, "--seqlen", 128, "--device", "cpu", "--calibration", tiny_folder / "train.txt"]
    assert main([str(part) for part in ("quantize", model, "--out", out, *small, *more)]) == 0
    return json.loads((out / "manifest.json").read_text())


def test_experts_go_through_the_commands_and_methods_keep_their_order(model, tiny_folder, tmp_path, capsys):
    """quantize, evaluate, verify, load, generate, export; compensation beats pruning alone, and more bits fewer."""
    heldout, values = tiny_folder / "heldout.txt", {}
    runs = {
        "obr": ("--method", "obr_gptq", "--bits", 4, "--sparsity", 0.5),
        "wanda": ("--method", "wanda", "--bits", 4, "--sparsity", 0.5),
        "gptq": ("--method", "gptq", "--bits", 4),
    }
    for name, options in runs.items():
        manifest = quantize(model, tmp_path / name, tiny_folder, *options)
        assert manifest["rotation"]["kind"] == "quarot"
        values[name] = text_score(tmp_path / name, heldout, SPEC, device="cpu")["value"]
    tokens = torch.tensor(load_tokenizer(model)(heldout.read_text())["input_ids"])
    windows = obr.evaluation_windows(tokens, SPEC["seqlen"], SPEC["tokens"])
    dense = obr.perplexity(obr.load_model(model, device="cpu"), windows)
    assert dense < values["gptq"] < values["obr"] < values["wanda"], (dense, values)
    assert obr.perplexity(obr.load(tmp_path / "obr", device="cpu"), windows) == pytest.approx(values["obr"], rel=1e-4)
    assert main(["verify", str(tmp_path / "obr")]) == 0
    loaded = obr.load(tmp_path / "obr", device="cpu")
    assert loaded.generate(tokens[None, :4], max_new_tokens=4, do_sample=False).shape == (1, 8)
    with open(tmp_path / "obr/layers.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["layer"].endswith("up_proj")]
    for block in ("0", "1"):
        assert sum(int(row["tokens"]) for row in rows if row["block"] == block) == 2 * 16 * 128
    capsys.readouterr()


def test_layers_of_experts_are_made_again(model, tiny_folder, tmp_path):
    quantize(model, tmp_path / "c", tiny_folder, "--method", "obr_gptq", "--bits", 4, "--sparsity", 0.5)
    work = next(path for path in tmp_path.iterdir() if path.name.startswith("c.work"))
    (tokens,) = (path for path in work.rglob("*.safetensors") if "calibration" in path.parts)
    (rotation,) = (path for path in work.rglob("*.safetensors") if "rotations" in path.parts)
    folder = next(path.parent for path in work.rglob("config.json") if "models" in path.parts)
    found = repeat(tmp_path / "c", 6, Places(folder, rotation, tokens), "cpu")
    assert any(".experts." in layer.layer for layer in found) and all(layer.identical for layer in found)
