"""Targets that make up for what compressed blocks put out: their formula, where they come from, what they win."""

import itertools

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import obr
from helpers.random_llama import random_llama
from obr.calibration import asymmetric
from obr.calibration.collect_hessians import Moments
from obr.compression.recompute import Places, repeat
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.methods.layer_hessian import Hessian
from obr.models.blocks import Blocks, run_block, run_in_place
from obr.rotations.obtain import make

RECIPE = {"method": "gptq", "bits": 3, "calibration": "c"}


def model_of(blocks: int = 3):
    return random_llama(blocks, initializer_range=0.1)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 128, (48, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def files(tokens, tmp_path_factory):
    """Folder with a random model, its rotation and tokens."""
    folder = tmp_path_factory.mktemp("files")
    model_of().save_pretrained(folder / "model")
    make({"kind": "quarot", "seed": 0}, folder / "model", folder / "rotation.safetensors")
    save_file({"tokens": tokens[:16]}, folder / "tokens.safetensors", metadata={"calibration": "{}"})
    return folder


def stage(files, out, **options):
    recipe = Recipe.parse({**RECIPE, "rotation": "quarot", **options})
    inputs = {"rotation": files / "rotation.safetensors", "tokens": files / "tokens.safetensors"}
    return compress_stage(files / "model", recipe, out, **inputs, device="cpu")


def layers_of(model) -> dict[str, torch.Tensor]:
    layers = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    return {name: layer.weight.clone() for name, layer in layers.items()}


def inputs(generator, tokens=400, columns=24):
    """(X, X̂), correlated, (t, n) each, float64."""
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return x, x + torch.randn(tokens, columns, generator=generator, dtype=torch.float64)


def test_the_whole_step_is_the_least_squares_of_the_dense_outputs():
    generator = torch.Generator().manual_seed(0)
    x, seen = inputs(generator)
    weight = torch.randn(8, 24, generator=generator, dtype=torch.float64)
    best = torch.linalg.lstsq(seen, x @ weight.T).solution.T
    drift, matrix = ((x - seen).T @ seen).float(), (seen.T @ seen).float()
    found = asymmetric.shifted(weight, drift, Hessian(matrix, damp=0.0), 1.0)
    assert torch.allclose(found.double(), best, rtol=1e-3, atol=1e-3)
    assert (best - weight).norm() > 0.1 * weight.norm()

    half = asymmetric.shifted(weight, drift, Hessian(matrix, damp=0.0), 0.5)
    assert torch.allclose(half, (found + weight.float()) / 2, atol=1e-5)
    ridge = matrix.double() + 0.1 * matrix.double().diagonal().mean() * torch.eye(24, dtype=torch.float64)
    damped = weight + weight @ drift.double() @ torch.linalg.inv(ridge)
    assert torch.allclose(asymmetric.shifted(weight, drift, Hessian(matrix, 0.1), 1.0).double(), damped, atol=1e-4)


def test_a_layer_nearer_to_its_target_is_nearer_to_the_dense_outputs():
    """||W X - V X̂||² is `tr((W* - V) Ĥ (W* - V)ᵀ)` and what no V can change."""
    generator = torch.Generator().manual_seed(1)
    x, seen = inputs(generator)
    weight = torch.randn(8, 24, generator=generator, dtype=torch.float64)
    matrix = seen.T @ seen
    goal = asymmetric.shifted(weight, ((x - seen).T @ seen).float(), Hessian(matrix.float(), 0.0), 1.0)
    least = float((x @ weight.T - seen @ goal.double().T).square().sum())
    for method in ("gptq", "obr_gptq", "joint"):
        aimed = obr.restore(goal, matrix.float(), method, bits=4)
        outputs = float((x @ weight.T - seen @ aimed.weight.double().T).square().sum())
        loss = aimed.relative_error * float((seen @ goal.double().T).square().sum())
        assert outputs == pytest.approx(least + loss, rel=1e-3)
        blind = obr.restore(weight.float(), matrix.float(), method, bits=4)
        assert outputs < 0.9 * float((x @ weight.T - seen @ blind.weight.double().T).square().sum())


def test_drifts_are_sums_over_both_models_inputs(tokens):
    dense, other = (Blocks(model_of(1)) for _ in range(2))
    block, compressed = dense.load(0), other.load(0)
    for name in dense.layout.linears:  # as if compressed
        compressed.get_submodule(name).weight.data *= 0.9
    hidden, arguments = dense.embed(tokens[:4])
    seen = {}
    for which, module in (("dense", block), ("compressed", compressed)):
        rows = []
        module.mlp.down_proj.observer = rows.append
        for states in hidden:
            run_block(module, states, arguments[0])
        module.mlp.down_proj.observer = None
        seen[which] = torch.cat([row[0] for row in rows]).double()
    found = asymmetric.collect(compressed, block, dense.layout, hidden, hidden, arguments[0], ["down"])["down"]
    own = seen["compressed"]
    assert torch.allclose(found.moments.hessian.double(), own.T @ own / 2, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.drift.double(), (seen["dense"] - own).T @ own / 2, rtol=1e-4, atol=1e-4)
    assert all(block.get_submodule(name).observer is None for name in dense.layout.linears)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "obr_gptq", "joint"])
def test_compressed_blocks_come_nearer_to_the_dense_models(tokens, method):
    """Layer by layer, on tokens that nothing was calibrated on."""
    calibrated, held_out = tokens[:32], tokens[32:]
    dense = Blocks(model_of())
    bits = 3 if method == "gptq" else 4
    errors, layers = {}, {}
    for asymmetry in (0.0, 1e-30, 1.0):
        entry = {**RECIPE, "method": method, "bits": bits, "sweeps": 20, "asymmetry": asymmetry}
        model = obr.compress(model_of(), calibrated, entry, progress=False)
        layers[asymmetry], blocks = layers_of(model), Blocks(model)
        (wanted, arguments), (states, _) = (b.embed(held_out) for b in (dense, blocks))
        errors[asymmetry] = []
        for index in range(len(blocks)):
            run_in_place(dense.load(index), wanted, arguments[index])
            run_in_place(blocks.load(index), states, arguments[index])
            errors[asymmetry].append(sum(float((a - b).square().sum()) for a, b in zip(wanted, states, strict=True)))
    assert all(torch.equal(layers[0.0][name], layers[1e-30][name]) for name in layers[0.0])  # no step, no change
    # The first layers read the same in both models; those behind them do not.
    same = [name for name in layers[0.0] if torch.equal(layers[0.0][name], layers[1.0][name])]
    assert same == [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"]
    assert all(aimed < 0.97 * blind for aimed, blind in zip(errors[1.0], errors[0.0], strict=True)), errors


@pytest.mark.slow
def test_the_dense_model_is_not_quantised(files, tmp_path):
    """With Hessians of quantised inputs the drift holds what quantisation has taken, from the first layer on."""
    options = {"hessian_inputs": "quantised", "activations": {"bits": 3}}
    stage(files, tmp_path / "blind", **options)
    stage(files, tmp_path / "aimed", **options, asymmetry=1.0)
    blind, aimed = (obr.load(tmp_path / name, device="cpu").model.layers[0] for name in ("blind", "aimed"))
    assert not torch.equal(blind.self_attn.q_proj.weight, aimed.self_attn.q_proj.weight)


@pytest.mark.slow
def test_recompute_reproduces_asymmetric_layers(files, tmp_path):
    manifest = stage(files, tmp_path / "m" / "out", method="obr_gptq", asymmetry=0.5)
    assert manifest["recipe"]["asymmetry"] == 0.5
    places = Places(files / "model", files / "rotation.safetensors", files / "tokens.safetensors")
    assert all(layer.identical for layer in repeat(tmp_path / "m" / "out", 6, places, device="cpu"))


def test_blocks_left_out_stay_as_they_are(tokens):
    model = obr.compress(model_of(), tokens[:8], {**RECIPE, "asymmetry": 1.0, "blocks": "1:2"}, progress=False)
    before, after = layers_of(model_of()), layers_of(model)
    changed = {name.split(".")[2] for name in before if (before[name] - after[name]).abs().max() > 0.01}
    assert changed == {"1"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"asymmetry": 1.5}, "r.asymmetry is 1.5; it must lie between 0 and 1"),
        ({"asymmetry": 0.5, "hessian": "cached"}, "r.asymmetry is 0.5, but cached Hessians know the dense model's"),
        ({"asymmetry": 0.5, "method": "rtn"}, "r.asymmetry is 0.5, but method rtn reads no activations"),
    ],
)
def test_invalid_asymmetry_is_refused(options, sentence):
    with pytest.raises(ObrError, match=sentence):
        Recipe.parse({**RECIPE, **options}, "r")


def streams(generator, x, seen, rows=8):
    """(W, R - R̂): a weight, and what the residual stream lacks, part of which the inputs tell; float64."""
    weight = torch.randn(rows, x.shape[1], generator=generator, dtype=torch.float64)
    lost = 0.3 * seen @ torch.randn(x.shape[1], rows, generator=generator, dtype=torch.float64)
    return weight, lost + 0.5 * torch.randn(len(x), rows, generator=generator, dtype=torch.float64)


def statistics(x, seen, lost, held_out=None):
    moments = Moments((seen.T @ seen).float())
    drift, lacking = ((x - seen).T @ seen).float(), (lost.T @ seen).float()
    return asymmetric.GroupStatistics(moments, drift, lacking, held_out)


def recipe_of(**options) -> Recipe:
    return Recipe.parse({**RECIPE, **options})


def test_whole_steps_are_the_least_squares_of_the_dense_stream():
    generator = torch.Generator().manual_seed(3)
    x, seen = inputs(generator)
    weight, lost = streams(generator, x, seen)
    best = torch.linalg.lstsq(seen, x @ weight.T + lost).solution.T
    found = statistics(x, seen, lost)
    hessian = Hessian(found.moments.hessian, damp=0.0)
    target, shares = asymmetric.target_weight(weight, found, hessian, recipe_of(asymmetry=1.0, residual=1.0))
    assert torch.allclose(target.double(), best, rtol=1e-3, atol=1e-3)
    assert shares == {"asymmetry": 1.0, "residual": 1.0}
    alone, _ = asymmetric.target_weight(weight, found, hessian, recipe_of(residual=1.0))
    expected = weight + torch.linalg.lstsq(seen, lost).solution.T
    assert torch.allclose(alone.double(), expected, rtol=1e-3, atol=1e-3)
    found.lacking = None  # of a layer that does not add to the stream
    assert torch.equal(asymmetric.target_weight(weight, found, hessian, recipe_of(residual=1.0))[0], weight.float())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("residual", [0.0, 1.0])
def test_shrunk_steps_leave_the_least_error_on_held_out_windows(residual, seed):
    """Against a grid of factors, in float64, on few and noisy tokens: some factors are at an end, some inside."""
    generator = torch.Generator().manual_seed(seed)
    x, seen = inputs(generator, tokens=60)
    weight, lost = streams(generator, x, seen)
    cut = 30 + 8 * seed
    unseen = statistics(x[cut:], seen[cut:], lost[cut:])
    found = statistics(x[:cut], seen[:cut], lost[:cut], unseen)
    hessian, options = Hessian(found.moments.hessian, 0.01), {"asymmetry": 1.0, "residual": residual}
    whole = [
        asymmetric.target_weight(weight, found, hessian, recipe_of(**{n: v}))[0] - weight
        for n, v in options.items()
        if v
    ]
    goal = x[cut:] @ weight.T + (lost[cut:] if residual else 0)

    def error(factors) -> float:
        moved = weight + sum(f * step.double() for f, step in zip(factors, whole, strict=True))
        return float((seen[cut:] @ moved.T - goal).square().sum())

    judged = recipe_of(**options, target_shrinkage="held_out", held_out=2)
    target, shares = asymmetric.target_weight(weight, found, hessian, judged)
    factors = list(shares.values())
    assert all(0 <= f <= 1 for f in factors) and len(factors) == len(whole)
    grid = itertools.product(*[[i / 20 for i in range(21)]] * len(whole))
    assert error(factors) <= min(map(error, grid)) * (1 + 1e-6)
    moved = weight + sum(f * step.double() for f, step in zip(factors, whole, strict=True))
    assert torch.allclose(target.double(), moved, atol=1e-4)


def test_factors_without_an_effect_are_zero_or_finite():
    weight, zero = torch.ones(2, 4), torch.zeros(4, 4)
    unseen = asymmetric.GroupStatistics(Moments(zero), zero, torch.zeros(2, 4))
    for count in (1, 2):
        factors = asymmetric.best_factors(weight, [weight] * count, unseen, True)
        assert len(factors) == count and all(0 <= f <= 1 for f in factors)


def test_the_lack_of_the_residual_stream_is_summed_where_layers_add_to_it(tokens):
    """Beside sums over the streams as the block itself computes them: its input, and its output less down_proj's."""
    dense, other = (Blocks(model_of(1)) for _ in range(2))
    block, compressed = dense.load(0), other.load(0)
    for name in dense.layout.linears:
        compressed.get_submodule(name).weight.data *= 0.9
    hidden, arguments = dense.embed(tokens[:4])
    moved, _ = dense.embed(tokens[4:8])
    found = asymmetric.collect(compressed, block, dense.layout, hidden, moved, arguments[0], ["o", "up_gate", "down"])
    assert found["up_gate"].lacking is None
    sums = {"o": torch.zeros(64, 64).double(), "down": torch.zeros(64, 128).double()}
    for states, dense_states in zip(hidden, moved, strict=True):
        stream = {}
        for key, module, entering in (("ours", compressed, states), ("dense", block, dense_states)):
            seen, written = {}, []
            module.self_attn.o_proj.observer = lambda x, seen=seen: seen.update(o=x[0].double())
            module.mlp.down_proj.observer = lambda x, seen=seen: seen.update(down=x[0].double())
            hook = module.mlp.register_forward_hook(
                lambda _m, _i, out, written=written: written.append(out[0].double())
            )
            out = run_block(module, entering, arguments[0])[0].double()
            hook.remove()
            module.self_attn.o_proj.observer = module.mlp.down_proj.observer = None
            stream[key] = ({"o": entering[0].double(), "down": out - written[0]}, seen)
        for group in sums:
            sums[group] += (stream["dense"][0][group] - stream["ours"][0][group]).T @ stream["ours"][1][group] / 2
    for group, total in sums.items():
        assert torch.allclose(found[group].lacking.double(), total, rtol=1e-4, atol=1e-4), group


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["group", "block"])
def test_recompute_reproduces_layers_with_all_targets(scope, files, tmp_path):
    options = {"asymmetry": 1.0, "residual": 1.0, "target_shrinkage": "held_out", "held_out": 4}
    manifest = stage(files, tmp_path / "m" / "out", **options, hessian_scope=scope)
    assert manifest["recipe"]["residual"] == 1.0
    places = Places(files / "model", files / "rotation.safetensors", files / "tokens.safetensors")
    assert all(layer.identical for layer in repeat(tmp_path / "m" / "out", 6, places, device="cpu"))
    flags = pd.read_csv(tmp_path / "m" / "out" / "layers.csv").set_index(["block", "layer"])["flags"]
    assert "residual" in flags[1, "self_attn.o_proj"] and "asymmetry" in flags[1, "mlp.up_proj"]
    assert "residual" not in flags[1, "mlp.up_proj"]


@pytest.mark.slow
def test_paying_back_the_stream_brings_block_outputs_nearer(tokens):
    """On the calibration tokens: this model's stream is noise, of which other tokens tell nothing."""
    dense, errors = Blocks(model_of()), {}
    for residual in (0.0, 1.0):
        entry = {**RECIPE, "asymmetry": 1.0, "residual": residual}
        blocks = Blocks(obr.compress(model_of(), tokens[:40], entry, progress=False))
        (wanted, arguments), (states, _) = (b.embed(tokens[:40]) for b in (dense, blocks))
        for index in range(len(blocks)):
            run_in_place(dense.load(index), wanted, arguments[index])
            run_in_place(blocks.load(index), states, arguments[index])
        errors[residual] = sum(float((a - b).square().sum()) for a, b in zip(wanted, states, strict=True))
    assert errors[1.0] < 0.95 * errors[0.0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"residual": 1.5}, "r.residual is 1.5; it must lie between 0 and 1"),
        ({"residual": 0.5, "hessian": "cached"}, "r.residual is 0.5, but cached Hessians know the dense model's"),
        ({"target_shrinkage": "all"}, "r.target_shrinkage is 'all'; choose one of none, held_out"),
        ({"target_shrinkage": "held_out", "asymmetry": 1.0}, "there are no held-out windows; give held_out"),
        ({"target_shrinkage": "held_out", "held_out": 2}, "no step is taken; give asymmetry or residual"),
    ],
)
def test_targets_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(ObrError, match=sentence):
        Recipe.parse({**RECIPE, **options}, "r")


def test_models_that_scale_what_layers_add_to_the_stream_are_refused(tokens):
    model = model_of(1)
    model.config.residual_multiplier = 0.2
    with pytest.raises(ObrError, match=r"residual is 0\.5, but this model's layers are multiplied by 0\.2"):
        obr.compress(model, tokens[:4], {**RECIPE, "residual": 0.5}, progress=False)
