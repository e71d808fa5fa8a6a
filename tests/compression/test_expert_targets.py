"""Experts with outputs of the dense model as targets, and with Hessians of their block as it was."""

import pytest
import torch

import obr
from helpers.family_models import EXPERTS, TOKENS, random_model
from obr.calibration.expert_inputs import DenseBlock, ExpertInputs
from obr.compression.recompute import Places, repeat
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.data.token_windows import write_tokens
from obr.methods.layer_hessian import Hessian
from obr.methods.restore import restore
from obr.models.blocks import Blocks, run_block

SPARSE = "qwen3_moe, a dense block"
FAMILIES = [SPARSE, "deepseek_v3"]


def model_of(family=SPARSE):
    return random_model(EXPERTS[family], torch.float32)


def at_block_1(model):
    """(the block, its layout, what enters it, its arguments) of a model in memory."""
    blocks = Blocks(model)
    hidden, arguments = blocks.embed(TOKENS)
    block = blocks.load(0)
    for window, states in enumerate(hidden):
        hidden[window] = run_block(block, states, arguments[0])
    return blocks.load(1), blocks.layout_at(1), hidden, arguments[1]


def watched(block, layout, hidden, arguments):
    """By window: (states that enter the experts, numbers, weights, the stream that they add to), in float64."""
    seen, streams = [], []
    experts = block.get_submodule(layout.experts)
    hook = block.get_submodule(layout.norms["up_gate"]).register_forward_pre_hook(
        lambda _module, inputs: streams.append(inputs[0][0].double())
    )
    experts.observer = lambda *found: seen.append([x.clone() for x in found])
    for states in hidden:
        run_block(block, states, arguments)
    hook.remove()
    experts.observer = None
    return [(*found, stream) for found, stream in zip(seen, streams, strict=True)]


def reads(block, layout, number, group, x):
    """What a layer of an expert reads of states x (t, d), in float64."""
    expert, x = block.get_submodule(f"{layout.experts}.{number}"), x.double()
    if group == "up_gate":
        return x
    gate, up = (x @ layer.weight.double().T for layer in (expert.gate_proj, expert.up_proj))
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group", ["up_gate", "down"])
def test_targets_pair_an_experts_tokens_with_the_dense_models_states(family, group):
    """Token by token, whatever experts the dense model's router chose; the lack is split by squared weights."""
    there, here = model_of(family), obr.compress(model_of(family), None, {"method": "rtn", "bits": 3}, progress=False)
    dense, layout, dense_hidden, _ = at_block_1(there)
    block, _, hidden, arguments = at_block_1(here)
    inputs = ExpertInputs(block, layout, hidden, arguments, dense=DenseBlock(dense, dense_hidden, pays_back=True))
    ours, theirs = watched(block, layout, hidden, arguments), watched(dense, layout, dense_hidden, arguments)
    assert any(not torch.equal(a[1].sort()[0], b[1].sort()[0]) for a, b in zip(ours, theirs, strict=True))
    for e in range(8):
        drift, lacking = 0.0, 0.0
        for (x, numbers, weights, stream), (dense_x, _, _, dense_stream) in zip(ours, theirs, strict=True):
            for t in range(len(x)):
                chosen = numbers[t].tolist()
                if e not in chosen:
                    continue
                g = weights[t].double()
                own = g[chosen.index(e)]
                read = own * reads(block, layout, e, group, x[t][None])
                wanted = own * reads(dense, layout, e, group, dense_x[t][None])
                drift = drift + (wanted - read).T @ read
                lacking = lacking + own**2 / g.square().sum() * (dense_stream - stream)[t][:, None] @ read
        found = inputs.statistics(f"experts.{e}.{group}", share=False)
        assert (found.lacking is None) == (group == "up_gate")
        for ours_is, naive in ((found.drift, drift), (found.lacking, lacking)):
            if ours_is is not None and inputs.tokens(e):
                torch.testing.assert_close(ours_is.double(), naive, rtol=1e-3, atol=1e-4 * float(naive.abs().max()))


def test_shares_of_an_experts_lack_add_up_to_the_lack_of_its_tokens():
    here = obr.compress(model_of(), None, {"method": "rtn", "bits": 3}, progress=False)
    dense, layout, dense_hidden, _ = at_block_1(model_of())
    block, _, hidden, arguments = at_block_1(here)
    inputs = ExpertInputs(block, layout, hidden, arguments, dense=DenseBlock(dense, dense_hidden, pays_back=True))
    total = sum(found.lack.sum(0) for e in range(8) for found in inputs._tokens_of(e))
    wanted = sum(lack[0].sum(0) for lack in inputs.lack)
    torch.testing.assert_close(total, wanted, rtol=1e-3, atol=1e-4)


def test_experts_of_block_scope_see_none_of_their_blocks_changes():
    recipe = {"method": "gptq", "bits": 3, "hessian_scope": "block"}
    done = obr.compress(model_of(), TOKENS, recipe, progress=False)
    dense, layout, _, arguments = at_block_1(model_of())
    _, _, hidden, _ = at_block_1(done)
    inputs, compressed = ExpertInputs(dense, layout, hidden, arguments), Blocks(done).load(1)
    differ = 0
    for e in range(8):
        for group in (f"experts.{e}.up_gate", f"experts.{e}.down"):
            hessian = Hessian(inputs.collect(group).hessian, Recipe.parse({**recipe, "calibration": "c"}).damp)
            for name in layout.groups[group]:
                expected = restore(dense.get_submodule(name).weight, hessian, "gptq", bits=3).weight
                differ += int(((compressed.get_submodule(name).weight - expected).abs() > 1e-4).sum())
    assert differ < 0.005 * 8 * 3 * 64 * 32


OPTIONS = [
    {"asymmetry": 0.5}, {"asymmetry": 0.3, "residual": 0.5}, {"residual": 0.5, "hessian_scope": "block"},
    {"asymmetry": 0.5, "residual": 0.5, "target_shrinkage": "held_out", "held_out": 1}, {"hessian_scope": "block"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_experts_with_targets_are_made_again_to_the_last_bit(options, tmp_path):
    """Streamed, through the stage; and every option changes what experts become."""
    model_of().half().save_pretrained(tmp_path / "model")
    tokens = torch.randint(1, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    write_tokens(tokens, {"nsamples": 4, "seqlen": 32, "tokens": 128}, tmp_path / "tokens.safetensors")
    errors = []
    for number, extra in enumerate(({}, options)):
        recipe = Recipe.parse({"method": "gptq", "bits": 3, "calibration": "c", **extra})
        out, found = tmp_path / "m" / str(number), tmp_path / "tokens.safetensors"
        compress_stage(tmp_path / "model", recipe, out, tokens=found, device="cpu")
        errors.append(obr.load(out, device="cpu").model.layers[1].mlp.experts.get_submodule("3.down_proj").weight)
    assert not torch.equal(*errors)
    again = repeat(out, 12, Places(tmp_path / "model", None, tmp_path / "tokens.safetensors"), device="cpu")
    assert any(".experts." in layer.layer for layer in again) and all(layer.identical for layer in again)
