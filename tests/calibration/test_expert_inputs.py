"""What the experts of a block read, against oracles that loop over tokens, for every way of routing."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen2MoeConfig

from helpers.family_models import EXPERTS, RELATIVES, TOKENS, random_model
from obr.calibration.collect_hessians import collect
from obr.calibration.expert_inputs import ExpertInputs, shared_flags
from obr.models.blocks import Blocks, run_block
from obr.models.layers import wrap_block

HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
V3 = EXPERTS["deepseek_v3"].to_dict()
V2 = EXPERTS["deepseek_v2"].to_dict()
ROUTED = {
    **EXPERTS,
    "glm4_moe": RELATIVES["glm4_moe"],
    "one of a block's experts": MixtralConfig(
        **HEADS, intermediate_size=48, num_local_experts=4, num_experts_per_tok=1
    ),
    "all of a block's experts": OlmoeConfig(**HEADS, intermediate_size=32, num_experts=4, num_experts_per_tok=4),
    "normalised weights": OlmoeConfig(
        **HEADS, intermediate_size=32, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True
    ),
    "a single expert": Qwen2MoeConfig(
        **HEADS, intermediate_size=96, moe_intermediate_size=32, shared_expert_intermediate_size=48, num_experts=1,
        num_experts_per_tok=1,
    ),
    "two groups of four": DeepseekV3Config(
        **{**V3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
    ),
    "weights as they are": DeepseekV3Config(**{**V3, "routed_scaling_factor": 0.5, "norm_topk_prob": False}),
    "group limited": DeepseekV2Config(
        **{**V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 3.0}
    ),
}  # fmt: skip


def biased(model):
    """The model, its routers with another correction of choices for every expert, where they have one."""
    for module in model.modules():
        if (bias := getattr(module, "e_score_correction_bias", None)) is not None:
            bias.copy_(torch.linspace(-0.2, 0.2, len(bias)))
    return model


def of_block_1(model, tokens=TOKENS) -> tuple[ExpertInputs, list]:
    """(inputs of the experts of block 1; by window what enters and leaves its MLP in transformers' own forward)."""
    plain, seen = copy.deepcopy(model), []
    plain.set_experts_implementation("eager")
    plain.model.layers[1].mlp.register_forward_hook(lambda _module, x, out: seen.append((x[0][0], out[0])))
    for window in tokens:
        plain(window[None])
    blocks = Blocks(model)
    hidden, arguments = blocks.embed(tokens)
    block = blocks.load(0)
    for window, states in enumerate(hidden):
        hidden[window] = run_block(block, states, arguments[0])
    return ExpertInputs(blocks.load(1), blocks.layout_at(1), hidden, arguments[1]), seen


@pytest.mark.parametrize("family", ROUTED)
def test_weighted_experts_of_the_found_tokens_add_up_to_the_mlp(family):
    """States, choices and weights are those that give transformers' own output, whatever the router does."""
    inputs, seen = of_block_1(biased(random_model(ROUTED[family], torch.float32)))
    mlp = inputs.block.mlp
    chosen = ROUTED[family].num_experts_per_tok
    assert sum(map(inputs.tokens, range(inputs.count))) == chosen * TOKENS.numel()
    for states, (numbers, weights), (x, out) in zip(inputs.states, inputs.chosen, seen, strict=True):
        torch.testing.assert_close(states[0], x, rtol=1e-3, atol=1e-4)
        total = torch.zeros_like(out)
        for t in range(len(x)):
            assert len(set(numbers[t].tolist())) == chosen
            for number, g in zip(numbers[t].tolist(), weights[t], strict=True):
                total[t] += g * mlp.experts.get_submodule(str(number))(x[t][None])[0]
        if hasattr(mlp, "shared_experts"):
            total += mlp.shared_experts(x[None])[0]
        if hasattr(mlp, "shared_expert"):
            total += torch.sigmoid(mlp.shared_expert_gate(x)) * mlp.shared_expert(x)
        torch.testing.assert_close(total, out, rtol=1e-3, atol=1e-3 * float(out.abs().max()))


def naive(inputs, number: int, group: str) -> torch.Tensor:
    """H (n, n) of an expert's layers by the written rule, float64, token by token."""
    expert = inputs.block.mlp.experts.get_submodule(str(number))

    def read(x):
        x = x.double()
        if group == "up_gate":
            return x
        return expert.act_fn(x @ expert.gate_proj.weight.double().T) * (x @ expert.up_proj.weight.double().T)

    n, windows = (expert.up_proj if group == "up_gate" else expert.down_proj).weight.shape[1], len(inputs.states)
    own, everything, mass, tokens, count = torch.zeros(2, n, n).double(), 0.0, 0.0, 0, 0
    own, everything = own[0], own[1]
    for states, (numbers, weights) in zip(inputs.states, inputs.chosen, strict=True):
        for x, chosen, g in zip(states[0], numbers, weights, strict=True):
            r = read(x[None])
            everything, count = everything + r.T @ r, count + 1
            for e, factor in zip(chosen.tolist(), g.double(), strict=True):
                if e == number:
                    own, mass, tokens = own + factor**2 * r.T @ r, mass + float(factor**2), tokens + 1
    if tokens < n:
        own, shared = own / (mass or 1.0), everything / count
        share = tokens / n if mass else 0.0
        own = (mass or 1.0) * (share * own + (1 - share) * shared)
    return own * 2 / windows


@pytest.mark.parametrize("family", ["two groups of four", "one of a block's experts", "all of a block's experts"])
@pytest.mark.parametrize("group", ["up_gate", "down"])
def test_hessians_follow_the_written_rule_for_many_and_few_tokens(family, group):
    tokens = torch.randint(1, 64, (4, 40), generator=torch.Generator().manual_seed(0))
    inputs, _ = of_block_1(biased(random_model(ROUTED[family], torch.float32)), tokens)
    flagged = 0
    for number in range(inputs.count):
        found, wanted = inputs.collect(f"experts.{number}.{group}"), naive(inputs, number, group)
        flagged += bool(shared_flags(found))
        assert bool(shared_flags(found)) == (inputs.tokens(number) < len(wanted))
        torch.testing.assert_close(found.hessian.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert flagged == 0 if family.startswith("all") else flagged > 0


def test_an_expert_that_gets_all_tokens_leaves_the_others_the_blocks_mean():
    model = random_model(ROUTED["one of a block's experts"], torch.float32)
    router = model.model.layers[1].mlp.gate
    router.weight.zero_()
    inputs, _ = of_block_1(model)  # all scores equal: topk takes one and the same expert
    counts = [inputs.tokens(number) for number in range(4)]
    favourite = counts.index(TOKENS.numel())
    assert sorted(counts) == [0, 0, 0, TOKENS.numel()]
    for number in range(4):
        for group in ("up_gate", "down"):
            found, wanted = inputs.collect(f"experts.{number}.{group}"), naive(inputs, number, group)
            torch.testing.assert_close(
                found.hessian.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
            )
            assert found.tokens == (TOKENS.numel() if number == favourite else 0)


def test_a_weight_of_zero_is_as_no_token():
    """Nothing of what the expert puts out counts; its Hessian is the block's, and finite."""
    inputs, _ = of_block_1(random_model(ROUTED["normalised weights"], torch.float32))
    inputs.chosen = [(numbers, torch.where(numbers == 2, 0.0, weights)) for numbers, weights in inputs.chosen]
    found, wanted = inputs.collect("experts.2.down").hessian, naive(inputs, 2, "down")
    assert inputs.tokens(2) > 0 and bool(found.isfinite().all())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen2_moe, shared"])
def test_shared_experts_count_every_token_once(family):
    model = random_model(EXPERTS[family], torch.float32)
    _, seen = of_block_1(copy.deepcopy(model))
    blocks = Blocks(model)
    hidden, arguments = blocks.embed(TOKENS)
    hidden[0], hidden[1] = (run_block(blocks.load(0), hidden[i], arguments[0]) for i in (0, 1))
    layout, block = blocks.layout_at(1), blocks.load(1)
    found = collect(block, layout, hidden, arguments[1], ["shared.up_gate", "shared.down"], whole=False)
    x = torch.cat([entering for entering, _ in seen]).double()
    up, gate = (block.get_submodule(name).weight.double() for name in layout.groups["shared.up_gate"])
    inner = F.silu(x @ gate.T) * (x @ up.T)
    for group, read in (("shared.up_gate", x), ("shared.down", inner)):
        wanted = read.T @ read
        torch.testing.assert_close(
            found[group].hessian.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
        )
        assert found[group].tokens is None


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen2_moe, shared"])
def test_padded_batches_route_each_token_as_alone(family):
    model = biased(random_model(EXPERTS[family], torch.float32))
    alone = [model(window[None]).logits[0] for window in (TOKENS[0], TOKENS[1, :12])]
    layout = Blocks(model).layout
    for block in model.model.layers:
        wrap_block(block, layout)
    padded = torch.stack([TOKENS[0], F.pad(TOKENS[1, :12], (8, 0))])
    mask = torch.stack([torch.ones(20), F.pad(torch.ones(12), (8, 0))]).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=places).logits
    for found, wanted in ((logits[0], alone[0]), (logits[1, 8:], alone[1])):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
