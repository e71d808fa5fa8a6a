"""Mixtures of experts: a Hessian for each expert from the tokens that the router sends to it, and what follows."""

import csv
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OlmoeConfig

import obr
from helpers.family_models import EXPERTS, RELATIVES, TOKENS, change, exact_model, random_model
from helpers.live_bytes import peak_bytes
from obr.calibration.collect_hessians import hessian_stage
from obr.calibration.expert_inputs import ExpertInputs
from obr.checkpoints.format import CheckpointBlocks
from obr.checkpoints.verify import verify_checkpoint
from obr.compression.stage import compress_stage
from obr.config.methods import METHODS
from obr.config.recipe import Recipe
from obr.data.token_windows import write_tokens
from obr.errors import ObrError
from obr.models import split
from obr.models.architectures import FAMILIES, Dimensions
from obr.models.blocks import Blocks, StreamedBlocks, run_block
from obr.planning import memory, tensor_sizes
from obr.rotations import fold, obtain, registry

PACKED = 0.75  # bytes a weight, of codes beside the weights, and of a file as it is written
SPARSE = "qwen3_moe, a dense block"


EVERY = {**EXPERTS, "glm4_moe": RELATIVES["glm4_moe"]}


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("kind", registry.KINDS)
def test_logits_do_not_change(family, kind):
    assert change(exact_model(EVERY[family]), lambda m: obr.rotate(m, kind, seed=7)) < 1e-11
    assert change(random_model(EVERY[family], torch.float32), lambda m: obr.rotate(m, kind, seed=7)) < 1e-3


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("is_fused", [False, True], ids=["module lists", "fused tensors"])
def test_streamed_blocks_compute_the_same(family, is_fused, tmp_path):
    """Files have the experts one by one, as the hub's do, or in the fused tensors of transformers."""
    model = random_model(EXPERTS[family], torch.float32)
    model.save_pretrained(tmp_path, save_original_format=not is_fused)
    names = split.TensorFiles(tmp_path).files
    assert any(name.endswith(".gate_up_proj") for name in names) == is_fused
    plain = model(TOKENS).logits
    for rotation in (None, *(registry.draw(kind, Dimensions.of(model.config), 3) for kind in registry.KINDS)):
        blocks = StreamedBlocks(tmp_path, rotation, dtype=torch.float32, device="cpu")
        hidden, arguments = blocks.embed(TOKENS)
        for index in range(len(blocks)):
            block = blocks.load(index)
            hidden = [run_block(block, states, arguments[index]) for states in hidden]
        logits = blocks.logits(torch.cat(list(hidden)))
        assert torch.allclose(logits, plain, atol=1e-3 * float(plain.abs().max()))


@pytest.mark.parametrize("kind", ["quarot", "ostquant", "scaling", "flatquant"])
def test_a_router_that_is_not_folded_shows(kind, monkeypatch):
    monkeypatch.setattr(fold, "fold_readers", lambda *_, **__: {})
    assert change(exact_model(EXPERTS["mixtral"]), lambda m: obr.rotate(m, kind)) > 1e-3


@pytest.mark.parametrize("kind", ["ostquant", "scaling", "flatquant"])
def test_scales_of_an_expert_that_its_down_layer_does_not_undo_show(kind, monkeypatch):
    fold_inputs = fold._fold_inputs

    def without(role, weight, bias, changes, gain):
        left = {mlp: scale for mlp, scale in changes.products.items() if role != "experts.1.down"}
        return fold_inputs(role, weight, bias, replace(changes, products=left), gain)

    monkeypatch.setattr(fold, "_fold_inputs", without)
    assert change(exact_model(EXPERTS["mixtral"]), lambda m: obr.rotate(m, kind)) > 1e-3


def routed(model, index: int):
    """(expert inputs of a block, what each window's experts read: states, numbers, weights)."""
    blocks = Blocks(model)
    hidden, arguments = blocks.embed(TOKENS)
    for before in range(index):
        block = blocks.load(before)
        for window, states in enumerate(hidden):
            hidden[window] = run_block(block, states, arguments[before])
    block, layout = blocks.load(index), blocks.layout_at(index)
    seen = []
    block.get_submodule(layout.experts).observer = lambda *found: seen.append([x.clone() for x in found])
    for states in hidden:
        run_block(block, states, arguments[index])
    return ExpertInputs(block, layout, hidden, arguments[index]), seen


def test_hessians_are_of_each_experts_tokens_weighted_as_routed():
    inputs, seen = routed(random_model(EXPERTS[SPARSE], torch.float32), 1)
    total, down = dict.fromkeys(range(8), 0.0), dict.fromkeys(range(8), 0.0)
    for states, numbers, weights in seen:
        for x, chosen, g in zip(states, numbers, weights, strict=True):
            for e, factor in zip(chosen.tolist(), g, strict=True):
                expert = inputs.block.mlp.experts.get_submodule(str(e))
                h = expert.act_fn(expert.gate_proj(x)) * expert.up_proj(x)
                total[e] = total[e] + factor**2 * x.outer(x) * 2 / len(seen)
                down[e] = down[e] + factor**2 * h.outer(h) * 2 / len(seen)
    counts = [inputs.tokens(e) for e in range(8)]
    assert sum(counts) == 2 * TOKENS.numel()
    for e in (number for number in range(8) if counts[number]):
        for group, wanted in ((f"experts.{e}.up_gate", total[e]), (f"experts.{e}.down", down[e])):
            found = inputs.collect(group, share=False)
            assert found.tokens == counts[e]
            assert torch.allclose(found.hessian, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kilobytes", [0, 4, 1e6])
def test_experts_are_the_same_however_many_are_gathered_at_once(kilobytes):
    inputs, _ = routed(random_model(EXPERTS[SPARSE], torch.float32), 1)
    wanted = {e: inputs.collect(f"experts.{e}.down").hessian for e in range(8)}
    inputs.gathered, inputs.bytes, most = {}, 1e3 * kilobytes, 0
    for e in range(8):
        assert torch.equal(inputs.collect(f"experts.{e}.down").hessian, wanted[e])
        most = max(most, len(inputs.gathered))
    assert most == {0: 1, 1e6: 8}.get(kilobytes, most)


def test_experts_with_few_tokens_share_by_the_written_rule():
    """H = m (t/n A + (1 - t/n) B): A of its own tokens, B of all tokens of the block, m its squared weights."""
    inputs, seen = routed(random_model(EXPERTS[SPARSE], torch.float32), 1)
    states = torch.cat([found[0] for found in seen])
    everything = states.T @ states * 2 / len(seen) / len(states)
    numbers, weights = (torch.cat([found[i] for found in seen]) for i in (1, 2))
    for e in range(8):
        own, shared, t = (
            inputs.collect(f"experts.{e}.up_gate", share=False).hessian,
            inputs.collect(f"experts.{e}.up_gate"),
            inputs.tokens(e),
        )
        mass = float(weights[numbers == e].square().sum()) if t else 1.0
        wanted = t / 64 * own + (1 - t / 64) * mass * everything
        assert t < 64 and shared.tokens == t
        assert torch.allclose(shared.hessian, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("method", [name for name, about in METHODS.items() if not about.adopted])
def test_every_method_compresses_experts_and_the_checkpoint_is_whole(method, tmp_path):
    model = random_model(EXPERTS[SPARSE], torch.float32)
    obr.rotate(model, "quarot", seed=1)
    recipe = {"method": method, **({"sweeps": 2} if method == "joint" else {})}
    obr.compress(model, TOKENS, recipe, progress=False)
    manifest = obr.save(model, tmp_path)
    assert verify_checkpoint(tmp_path) == []
    assert torch.equal(obr.load(tmp_path, device="cpu")(TOKENS).logits, model(TOKENS).logits)
    with open(tmp_path / "layers.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 + 4 + 8 * 3
    of_experts = [row for row in rows if ".experts." in row["layer"]]
    if METHODS[method].data_free:
        assert "tokens" not in rows[0]
        return
    assert sum(int(row["tokens"]) for row in of_experts if row["layer"].endswith("up_proj")) == 2 * TOKENS.numel()
    assert all(row["tokens"] == "" for row in rows if row not in of_experts)
    few = [row for row in of_experts if int(row["tokens"]) < int(row["columns"])]
    assert few and all(f"{row['tokens']} tokens for {row['columns']} columns" in row["flags"] for row in few)
    assert not any("tokens for" in row["flags"] for row in rows if row not in few)
    assert manifest["flagged_layers"] >= len(few)


@pytest.mark.parametrize("family", EXPERTS)
def test_every_family_goes_from_folder_to_checkpoint_and_back(family, tmp_path):
    """Streamed, with quantised activations; the router stays at 16 bits, and transformers reads what is written."""
    model = random_model(EXPERTS[family], torch.float32).half().float()
    model.save_pretrained(tmp_path / "model")
    write_tokens(TOKENS, {"nsamples": 2, "seqlen": 20, "tokens": 40}, tmp_path / "tokens.safetensors")
    recipe = Recipe.parse({"method": "obr_gptq", "calibration": "c", "activations": {"bits": 8}})
    tokens = tmp_path / "tokens.safetensors"
    compress_stage(tmp_path / "model", recipe, tmp_path / "packed", tokens=tokens, device="cpu")
    assert verify_checkpoint(tmp_path / "packed") == []
    loaded = obr.load(tmp_path / "packed", device="cpu")
    blocks = CheckpointBlocks(tmp_path / "packed", dtype=torch.float32, device="cpu")
    hidden, arguments = blocks.embed(TOKENS)
    for index in range(len(blocks)):
        hidden = [run_block(blocks.load(index), states, arguments[index]) for states in hidden]
    logits = loaded(TOKENS).logits
    assert torch.allclose(blocks.logits(torch.cat(list(hidden))), logits, atol=1e-4 * float(logits.abs().max()))
    packed = obr.load(tmp_path / "packed", device="cpu", packed=True)(TOKENS).logits
    assert torch.allclose(packed, logits, atol=1e-3 * float(logits.abs().max()))
    router = loaded.model.layers[1].mlp.gate
    assert torch.equal(router.weight, model.model.layers[1].mlp.gate.weight.half().float())
    assert not isinstance(router, nn.Linear) and "mlp.gate" not in FAMILIES["mixtral"].linears


def test_settings_without_meaning_for_experts_are_refused():
    def refused(recipe, match, family=SPARSE):
        with pytest.raises(ObrError, match=match):
            obr.compress(random_model(EXPERTS[family], torch.float32), TOKENS, recipe, progress=False)

    refused({"method": "gptq", "token_weights": 0.5}, "sends elsewhere, for which no gradient is known")
    low = {"method": "rtn", "keys": {"bits": 4}, "values": {"bits": 4}}
    refused(low, "caches a latent vector", "deepseek_v3")
    options = [{"method": "gptq", "bits": 4}, {"method": "gptq", "bits": 3}]
    refused(
        {"method": "gptq", "allocation": {"bits": 3.5, "options": options}},
        "thousands of layers; leave allocation out",
    )


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Folder of a model with 64 experts in its one block, its rotation, and tokens to calibrate on."""
    folder = tmp_path_factory.mktemp("many")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=128, hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_experts=64, num_experts_per_tok=4, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).half()  # converted as it is read: what is not stays mapped
    model.save_pretrained(folder / "model", max_shard_size="500KB")  # the profiler counts a whole file as it is open
    obtain.make({"kind": "quarot", "seed": 0}, folder / "model", folder / "rotation.safetensors")
    tokens = torch.randint(1, 128, (16, 64), generator=torch.Generator().manual_seed(0))
    write_tokens(tokens, {"nsamples": 16, "seqlen": 64, "tokens": 1024}, folder / "tokens.safetensors")
    return folder


def compressed(folder, out, **options):
    recipe = Recipe.parse({"method": "gptq", "calibration": "c", "rotation": "quarot", **options})
    files = {"rotation": folder / "rotation.safetensors", "tokens": folder / "tokens.safetensors"}
    return compress_stage(folder / "model", recipe, out, device="cpu", **files)


@pytest.mark.slow
def test_a_block_of_64_experts_takes_what_plans_say(many, tmp_path):
    """A block, and one expert's Hessian and solve at a time, not the Hessians of all 64."""
    peak = peak_bytes(lambda: compressed(many, tmp_path / "packed"))
    sizes = tensor_sizes.sizes_in(many / "model")
    states = memory.states_of("compress", sizes, 16 * 64, on_gpu=False)
    hessians = 4.0 * sum(n**2 for n in sizes.inputs)
    planned = memory.compressing(sizes, "gptq", 64, on_gpu=False) + states + PACKED * sizes.block
    assert sizes.inputs.count(64) == 64 and hessians > 5e6
    assert 0.7 * planned < peak < planned < 1.1 * (4.0 * sizes.block + hessians)


@pytest.mark.slow
def test_cached_hessians_give_the_experts_tokens_and_flags(many, tmp_path):
    hessian_stage(many / "model", many / "rotation.safetensors", many / "tokens.safetensors", tmp_path / "h")
    recipe = Recipe.parse({"method": "gptq", "calibration": "c", "rotation": "quarot", "hessian": "cached"})
    compress_stage(
        many / "model", recipe, tmp_path / "packed", rotation=many / "rotation.safetensors", hessians=tmp_path / "h",
        device="cpu",
    )  # fmt: skip
    with open(tmp_path / "packed/layers.csv", encoding="utf-8") as file:
        of_experts = [row for row in csv.DictReader(file) if row["layer"].endswith("up_proj")]
    assert sum(int(row["tokens"]) for row in of_experts) == 4 * 1024
    assert any("Hessian shared" in row["flags"] for row in of_experts)
    assert verify_checkpoint(tmp_path / "packed") == []


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("is_fused", [False, True], ids=["module lists", "fused tensors"])
def test_dense_checkpoints_refer_to_the_models_experts(family, is_fused, tmp_path):
    model = random_model(EXPERTS[family], torch.float32)
    model.save_pretrained(tmp_path / "model", save_original_format=not is_fused)
    compress_stage(tmp_path / "model", Recipe.parse({"method": "dense"}), tmp_path / "packed", device="cpu")
    assert (
        not list((tmp_path / "packed").glob("block_*.safetensors")) and verify_checkpoint(tmp_path / "packed") == []
    )
    logits = obr.load(tmp_path / "packed", device="cpu")(TOKENS).logits
    wanted = model(TOKENS).logits
    assert torch.allclose(logits, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_transformers_reads_packed_experts(tmp_path):
    model = random_model(EXPERTS["mixtral"], torch.float32)
    obr.save(obr.compress(model, None, {"method": "rtn", "bits": 8}, progress=False), tmp_path)
    obr.register_with_transformers()
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(read(TOKENS).logits, obr.load(tmp_path, device="cpu")(TOKENS).logits)


ALTERED = {
    "hook": (lambda e: e.down_proj.register_forward_hook(lambda *_: None), r"experts\.1\.down_proj has the hook"),
    "another layer": (
        lambda e: setattr(e, "up_proj", type("Adapted", (nn.Linear,), {})(64, 32)), r"1\.up_proj is a \S+Adapted",
    ),
    "activation": (lambda e: setattr(e, "act_fn", nn.GELU()), r"experts\.1\.act_fn is a \S+GELU"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ALTERED)
def test_an_expert_that_was_altered_after_compression_is_refused(kind, tmp_path):
    change, message = ALTERED[kind]
    model = obr.compress(random_model(EXPERTS["olmoe"], torch.float32), None, {"method": "rtn"}, progress=False)
    change(model.model.layers[1].mlp.experts.get_submodule("1"))
    for way in (lambda: obr.perplexity(model, TOKENS), lambda: obr.save(model, tmp_path / "packed")):
        with pytest.raises(ObrError, match=message):
            way()


def test_an_activation_of_fused_experts_is_compared():
    model = random_model(EXPERTS["olmoe"], torch.float32)
    model.model.layers[0].mlp.experts.act_fn = nn.GELU()
    with pytest.raises(ObrError, match=r"experts\.act_fn is a \S+GELU"):
        obr.compress(model, None, {"method": "rtn"}, progress=False)
