"""Rotations learned block by block: errors fall, nothing changes at 16 bits, killed runs end with the same bytes."""

import csv
import dataclasses
import hashlib

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.family_models import FAMILIES, change, random_model
from obr.config.recipe import Recipe
from obr.data import token_windows
from obr.errors import ObrError
from obr.methods.grid import Grid
from obr.models.architectures import Dimensions
from obr.models.blocks import StreamedBlocks, run_block
from obr.models.layers import set_quantizers
from obr.rotations import apply, fold, registry
from obr.rotations.learning import awq, blockwise, flatquant, omniquant
from obr.rotations.learning.registry import learn_rotation
from obr.rotations.learning.run import LearningRun, Snapshots

pytestmark = pytest.mark.slow

LEARNED = {"bits": 4, "symmetric": False, "group_size": "head", "clip_ratio": "learned"}
PLAIN = {"bits": 8, "symmetric": False, "group_size": "head"}
ENTRIES = {
    "flatquant": {
        "epochs": 3, "batch": 2, "lr": 0.02, "lr_clips": 0.1,
        "quantise": {
            "bits": 4, "clip": "learned", "activations": {"bits": 4, "clip_ratio": "learned"},
            "keys": LEARNED, "values": LEARNED,
        },
    },
    "omniquant": {
        "epochs": 3, "batch": 2, "shifts": True, "lr_clips": 0.1,
        "quantise": {"bits": 3, "clip": "learned", "activations": {"bits": 8}, "keys": PLAIN, "values": PLAIN},
    },
    "smoothquant": {"quantise": {"bits": 8, "clip": "minmax", "activations": {"bits": 4}}},
    "awq": {"quantise": {"bits": 3, "clip": "learned"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def spiky(tiny_folder, tmp_path_factory):
    """Folder of the tiny model with channels as large as in large models; what it computes is the same."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder / "model")
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            spikes = torch.ones(96)
            spikes[[5, 40, 77]] = torch.tensor([20.0, 30.0, 40.0])
            norm.weight.data *= spikes
            for linear in readers:
                linear.weight.data /= spikes
    folder = tmp_path_factory.mktemp("spiky") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tiny_folder, tmp_path_factory):
    """A file of 16 windows of 64 tokens."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    windows = token_windows.calibration_tokens(
        tokenizer, (tiny_folder / "train.txt").read_text(), nsamples=16, seqlen=64
    )
    save_file({"tokens": windows}, path, metadata={"calibration": "{}"})
    return path


def entry_of(kind, **changed):
    learn = {"calibration": "c", "held_out": 4, **ENTRIES[kind], **changed}
    return {"kind": kind, "seed": 0, "learn": learn}


@pytest.fixture(scope="module")
def learned(spiky, tokens, tmp_path_factory):
    """kind -> (file, curve), each learned once."""
    folder, done = tmp_path_factory.mktemp("learned"), {}

    def of(kind):
        if kind not in done:
            out = folder / f"{kind}.safetensors"
            learn_rotation(entry_of(kind), spiky, tokens, out, "cpu")
            with open(out.with_suffix(".csv"), encoding="utf-8", newline="") as file:
                done[kind] = out, [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        return done[kind]

    return of


@pytest.fixture
def place(spiky, tokens, tmp_path):
    """A function that makes the first block's Place for a kind's task."""

    def make(kind, **changed):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        task = LearningRun.of(entry_of(kind, **changed), spiky, tokens, out, "cpu", torch.float32)
        source = StreamedBlocks(task.model, None, torch.float32, "cpu")
        return next(blockwise._places(task, source, False, None, {}))

    return make


@pytest.mark.parametrize("own_inputs", [False, True])
def test_hidden_states_lie_in_memory_while_all_copies_together_fit(own_inputs, spiky, tokens, tmp_path):
    """16 windows of 64 tokens and 96 channels in float32; inputs, targets and, if so wished, own inputs."""
    needed, source = 16 * 64 * 96 * 4 * (3 if own_inputs else 2) / 1e6, StreamedBlocks(spiky, device="cpu")
    for share, is_in_files in ((1.01, False), (0.99, True)):
        out = tmp_path / f"{share}"
        task = LearningRun.of(entry_of("omniquant"), spiky, tokens, out, "cpu", torch.float32)
        task.megabytes = share * needed
        made = next(blockwise._places(task, source, own_inputs, None, {}))
        assert [kept.file is not None for kept in (made.inputs, made.targets, made.own)] == [is_in_files] * 3


@pytest.mark.parametrize("kind", ["omniquant", "flatquant"])
def test_learned_rotations_do_not_depend_on_where_hidden_states_lie(kind, spiky, tokens, tmp_path):
    found = []
    for megabytes in (100, 0):
        out = tmp_path / f"{megabytes}.safetensors"
        learn_rotation(entry_of(kind, epochs=1), spiky, tokens, out, "cpu", megabytes=megabytes)
        found.append((out.read_bytes(), out.with_suffix(".csv").read_bytes()))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind, least", [("flatquant", 0.9), ("omniquant", 0.97), ("awq", 1.0), ("smoothquant", 1.0)])
def test_held_out_errors_of_blocks_fall(kind, least, learned):
    _, lines = learned(kind)
    for block in (0, 1):
        rows = [row for row in lines if row["block"] == block]
        assert rows[0]["step"] == 0 and "loss" not in rows[0]
        assert rows[-1]["held_out"] < least * rows[0]["held_out"], rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENTRIES)
def test_learned_folds_leave_logits_as_they_were(kind, learned, spiky):
    path, _ = learned(kind)
    model = AutoModelForCausalLM.from_pretrained(spiky).eval()
    windows = torch.arange(1, 65).view(2, 32)
    with torch.no_grad():
        before = model(windows).logits
        rotation = registry.load(path, Dimensions.of(model.config))
        learned_parts = rotation.changes(0)
        assert learned_parts.folded_parts()
        apply.rotate(model, rotation)
        after = model(windows).logits
    assert float((after - before).abs().max() / before.abs().max()) < 2e-5
    assert rotation.options["learned"]["calibration"] == {}


@pytest.mark.parametrize(
    "kind, family, parts",
    [
        ("awq", "llama, all heads apart", {"value", "product", "qkv norm", "up_gate norm"}),
        ("omniquant", "qwen3, head_dim apart", {"value", "value_shift", "key_scale", "qkv norm", "up_gate norm"}),
        (
            "omniquant",
            "llama 3, biases everywhere",
            {"value", "value_shift", "key_scale", "qkv norm", "up_gate norm"},
        ),
        ("flatquant", "gemma", {"value", "product", "qkv norm", "up_gate norm"}),
    ],
)
def test_learned_folds_of_other_families_leave_logits_as_they_were(kind, family, parts, tmp_path):
    model = random_model(FAMILIES[family], torch.float32)
    model.save_pretrained(tmp_path / "model")
    windows = torch.randint(1, 64, (6, 24), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": windows}, tmp_path / "tokens.safetensors", metadata={"calibration": "{}"})
    changed = {} if kind == "awq" else {"epochs": 1}
    entry = entry_of(kind, **changed)
    rotation = learn_rotation(entry, tmp_path / "model", tmp_path / "tokens.safetensors", tmp_path / "r", "cpu")
    assert set(rotation.changes(1).folded_parts()) == parts
    assert change(model, lambda model: apply.rotate(model, rotation)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flatquant", "omniquant"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(kind, learned, spiky, tokens, tmp_path, monkeypatch):
    out = tmp_path / "r.safetensors"
    write = Snapshots.write

    def write_and_die(self, tensors, note):
        write(self, tensors, note)
        raise KeyboardInterrupt

    monkeypatch.setattr(Snapshots, "write", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        learn_rotation(entry_of(kind), spiky, tokens, out, "cpu")
    monkeypatch.setattr(Snapshots, "write", write)
    seen, module = [], {"flatquant": flatquant, "omniquant": omniquant}[kind]
    descend = module.descend
    monkeypatch.setattr(module, "descend", lambda place, *rest: seen.append(place.index) or descend(place, *rest))
    learn_rotation(entry_of(kind), spiky, tokens, out, "cpu")
    assert seen == [1]  # the first block is not learned anew
    undisturbed, _ = learned(kind)
    assert hashlib.sha256(out.read_bytes()).digest() == hashlib.sha256(undisturbed.read_bytes()).digest()
    assert out.with_suffix(".csv").read_bytes() == undisturbed.with_suffix(".csv").read_bytes()
    assert not out.with_name(out.name + ".unfinished").exists()


@pytest.mark.parametrize("kind", ["flatquant", "omniquant"])
def test_learned_weight_ranges_are_minmax_at_infinity_and_0_982_at_the_start(kind, place):
    here = place(kind)
    clips = (flatquant if kind == "flatquant" else omniquant).starting_clips(here)
    role, path = "down", here.layout.roles["down"]
    weight = here.plain[f"{path}.weight"]
    low, high = clips[f"{role}.clip_low"], clips[f"{role}.clip_high"]
    start = fold.clip_learned(weight, (low, high))
    torch.testing.assert_close(start.amax(1), weight.amax(1) * 0.98201, rtol=1e-4, atol=0)
    torch.testing.assert_close(start.amin(1), weight.amin(1) * 0.98201, rtol=1e-4, atol=0)
    wide = fold.clip_learned(weight, (torch.full_like(low, torch.inf), torch.full_like(high, torch.inf)))
    recipe = here.task.recipe
    quantised = blockwise.quantised_weight(wide, recipe)
    torch.testing.assert_close(quantised, Grid.fit(weight, recipe.bits, "minmax").round(weight))


def test_the_quantised_block_of_the_learner_is_that_of_the_evaluation(place, learned):
    here = place("flatquant")
    rotation = registry.load(learned("flatquant")[0], here.task.dimensions)
    states = here.inputs[0]
    with torch.no_grad():
        seen = here(rotation, states)
        block = StreamedBlocks(here.task.model, None, torch.float32, "cpu").load(0)
        rotation.clip = True
        rotation.fold_block(block, 0, here.layout)
        set_quantizers(block, here.layout, here.task.recipe)
        for path in here.layout.linears:
            linear = block.get_submodule(path)
            linear.weight.data = Grid.fit(linear.weight, 4, "minmax").round(linear.weight)
        evaluated = run_block(block, states, here.arguments)
    # A value at the border of two codes may fall on either side.
    assert float((seen - evaluated).abs().mean() / (evaluated - states).abs().mean()) < 0.02


def test_learned_tensors_have_gradients_and_transforms_stay_invertible(place):
    here = place("flatquant")
    task = here.task
    factor = flatquant.Svd(flatquant.starting(12, "hadamard", torch.Generator().manual_seed(0)))
    matrix = factor()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(12), atol=1e-5, rtol=0)
    with torch.no_grad():
        for parameter in factor.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    found = torch.linalg.svdvals(factor().detach())
    torch.testing.assert_close(found, factor.logarithms.exp().detach().sort(descending=True)[0], rtol=1e-4, atol=0)

    expected = {n.removeprefix("blocks.0.") for n in registry.draw("flatquant", task.dimensions).parameters}
    expected = {n for n in expected if not n.startswith("blocks.")}
    generator = torch.Generator().manual_seed(0)
    leaves = {n: flatquant.starting(s, "orthogonal", generator) for n, s in flatquant.sizes(here).items()}
    leaves |= flatquant.starting_scales(here, 0.3) | flatquant.starting_clips(here)
    assert set(leaves) == expected
    for leaf in leaves.values():
        leaf.requires_grad_()
    parameters = {n: p.exp() if n.endswith("scale") else p for n, p in leaves.items()}
    here.loss(registry.KINDS["flatquant"](task.dimensions, here.parameters(parameters)), [0, 1]).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.abs().max() > 0, name


def test_flatquant_learns_only_what_the_quantisation_asks_for(place):
    here = place("flatquant", quantise={"bits": 16, "activations": {"bits": 4}})
    assert flatquant.starting_clips(here) == {} and "keys" not in flatquant.sizes(here)
    here = place("flatquant", quantise={"values": {"bits": 4, "clip_ratio": "learned"}, "o_inputs": {"bits": 4}})
    assert set(flatquant.starting_clips(here)) == {"values.range_low", "values.range_high"}


def test_awq_takes_the_best_ratio_of_the_grid(place, learned):
    here = place("awq")
    means, _ = awq.statistics(here, 512)
    parameters = registry.load(learned("awq")[0], here.task.dimensions).parameters
    windows = [here.inputs[i] for i in here.learned_from]
    for group, module in (("qkv", "self_attn"), ("up_gate", "mlp"), ("down", "mlp.down_proj")):
        chosen = awq.ratio_errors(here, group, means[group], *awq.calls(here, [group], 16)[group])
        errors = {}
        for ratio in (0.0, 0.35, 0.5, 0.95, min(chosen, key=chosen.get)):
            errors[ratio] = by_hand(here, group, module, windows, means[group].pow(ratio))
            assert chosen[ratio] == pytest.approx(errors[ratio], rel=1e-3)
        best = min(errors, key=errors.get)
        assert best == min(chosen, key=chosen.get) and len(chosen) == 20
        scale = means[group].pow(best)
        torch.testing.assert_close(parameters[f"blocks.0.{group}.scale"], scale / (scale.max() * scale.min()).sqrt())


def by_hand(here, group, module, windows, scale):
    """Mean squared error of a module's output when a group's weights are rounded after they were scaled."""
    outputs = []
    block = StreamedBlocks(here.task.model, None, torch.float32, "cpu").load(0)
    block.get_submodule(module).register_forward_hook(
        lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    scale = scale / (scale.max() * scale.min()).sqrt()
    with torch.no_grad():
        for states in windows:
            run_block(block, states, here.arguments)
        for path in here.layout.groups[group]:
            weight = block.get_submodule(path).weight
            weight.data = Grid.fit(weight * scale, 3, "minmax").round(weight * scale) / scale
        for states in windows:
            run_block(block, states, here.arguments)
    half = len(outputs) // 2
    return float((torch.cat(outputs[half:]) - torch.cat(outputs[:half])).square().mean())


def test_awq_limits_are_the_best_of_ten(place):
    here = place("awq")
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(6, 40, generator=generator), torch.randn(30, 40, generator=generator)
    weight[0, 3] = 9.0  # worth clipping: nothing reads it
    inputs[:, 3] = 0
    recipe = Recipe.parse({"method": "rtn", "bits": 3, "clip": "learned"})
    best = awq.best_limit(weight, inputs, recipe)
    for row in range(6):
        errors = {}
        for step in range(10):
            limit = float(weight[row].abs().max()) * (1 - step / 20)
            clipped = weight[row : row + 1].clamp(-limit, limit)
            quantised = Grid.fit(clipped, 3, "minmax").round(clipped)
            errors[limit] = float(((quantised - weight[row]) @ inputs.T).square().sum())
        assert float(best[row]) == pytest.approx(min(errors, key=errors.get), rel=1e-6)
    assert best[0] < 9.0
    limits = awq.limits(here, {}, {g: torch.randn(8, n) for g, n in here.task.dimensions.columns().items()})
    assert set(limits) == {f"{role}.limit" for role in ("v", "o", "up", "gate", "down")}


def test_key_scales_are_tied_within_rope_pairs(learned, place):
    rotation = registry.load(learned("omniquant")[0], place("omniquant").task.dimensions)
    scale = rotation.parameters["blocks.0.key.scale"]
    first, second = scale.chunk(2, dim=1)
    assert torch.equal(first, second) and not torch.equal(scale, torch.ones_like(scale))
    assert "key_scale_untied" not in rotation.about()


def test_quantised_blocks_read_what_those_before_them_put_out(place):
    task = place("omniquant").task
    source, parameters = StreamedBlocks(task.model, None, torch.float32, "cpu"), {}
    places = blockwise._places(task, source, True, registry.KINDS["scaling"], parameters)
    first = next(places)
    assert torch.equal(first.own[3], first.inputs[3])
    found = {**omniquant.starting_clips(first), "qkv.scale": torch.full((96,), 2.0)}
    parameters |= first.parameters(found)
    rotation = registry.KINDS["scaling"](task.dimensions, dict(parameters))
    with torch.no_grad():
        quantised, target = first(rotation, first.inputs[3]), first.targets[3].clone()
    second = next(places)
    assert torch.equal(second.own[3], quantised) and torch.equal(second.inputs[3], target)
    assert not torch.equal(quantised, target)


def test_scales_that_one_norm_gives_all_heads_are_one(place):
    here = place("omniquant")
    here.task.dimensions = dataclasses.replace(here.task.dimensions, kv_heads=2, normed_heads=True)
    scales = omniquant._scales({"key.scale": torch.zeros(1, 16)}, here.task)
    assert scales["key.scale"].shape == (2, 32)


def test_unsupported_blockwise_learning_is_refused(spiky, tokens, tmp_path):
    def learn(kind, **changed):
        learn_rotation(entry_of(kind, **changed), spiky, tokens, tmp_path / f"{kind}{changed}", "cpu")

    with pytest.raises(ObrError, match="leaves everything at 16 bits"):
        learn("flatquant", quantise={})
    with pytest.raises(ObrError, match="set bits"):
        learn("awq", quantise={"bits": 16})
    with pytest.raises(ObrError, match="choose one of orthogonal, hadamard"):
        learn("flatquant", start="nowhere")
    with pytest.raises(ObrError, match="does not know"):
        learn("smoothquant", epochs=3)
    with pytest.raises(ObrError, match="use a smaller lr"):
        learn("flatquant", lr=1e4, lr_clips=1e4, epochs=2)
