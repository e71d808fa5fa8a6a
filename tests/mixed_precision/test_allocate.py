"""Allocation: the least predicted loss under a budget, from predictions that are what they say, to checkpoints."""

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import obr
from obr.calibration import collect_hessians, output_gradients
from obr.config.recipe import QUANTIZERS, Allocation, Option, Recipe
from obr.data.token_windows import calibrate, load_tokens
from obr.errors import ObrError
from obr.methods.restore import restore
from obr.mixed_precision import allocate as allocation
from obr.mixed_precision import divergence, sensitivity
from obr.mixed_precision.allocate import allocate, choose
from obr.models.blocks import StreamedBlocks
from obr.runtime.files import read_json

pytestmark = pytest.mark.slow

OPTIONS = [
    {"method": "gptq", "bits": 2},
    {"method": "gptq", "bits": 3},
    {"method": "joint", "bits": 4, "sparsity": 0.5},
    {"method": "obr_gptq", "bits": 4, "pattern": "2:4"},
    {"method": "gptq", "bits": 4},
]
RECIPE = {"method": "joint", "scope": "layer", "row_weights": "gradient", "sweeps": 8, "calibration": "c"}


def recipe(bits: float = 3.0, **changes) -> Recipe:
    return Recipe.parse({**RECIPE, "allocation": {"bits": bits, "options": OPTIONS}, **changes})


# --- The choice ---------------------------------------------------------------------------------------


@st.composite
def knapsacks(draw):
    """(costs (l, o), losses (l, o), budget), small enough for brute force."""
    layers, options = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    unit = draw(st.sampled_from([1, 7, 1024]))
    numbers = st.lists(st.integers(1, 40), min_size=options, max_size=options)
    costs = unit * np.array(draw(st.lists(numbers, min_size=layers, max_size=layers)))
    losses = np.array(draw(st.lists(numbers, min_size=layers, max_size=layers)), dtype=float)
    least, most = int(costs.min(1).sum()), int(costs.max(1).sum())
    return costs, losses, draw(st.integers(least, most + unit))


def cheapest(costs, losses, budget) -> float:
    """Over every combination."""
    layers, every = range(len(costs)), itertools.product(range(costs.shape[1]), repeat=len(costs))
    return min(losses[layers, c].sum() for c in map(list, every) if costs[layers, c].sum() <= budget)


@settings(deadline=None, max_examples=150)
@given(knapsacks())
def test_allocation_equals_brute_force_optimum(knapsack):
    costs, losses, budget = knapsack
    chosen, layers = choose(costs, losses, budget), range(len(costs))
    assert costs[layers, chosen].sum() <= budget
    assert losses[layers, chosen].sum() == pytest.approx(cheapest(costs, losses, budget))


@settings(deadline=None, max_examples=60)
@given(knapsacks())
def test_in_coarse_steps_the_budget_holds_and_one_kind_for_all_is_never_better(knapsack):
    costs, losses, budget = knapsack
    fine, allocation.STEPS = allocation.STEPS, 13
    try:
        chosen, layers = choose(costs, losses, budget), range(len(costs))
    finally:
        allocation.STEPS = fine
    assert costs[layers, chosen].sum() <= budget
    for option in range(costs.shape[1]):
        if costs[:, option].sum() <= budget:
            assert losses[layers, chosen].sum() <= losses[:, option].sum()


def test_slopes_are_equalised():
    """Of losses convex in the bits, no two layers could exchange some and gain."""
    kept = np.array([4, 5, 6, 7, 8])
    costs = np.tile(100 * kept, (20, 1))
    felt = np.geomspace(1, 300, 20)[:, None]
    losses = felt * np.exp(-0.9 * kept)
    chosen = choose(costs, losses, 100 * 6 * 20)
    assert costs[range(20), chosen].sum() == 100 * 6 * 20 and (np.diff(chosen) >= 0).all() and len(set(chosen)) > 2
    down = [losses[i, c - 1] - losses[i, c] for i, c in enumerate(chosen) if c > 0]
    up = [losses[i, c] - losses[i, c + 1] for i, c in enumerate(chosen) if c < 4]
    assert max(up) <= min(down) + 1e-12


def layers(losses: list[list[float]]) -> list[dict]:
    return [{"block": i, "layer": "up", "rows": 8, "columns": 16, "losses": each} for i, each in enumerate(losses)]


def test_allocation_reports_bits_and_loss():
    chosen = allocate(recipe().allocation, layers([[9, 4, 5, 6, 1], [1.0, 0.9, 0.8, 0.9, 0.7]]))
    assert [o.label for o in chosen.layers.values()] == ["gptq, 4 bits", "gptq, 2 bits"]
    told = chosen.to_dict()
    assert told["bits_per_weight"] == 3.0 and told["loss"] == 2.0 and told["weights"] == 256
    assert told["uniform"]["gptq, 3 bits"] == {"bits_per_weight": 3.0, "loss": 4.9}
    assert allocation.chosen_options(told, "it") == chosen.layers == allocation.chosen_options(json_of(told), "it")
    assert (
        "3.0000 bits a weight, predicted loss 2.0000, the best of one kind (gptq, 3 bits) 4.9000" in chosen.summary()
    )
    with pytest.raises(ObrError, match="it holds no allocation"):
        allocation.chosen_options({**told, "layers": [{"block": 0}]}, "it")
    with pytest.raises(ObrError, match="The smallest options take 512 bits, the budget is 448; raise"):
        allocate(Allocation(1.75, recipe().options), layers([[1.0] * 5] * 2))


def test_a_budget_of_each_block_is_spent_in_it():
    """Alone, a block may not spend what another leaves; the losses ask for all of it in the first."""
    options = recipe().options
    told = [
        {"block": block, "layer": name, "rows": 8, "columns": 16, "losses": losses}
        for block, losses in ((0, [90.0, 40.0, 50.0, 60.0, 1.0]), (1, [1.0, 0.9, 0.8, 0.9, 0.7]))
        for name in ("up", "down")
    ]
    shared, apart = (allocate(Allocation(3.0, options, scope), told) for scope in ("model", "block"))
    assert [o.bits for o in shared.layers.values()] == [4, 4, 2, 2]
    for block in (0, 1):
        bits = [apart.stored[key] / apart.sizes[key] for key in apart.layers if key[0] == block]
        assert np.mean(bits) == 3.0
    assert sum(shared.losses.values()) < sum(apart.losses.values()) < apart.uniform["gptq, 3 bits"]["loss"]
    assert apart.to_dict()["scope"] == "block"


def json_of(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(
    "option, bits",
    [
        ({"method": "gptq", "bits": 3}, 3.0),
        ({"method": "joint", "bits": 4, "sparsity": 0.5}, 3.0),
        ({"method": "joint", "bits": 4, "sparsity": 0.3}, 1 + 4 * (1 - 19 / 64)),  # int(0.3 · 64) = 19 are pruned
        ({"method": "obr_gptq", "bits": 4, "pattern": "2:4"}, 2.75),
        ({"method": "joint", "bits": 3, "pattern": "paired 4:8"}, 1.875),
        ({"method": "joint", "bits": 3, "sparsity": 0.0}, 3.0),
        ({"method": "obr_rtn", "bits": 16, "sparsity": 0.5}, 9.0),
    ],
)
def test_sizes_are_those_of_packed_layers(option, bits):
    from obr.checkpoints.packing import pack

    parsed = Option.parse(option, "option")
    assert parsed.stored_bits(8, 64) == 8 * 64 * bits
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    weight = torch.randn(8, 64, generator=generator)
    fields = {"bits": parsed.bits, "sparsity": parsed.sparsity, "pattern": parsed.pattern, "sweeps": 0}
    packed = pack(restore(weight, x.T @ x, parsed.method, **fields), torch.float16)
    scale = packed.tensors["scale"].nbytes if "scale" in packed.tensors else 0
    assert 8 * (packed.bytes - scale) == parsed.stored_bits(8, 64)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"bits": 1.5}, r"recipe.allocation.bits is 1.5; it must lie between its smallest option's 2 and 16"),
        ({"allocation": {"bits": 3, "options": "mixed"}}, r"options is 'mixed'; list options"),
        ({"allocation": {"bits": 3, "options": []}}, r"options is \[\]; list options"),
        ({"allocation": {"bits": 3, "options": OPTIONS, "scope": "row"}}, "choose one of model, block"),
        ({"allocation": {"bits": 3, "options": [{"bits": 3}]}}, r"options\[0\].method is None; choose one of"),
        ({"allocation": {"bits": 3, "options": [{"method": "gptq", "scope": "row"}]}}, "has the unknown key 'scope'"),
        ({"allocation": {"bits": 3, "options": [{"method": "sparsegpt_gptq"}]}}, "sparsity is not the same"),
        ({"method": "dense", "scope": "row", "row_weights": "none"}, "which method dense contradicts"),
        ({"int8_down_proj": True}, "which int8_down_proj contradicts"),
        ({"row_weights": "loss"}, "recipe.row_weights is 'loss'; choose one of none, gradient"),
        ({"scope": "row"}, "with scope row every row has its own budget"),
    ],
)
def test_impossible_recipes_are_refused(changes, sentence):
    with pytest.raises(ObrError, match=sentence):
        recipe(**changes)


def test_a_recipe_survives_its_manifest():
    made = recipe()
    assert Recipe.parse(json_of(made.to_dict())) == made and json_of(made.decisive()) == made.decisive()
    assert made.setting == "W3.0A16KV16" and made.bits_per_weight == 3.0 and made.bits == 4 and made.needs_hessian
    dense = made.of_layer(Option("gptq", 3))
    assert (dense.method, dense.scope, dense.row_weights, dense.allocation) == ("gptq", "row", "none", None)
    shared = made.of_layer(Option("joint", 4, 0.5))
    assert (shared.scope, shared.row_weights, shared.sparsity) == ("layer", "gradient", 0.5)
    assert made.left_out.method == "dense" and made.left_out.bits_per_weight == 16


# --- From a model to a checkpoint ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """A results folder with windows, Hessians, gradients, sensitivity and allocation of the tiny model."""
    results = tmp_path_factory.mktemp("results")
    model = results / "models/tiny"
    model.parent.mkdir()
    model.symlink_to(tiny_folder / "model")
    windows = results / "calibration/c/tiny.safetensors"
    calibrate(model, tiny_folder / "train.txt", {"nsamples": 6, "seqlen": 64}, windows)
    folder, slopes = results / "hessians/tiny/none/c", results / "gradients/tiny/none/c.safetensors"
    collect_hessians.hessian_stage(model, None, windows, folder, torch.float32, "cpu")
    output_gradients.gradients(model, None, windows, slopes)
    losses = results / "sensitivity/tiny/none/c/mixed"
    sensitivity.measure_sensitivity(model, None, windows, folder, slopes, recipe().options, losses)
    return results


@pytest.mark.slow
def test_predicted_losses_are_the_quadratic_form_of_means(made):
    """½ Σ_r G_r d_r A d_rᵀ with A and G as means over tokens, from the inputs themselves."""
    told = read_json(made / "sensitivity/tiny/none/c/mixed/losses.json")
    assert len(told["layers"]) == 14 and not list(made.rglob("*.unfinished"))
    blocks = StreamedBlocks(made / "models/tiny")
    tokens, slopes = (
        load_tokens(made / "calibration/c/tiny.safetensors")[0],
        output_gradients.load(made / "gradients/tiny/none/c.safetensors")[0],
    )
    block, name = blocks.load(0), "self_attn.k_proj"
    with torch.no_grad():
        hidden, _ = blocks.embed(tokens)
        x = torch.cat([block.input_layernorm(states)[0] for states in hidden])
    weight, row = block.get_submodule(name).weight, next(r for r in told["layers"] if r["layer"] == name)
    restored = restore(weight, x.T @ x, "gptq", bits=3)
    change = weight - restored.weight
    mean = x.T @ x / len(x)
    expected = 0.5 * (slopes[f"0.{name}"] * ((change @ mean) * change).sum(1)).sum()
    dense, _ = told["references"]
    found = row["losses"][1] * row["by_gradients"][0] / row["losses"][dense]
    assert found == pytest.approx(float(expected), rel=0.05)  # codes may differ in a tie or two
    assert row["relative_errors"][1] == pytest.approx(restored.relative_error, rel=0.05)


def test_losses_at_the_references_are_divergences_of_models_with_that_layer_changed(made):
    told = read_json(made / "sensitivity/tiny/none/c/mixed/losses.json")
    tokens = load_tokens(made / "calibration/c/tiny.safetensors")[0]
    tokens = divergence.measurement_windows(tokens)
    options = [told["options"][number] for number in told["references"]]
    assert told["tokens"] == tokens.numel()
    assert options == [asdict(Option("gptq", 3)), asdict(Option("joint", 4, 0.5))]
    model = obr.load_model(made / "models/tiny", device="cpu")
    layer, name = model.model.layers[0].mlp.up_proj, "mlp.up_proj"
    x = collect_hessians.load(made / "hessians/tiny/none/c/block_000.safetensors")["up_gate"].hessian
    weight, row = layer.weight.data, next(r for r in told["layers"] if (r["block"], r["layer"]) == (0, name))
    with torch.no_grad():
        dense = model(tokens).logits.double().log_softmax(-1)
        for number, more in zip(told["references"], ({}, {"sparsity": 0.5, "sweeps": 0}), strict=True):
            method, bits = told["options"][number]["method"], told["options"][number]["bits"]
            layer.weight.data = restore(weight, x, method, bits=bits, **more).weight
            other = model(tokens).logits.double().log_softmax(-1)
            expected = (dense.exp() * (dense - other)).sum(-1).mean()
            assert row["losses"][number] == pytest.approx(float(expected), rel=0.05)


def test_a_broken_model_is_far_away():
    logits, broken = torch.tensor([[0.0, -150.0, -90.0]]), torch.tensor([[0.0, 400.0, 300.0]])
    assert float(divergence._divergence(logits.log_softmax(-1), broken - logits)) == pytest.approx(400)


def test_a_loss_that_is_not_finite_is_told():
    option, layer = (Option("gptq", 3),), {"block": 0, "layer": "mlp.up_proj", "losses": [1.0]}
    with pytest.raises(ObrError, match="cost no finite loss"):
        sensitivity.scaled([layer], {0: {"0.mlp.up_proj": float("nan")}}, option)


def test_a_divergence_next_to_nothing_is_told_to_a_few_digits():
    """Where p log p - p log q in float32 is noise, of either sign."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(16, 5000, generator=generator)
    change = 1e-3 * torch.randn(16, 5000, generator=generator) + 0.1
    p, q = logits.double().log_softmax(-1), (logits.double() + change).log_softmax(-1)
    found = divergence._divergence(logits.log_softmax(-1), change.clone())
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1).float(), rtol=1e-2, atol=0)


def test_an_interrupted_measurement_goes_on(made, tmp_path, monkeypatch):
    whole = read_json(made / "sensitivity/tiny/none/c/mixed/losses.json")
    inputs = (made / "models/tiny", None, made / "calibration/c/tiny.safetensors")
    inputs += (made / "hessians/tiny/none/c", made / "gradients/tiny/none/c.safetensors")
    measured, calls = sensitivity._restored, []

    def pulled(weights, *arguments):
        calls.append(next(iter(weights)))
        if calls[-1].startswith("1.mlp"):
            raise KeyboardInterrupt
        return measured(weights, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sensitivity, "_restored", pulled)
        sensitivity.measure_sensitivity(*inputs, recipe().options, tmp_path / "again")
    calls.clear()
    monkeypatch.setattr(sensitivity, "_restored", lambda w, *a: calls.append(next(iter(w))) or measured(w, *a))
    again = sensitivity.measure_sensitivity(*inputs, recipe().options, tmp_path / "again")
    assert all(name.startswith("1.") for name in calls) and again["layers"] == whole["layers"]


def compressed(made, key: str, **changes):
    """(manifest, folder) of a recipe with an allocation, compressed from what the stages have left."""
    from obr.compression.stage import compress_stage

    asked, path = recipe(**changes), made / f"allocations/tiny/{key}.json"
    allocation.allocate_stage(asked, made / "sensitivity/tiny/none/c/mixed/losses.json", path)
    folder = made / "compressed/tiny" / key
    files = {"hessians": made / "hessians/tiny/none/c"}
    if asked.hessian == "sequential":
        files = {"tokens": made / "calibration/c/tiny.safetensors"}
    slopes = made / "gradients/tiny/none/c.safetensors" if asked.needs_gradients else None
    return compress_stage(
        made / "models/tiny", asked, folder, **files, gradient_file=slopes, allocation_file=path, device="cpu"
    ), folder


@pytest.mark.parametrize("kind", ["cached", "sequential"])
def test_layers_get_allocated_bits_and_sparsity(made, kind):
    import pandas as pd

    from obr.checkpoints.format import load
    from obr.checkpoints.verify import verify_checkpoint
    from obr.compression.recompute import repeat

    manifest, folder = compressed(made, kind, bits=2.9, hessian=kind)
    chosen = allocation.chosen_options(manifest["allocation"], "it")
    rows = pd.read_csv(folder / "layers.csv").fillna({"pattern": ""})
    assert len(set(chosen.values())) > 1
    for row in rows.itertuples():
        option = chosen[row.block, row.layer]
        assert (row.bits, row.pattern) == (option.bits, option.pattern or "")
        assert row.sparsity == pytest.approx(int(row.columns * option.sparsity) / row.columns, abs=1e-6)
    assert manifest["bits_per_weight"]["theoretical"] == pytest.approx(manifest["allocation"]["bits_per_weight"])
    assert 2.8 < manifest["bits_per_weight"]["theoretical"] <= 2.9
    assert verify_checkpoint(folder) == []
    assert all(layer.identical for layer in repeat(folder, 3, device="cpu"))
    assert load(folder, dtype=torch.float32).obr_recipe.allocation.bits == 2.9
    altered = json_of(manifest)
    for row in altered["allocation"]["layers"]:
        row["option"] = 0
    (folder / "manifest.json").write_text(json.dumps(altered))
    assert any("the recipe says 2" in problem for problem in verify_checkpoint(folder))


def test_blocks_that_are_left_out_have_no_part_in_the_budget(made):
    from obr.checkpoints.verify import verify_checkpoint

    manifest, folder = compressed(made, "part", blocks=":1", scope="row", row_weights="none")
    assert {row["block"] for row in manifest["allocation"]["layers"]} == {0}
    assert manifest["allocation"]["bits_per_weight"] <= 3.0 < 9 < manifest["bits_per_weight"]["theoretical"]
    assert verify_checkpoint(folder) == []


def test_missing_or_mismatched_measurements_are_refused(made, tmp_path):
    from obr.compression.stage import compress_stage

    model, files = made / "models/tiny", {"hessians": made / "hessians/tiny/none/c"}
    cached, slopes = recipe(hessian="cached"), made / "gradients/tiny/none/c.safetensors"
    with pytest.raises(ObrError, match="row_weights are gradient, which reads --gradients"):
        compress_stage(model, cached, tmp_path / "a", **files)
    with pytest.raises(ObrError, match="the recipe reads --allocation, which is not given"):
        compress_stage(model, cached, tmp_path / "a", **files, gradient_file=slopes)
    losses = made / "sensitivity/tiny/none/c/mixed/losses.json"
    other = recipe(allocation={"bits": 3, "options": OPTIONS[1:]})
    with pytest.raises(ObrError, match="was measured at other options"):
        allocation.allocate_stage(other, losses, tmp_path / "b.json")
    told = read_json(losses)
    part = {**told, "layers": [layer for layer in told["layers"] if layer["block"] == 0]}
    (tmp_path / "part.json").write_text(json.dumps(part))
    with pytest.raises(ObrError, match="has no losses of block 1, on which the recipe acts"):
        allocation.allocate_stage(recipe(), tmp_path / "part.json", tmp_path / "b.json")
    allocation.allocate_stage(recipe(2.5), losses, tmp_path / "b.json")
    with pytest.raises(ObrError, match=r"is for another budget than the recipe's 3.0 bits"):
        compress_stage(
            model, cached, tmp_path / "b", **files, gradient_file=slopes, allocation_file=tmp_path / "b.json"
        )
    apart = recipe(hessian="cached", allocation={"bits": 2.5, "options": OPTIONS, "scope": "block"})
    with pytest.raises(ObrError, match=r"is for another budget than the recipe's 2.5 bits a block"):
        compress_stage(
            model, apart, tmp_path / "b", **files, gradient_file=slopes, allocation_file=tmp_path / "b.json"
        )
    allocation.allocate_stage(recipe(blocks=":1"), losses, tmp_path / "c.json")
    with pytest.raises(ObrError, match=r"no choice of the recipe's for block 1 self_attn.q_proj; allocate again"):
        compress_stage(
            model, cached, tmp_path / "d", **files, gradient_file=slopes, allocation_file=tmp_path / "c.json"
        )


@pytest.mark.slow
def test_the_figure_shows_every_layer(made, tmp_path, monkeypatch):
    from obr.report.figures import draw as figure

    asked, drawn = recipe(2.9, hessian="cached"), []
    path = made / "allocations/tiny/drawn.json"
    choice = allocation.allocate_stage(asked, made / "sensitivity/tiny/none/c/mixed/losses.json", path)
    kind = figure.KINDS["allocation"]
    monkeypatch.setitem(figure.KINDS, "allocation", lambda source: drawn.append(kind(source)) or drawn[0])
    entry = {"kind": "allocation", "models": ["tiny"], "rows": ["drawn"]}
    options = asked.to_dict()["allocation"].pop("options")
    kept = {key: value for key, value in asked.to_dict().items() if key not in QUANTIZERS}
    drawn_recipe = {**kept, "allocation": {**kept["allocation"], "options": "few"}}
    config = {
        "figures": {"f": entry},
        "recipes": {"drawn": drawn_recipe},
        "layer_options": {"few": options},
        "activations": {},
        "models": {"tiny": {}},
    }
    figure.draw(config, "f", made, made / "none.csv", tmp_path / "drawn")
    assert (tmp_path / "drawn.pdf").stat().st_size > 1000
    (panel,) = drawn[0].panels
    bits = [choice.stored[key] / choice.sizes[key] for key in choice.layers]
    assert [text.get_text() for text in panel.texts] == [f"{each:.1f}" for each in bits]
    assert len({patch.get_facecolor() for patch in panel.patches}) == len(set(choice.layers.values()))
    assert f"predicted loss {sum(choice.losses.values()):.4f} nats, " in drawn[0].remarks[0]


def test_allocation_in_memory_measures_sensitivities_first(made):
    model = obr.load_model(made / "models/tiny")
    tokens = load_tokens(made / "calibration/c/tiny.safetensors")[0]
    obr.compress(model, tokens, recipe(2.5), progress=False)
    report = model.obr_report
    assert report.allocation["bits_per_weight"] <= 2.5 and len({row.bits for row in report.layers}) > 1
    with pytest.raises(ObrError, match="reads calibration windows; give tokens"):
        obr.compress(obr.load_model(made / "models/tiny"), None, recipe(2.5), progress=False)
