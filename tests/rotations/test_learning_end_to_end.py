"""Learning over a whole model: optimisers against closed forms, losses by hand, and rotations that help."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from geoopt import CanonicalStiefel, ManifoldParameter
from geoopt.optim import RiemannianAdam
from torch.nn import functional as F

from obr.config.quantizer import QuantizerSettings
from obr.config.recipe import Recipe
from obr.data import token_windows
from obr.errors import ObrError
from obr.evaluation.perplexity import perplexity
from obr.methods.grid import Grid
from obr.models.architectures import Dimensions, layout_of
from obr.models.blocks import StreamedBlocks
from obr.models.fake_quant import fake_quantize
from obr.models.hadamard import random_orthogonal
from obr.models.layers import set_quantizers
from obr.models.loading import load_model
from obr.rotations import apply, registry
from obr.rotations.learning import end_to_end, klt, network, rotated_block, straight_through
from obr.rotations.learning.cayley_sgd import CayleySGD
from obr.rotations.learning.distillation import kl_top
from obr.rotations.learning.registry import learn_rotation
from obr.rotations.learning.run import LearningRun, Snapshots
from obr.rotations.ostquant import OSTQuant
from obr.runtime.locks import release

LOW = {"bits": 3}
QUANTISE = {"activations": LOW, "keys": LOW, "values": LOW}
SMALL = {"steps": 12, "batch": 2, "every": 6, "keep_every": 5, "held_out": 4, "quantise": QUANTISE}


@pytest.fixture(scope="module")
def folder(tiny_folder) -> Path:
    token_windows.calibrate(
        tiny_folder / "model", tiny_folder / "train.txt", {"nsamples": 24, "seqlen": 128}, tiny_folder / "learn"
    )
    return tiny_folder


def task_of(folder, tmp_path, kind, **learn) -> LearningRun:
    entry = {"kind": kind, "learn": {**SMALL, **learn}}
    return LearningRun.of(entry, folder / "model", folder / "learn", tmp_path / "out", "cpu", torch.float32)


def orthogonal(n, seed=0):
    return random_orthogonal(n, torch.Generator().manual_seed(seed))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error_of(matrix):
    return float((matrix.mT @ matrix - torch.eye(matrix.shape[-1], dtype=matrix.dtype)).abs().max().detach())


def test_products_may_have_a_dtype_of_their_own(folder, tmp_path):
    assert task_of(folder, tmp_path, "ostquant", dtype="bfloat16").dtype == torch.bfloat16
    assert task_of(folder, tmp_path / "2", "ostquant").dtype == torch.float32


# --- Optimisers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e-3, 1.5], ids=["by the rate", "by the norm"])
def test_a_cayley_step_is_the_closed_form(lr, monkeypatch):
    monkeypatch.setattr(CayleySGD, "_draw", lambda _: 1.0)  # no step begins with a decomposition
    start, gradient = orthogonal(12), normal(12, 12, seed=1)
    matrix = start.clone().requires_grad_()
    matrix.grad = gradient.clone()
    CayleySGD([matrix], lr, torch.Generator()).step()
    skew = 0.5 * (start.T @ gradient - gradient.T @ start)
    alpha = min(lr, 1 / (float(skew.abs().sum(0).max()) + 1e-8))
    eye = torch.eye(12, dtype=torch.float64)
    limit = start @ (eye - alpha / 2 * skew) @ torch.linalg.inv(eye + alpha / 2 * skew)
    assert (matrix.detach() - limit).norm() < 1e-3 * (limit - start).norm()
    assert ((limit - start).norm() > 0.1) == (lr > 1)


def test_riemannian_adam_is_the_closed_form_for_two_steps():
    start, gradients, lr = orthogonal(12), (normal(12, 12, seed=1), normal(12, 12, seed=2)), 1e-3
    matrix = ManifoldParameter(start.clone(), manifold=CanonicalStiefel())
    optimizer = RiemannianAdam([matrix], lr)
    own, mean, square, eye = start.clone(), 0.0, 0.0, torch.eye(12, dtype=torch.float64)
    for step, gradient in enumerate(gradients, start=1):
        matrix.grad = gradient.clone()
        optimizer.step()
        tangent = gradient - own @ gradient.T @ own
        mean = 0.9 * mean + 0.1 * tangent
        square = 0.999 * square + 0.001 * (tangent.square().sum() - 0.5 * (own.T @ tangent).square().sum())
        u = -lr * mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        skew = u @ own.T - own @ u.T
        turn = torch.linalg.inv(eye - skew / 2) @ (eye + skew / 2)
        if step == 1:  # to first order a step moves a square matrix by 2u
            assert ((turn @ own - own) - 2 * u).norm() < 1e-2 * u.norm()
        own, mean = turn @ own, turn @ mean
        assert torch.allclose(matrix.detach(), own, atol=1e-13)


def test_learning_rates_rise_then_fall():
    factor = end_to_end.warmup_schedule(0.1)
    rates = [factor(step / 100) for step in range(100)]
    assert rates[0] == 0 and max(rates) == rates[10] and rates[99] < 1e-3
    assert end_to_end.warmup_schedule(0)(0.0) == 1


@pytest.mark.parametrize("kind", ["cayley", "adam"])
@pytest.mark.parametrize("shape", [(32, 32), (3, 16, 16)], ids=str)
def test_a_hundred_steps_lower_the_rounding_error_and_leave_orthogonal_matrices(kind, shape):
    n, four = shape[-1], QuantizerSettings(4)
    inputs = torch.randn(*shape[:-2], 256, n, generator=torch.Generator().manual_seed(0))
    inputs[..., 0] *= 20  # outliers, as activations have
    matrix = ManifoldParameter(orthogonal(n).float().expand(shape).clone(), manifold=CanonicalStiefel())
    generator = torch.Generator().manual_seed(0)
    optimizer = CayleySGD([matrix], 0.5, generator) if kind == "cayley" else RiemannianAdam([matrix], 0.03)
    group = optimizer.param_groups[0]
    rate, losses = group["lr"], []
    for step in range(100):
        group["lr"] = rate * (1 - step / 100)
        turned = inputs @ matrix
        losses.append((fake_quantize(turned.detach(), four) - turned).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert error_of(matrix) < 1e-4


# --- Losses and quantisers --------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalised", [False, True])
def test_kl_top_matches_hand_computed_values(renormalised):
    student, teacher = normal(5, 11), normal(5, 11, seed=1)
    p, q = teacher.softmax(1), student.softmax(1)
    assert torch.allclose(kl_top(student, teacher, 11, renormalised), (p * (p / q).log()).sum())
    total = 0.0
    for row in range(5):
        top = sorted(range(11), key=lambda i: -teacher[row, i])[:4]
        whole = (sum(p[row, i] for i in top), sum(q[row, i] for i in top)) if renormalised else (1.0, 1.0)
        total += sum(p[row, i] / whole[0] * torch.log(p[row, i] / whole[0] / (q[row, i] / whole[1])) for i in top)
    assert torch.allclose(kl_top(student, teacher, 4, renormalised), total)


@pytest.mark.parametrize("top, renormalised, flat", [(11, False, True), (4, True, True), (4, False, False)])
def test_kl_top_is_least_where_student_and_teacher_agree(top, renormalised, flat):
    teacher = normal(5, 11)
    student = teacher.clone().requires_grad_()
    kl_top(student, teacher, top, renormalised).backward()
    assert (float(student.grad.abs().max()) < 1e-12) == flat


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 8])
def test_quantisers_for_learning_compute_what_evaluation_does(is_symmetric, group):
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    settings = QuantizerSettings(4, is_symmetric, group, 0.8)
    expected = fake_quantize(x.detach(), settings)
    for quantise in (straight_through.ste_identity, straight_through.ste_range):
        assert torch.allclose(quantise(x, settings), expected, atol=1e-6)
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(straight_through.ste_weight(weight, 4, "minmax"), straight_through.ste_range_weight(weight, 4))


def test_gradients_pass_rounding():
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    settings = QuantizerSettings(4, False, None, 0.7)
    straight_through.ste_identity(x, settings).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # beyond the range, too
    x.grad = None
    out = straight_through.ste_range(x, settings)
    (gradient,) = torch.autograd.grad(out[0, 3], x, retain_graph=True)
    ends = {int(x[0].argmin()), int(x[0].argmax())}
    assert set(gradient[0].nonzero()[:, 0].tolist()) <= {3, *ends} and not gradient[1].any()
    clipped = x.detach() > 0.7 * x.detach().amax(-1, keepdim=True) + 0.3
    inside = (x.detach().abs() < 0.3) & ~clipped
    assert inside[0].any()
    for place in inside[0].nonzero()[:, 0].tolist():
        (own,) = torch.autograd.grad(out[0, place], x, retain_graph=True)
        assert own[0, place] == pytest.approx(1.0, abs=1e-5)


def test_searched_scales_are_constants_and_clipped_weights_have_no_gradient():
    weight = torch.randn(
        6, 512, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()  # wide: some are clipped
    grid = Grid.fit(weight.detach(), 3, "mse")
    quantised = straight_through.clipped_weight(weight, 3)
    assert torch.equal(quantised.detach(), grid.round(weight.detach()))
    quantised.sum().backward()
    codes = weight.detach() / grid.scale
    inside = (codes.round() >= grid.low) & (codes.round() <= grid.high)
    assert not inside.all() and torch.allclose(weight.grad, inside.float())
    assert straight_through.clipped_weight(weight, 16) is weight


# --- The network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, quantise", [("spinquant", "ste_identity"), ("ostquant", "ste_range")])
def test_turning_activations_is_folding_weights(kind, quantise, folder, tmp_path, monkeypatch):
    found = []
    for bits in (16, 15):  # weights at "15 bits" are folded; here they are not rounded
        monkeypatch.setattr(rotated_block.RotatedBlock, "_rounded", lambda _, __, weight: weight)
        task = task_of(folder, tmp_path, kind)
        task.recipe = replace(task.recipe, bits=bits)
        tokens = task.windows[:1, :32]  # few: no value rounds otherwise by a hair
        rotation = registry.draw(kind, task.dimensions)
        leaves = {name: p.float().requires_grad_() for name, p in rotation.parameters.items()}
        rotation.parameters = leaves
        own = network.Network(task, getattr(straight_through, quantise))
        next_same = network.Objective(summed_cross_entropy, lambda windows, places: windows)
        loss = own.loss(rotation, tokens, torch.zeros(1), next_same, backward=True)
        found.append((loss, {name: along(leaf) for name, leaf in leaves.items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        assert (gradient - found[1][1][name]).norm() < 1e-3 * gradient.norm(), name


def summed_cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets, reduction="sum")


def along(leaf):
    """The gradient; of a matrix that stays orthogonal, what of it lies along the manifold."""
    return (
        leaf.grad - leaf.detach() @ leaf.grad.mT @ leaf.detach()
        if leaf.ndim > 1 and leaf.shape[-1] == leaf.shape[-2]
        else leaf.grad
    )


def test_the_loss_over_parts_of_the_tokens_is_the_loss(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(network, "TOKENS", 50)
    task = task_of(folder, tmp_path, "spinquant")
    own, states = network.Network(task, straight_through.ste_identity), torch.randn(120, 96).requires_grad_()
    targets = torch.arange(120)
    loss = own.head_loss(states, targets, summed_cross_entropy, backward=True)
    expected = F.cross_entropy(own.logits(states), targets)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(states.grad, torch.autograd.grad(expected, states)[0], atol=1e-7)


@pytest.mark.parametrize("clip", ["mse", "minmax"])
@pytest.mark.parametrize("kind", ["spinquant", "ostquant"])
def test_the_loss_is_that_of_the_model_with_rounded_weights(kind, clip, folder, tmp_path):
    """Against the model folded and rounded to nearest layer by layer, without the network."""
    quantise = {"bits": 3, "clip": clip, "values": LOW}
    _, curve = learned(folder, tmp_path / "out", kind, steps=1, quantise=quantise)
    rotation = registry.draw(kind, Dimensions.of(load_model(folder / "model").config))
    if kind == "ostquant":
        del rotation.transforms["query_key"]
        rotation.parameters = {n: torch.ones_like(p) if ".S_" in n else p for n, p in rotation.parameters.items()}
    plain, rounded = load_model(folder / "model"), load_model(folder / "model")
    apply.rotate(rounded, rotation)
    round_weights(rounded, 3, clip)
    for block in rounded.model.layers:
        set_quantizers(block, layout_of(rounded.config), Recipe.parse({"method": "rtn", "bits": 16, "values": LOW}))
    tokens = token_windows.load_tokens(folder / "learn")[0][-4:]
    with torch.no_grad():
        logits, teacher = rounded(tokens).logits.flatten(0, 1), plain(tokens).logits.flatten(0, 1)
        expected = float(kl_top(logits, teacher, 1000) / len(logits))
    if kind == "spinquant":
        expected = math.log(perplexity(rounded, tokens))
    assert curve["held_out"].iloc[0] == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
def test_small_batches_add_up_to_the_gradient_of_the_batch(folder, tmp_path):
    whole, _ = learned(folder, tmp_path / "whole", "ostquant", steps=2, batch=5)
    parts, _ = learned(folder, tmp_path / "parts", "ostquant", steps=2, batch=5, micro_batch=2)
    other, _ = learned(folder, tmp_path / "other", "ostquant", steps=2, batch=2)
    apart, moved = (
        sum((p - run.parameters[name]).square().sum() for name, p in whole.parameters.items()) ** 0.5
        for run in (parts, other)
    )
    assert apart < 0.1 * moved  # single elements may differ by more: a rounding that falls the other way


def test_windows_come_in_order_of_epochs():
    places = torch.cat([end_to_end.draw_batch(7, 3, step, seed=2) for step in range(14)])
    for epoch in places.split(7):
        assert sorted(epoch.tolist()) == list(range(7))
    assert not torch.equal(places[:7], places[7:14])
    assert torch.equal(end_to_end.draw_batch(7, 3, 5, seed=2), places[15:18])


# --- Learned rotations ------------------------------------------------------------------------------------


def learned(folder, out, kind, **learn):
    entry = {"kind": kind, "seed": 0, "learn": {**SMALL, **learn}}
    return learn_rotation(entry, folder / "model", folder / "learn", out, "cpu"), pd.read_csv(out.with_suffix(".csv"))


@pytest.fixture(scope="module")
def spinquant(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("learned") / "rotation.safetensors"
    return *learned(folder, out, "spinquant", steps=40, batch=8, every=20, lr=0.2, held_out=16), out


@pytest.fixture(scope="module")
def ostquant(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("learned") / "rotation.safetensors"
    return *learned(folder, out, "ostquant", steps=40, batch=4, every=20, held_out=16), out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spinquant", "ostquant"])
def test_a_learned_file_says_how_it_was_learned(kind, folder, request):
    rotation, curve, out = request.getfixturevalue(kind)
    assert list(curve["step"]) == [0, 20, 40]
    assert not out.with_name(out.name + ".unfinished").exists()
    read = registry.load(out, rotation.dimensions)
    assert read.options["learned"]["steps"] == 40 and read.seed is None
    assert read.options["learned"]["calibration"]["seqlen"] == 128


@pytest.mark.slow
def test_ostquant_helps_on_windows_that_were_not_learned_from(ostquant):
    """Not asked of SpinQuant: on so small a model it gains no more over its start than chance moves it."""
    _, curve, _ = ostquant
    assert curve["held_out"].iloc[-1] < curve["held_out"].iloc[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spinquant", "ostquant"])
def test_a_learned_rotation_leaves_the_16_bit_model_alone(kind, folder, request):
    plain = load_model(folder / "model", torch.float64)
    turned = load_model(folder / "model", torch.float64)
    apply.rotate(turned, registry.load(request.getfixturevalue(kind)[2], Dimensions.of(plain.config)))
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        assert (plain(tokens).logits - turned(tokens).logits).abs().max() < 1e-3


@pytest.mark.slow
def test_the_curve_is_what_evaluation_finds(folder, spinquant):
    _, curve, out = spinquant
    model = load_model(folder / "model")
    apply.rotate(model, registry.load(out, Dimensions.of(model.config)))
    recipe = Recipe.parse({"method": "rtn", "bits": 16, **QUANTISE})
    for block in model.model.layers:
        set_quantizers(block, layout_of(model.config), recipe)
    held_out = token_windows.load_tokens(folder / "learn")[0][-16:]
    assert perplexity(model, held_out) == pytest.approx(math.exp(curve["held_out"].iloc[-1]), rel=2e-3)


@pytest.fixture(scope="module")
def for_weights(folder, tmp_path_factory):
    """OSTQuant's rotation learned for 3-bit weights alone, as its command for W4A16KV16 learns for 4 bits."""
    out = tmp_path_factory.mktemp("learned") / "weights.safetensors"
    return *learned(folder, out, "ostquant", steps=20, batch=4, every=10, held_out=16, quantise={"bits": 3}), out


@pytest.mark.slow
def test_a_rotation_learned_for_rounded_weights_suits_them_better(folder, ostquant, for_weights):
    """Than one learned for quantised activations, and than where it started; on windows not learned from."""
    _, curve, _ = for_weights
    assert curve["held_out"].iloc[-1] < 0.9 * curve["held_out"].iloc[0]
    tokens, found = token_windows.load_tokens(folder / "learn")[0][-16:], {}
    plain = load_model(folder / "model")(tokens).logits.detach().flatten(0, 1)
    for name, (_, _, out) in {"activations": ostquant, "weights": for_weights}.items():
        model = load_model(folder / "model")
        apply.rotate(model, registry.load(out, Dimensions.of(model.config)))
        round_weights(model, 3)
        with torch.no_grad():
            found[name] = float(kl_top(model(tokens).logits.flatten(0, 1), plain, plain.shape[1]))
    assert found["weights"] < 0.9 * found["activations"]


def round_weights(model, bits, clip="mse") -> None:
    """Every linear layer of every block to nearest, in place."""
    for block in model.model.layers:
        for path in layout_of(model.config).linears:
            weight = block.get_submodule(path).weight
            weight.data = Grid.fit(weight.data, bits, clip).round(weight.data)


def test_the_other_start_is_along_the_weights_principal_axes(folder, tmp_path):
    task = task_of(folder, tmp_path, "ostquant")
    drawn, turned = OSTQuant.draw(task.dimensions, 0), OSTQuant.draw(task.dimensions, 0)
    klt.turn(turned, StreamedBlocks(task.model, None, torch.float32, "cpu"))
    turned.check("the start")
    model, readers = load_model(folder / "model", torch.float64), []
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            readers.append(layer.weight * block.input_layernorm.weight)
        for layer in (mlp.up_proj, mlp.gate_proj):
            readers.append(layer.weight * block.post_attention_layernorm.weight)
    _same_axes(torch.cat(readers), turned.parameters["R_res"] @ drawn.parameters["R_res"].T)
    k, m = task.dimensions.kv_heads, task.dimensions.head_dim
    output = model.model.layers[1].self_attn.o_proj.weight
    for head in range(k):
        rows = torch.cat(output.split(m, dim=1)[head * task.dimensions.heads // k :][: task.dimensions.heads // k])
        own, before = turned.parameter(1, "R_ov")[head], drawn.parameter(1, "R_ov")[head]
        _same_axes(rows, own @ before.T)


def _same_axes(rows, axes):
    """Columns of axes are eigenvectors of the rows' covariance, in order of their eigenvalues."""
    values = torch.linalg.eigvalsh(torch.cov(rows.detach().T, correction=0))
    rest = axes.T @ torch.cov(rows.detach().T, correction=0) @ axes - values.diag()
    assert rest.abs().max() < 1e-6 * values.max()


def test_learning_starts_from_configured_matrix(folder, tmp_path):
    _, hadamard = learned(folder, tmp_path / "h", "ostquant", steps=1)
    rotation, axes = learned(folder, tmp_path / "k", "ostquant", steps=1, start="klt")
    assert hadamard["held_out"].iloc[0] != axes["held_out"].iloc[0]
    assert rotation.options["learned"]["start"] == "klt"
    with pytest.raises(ObrError, match=r"learn\.start is 'orthogonal'; choose hadamard or klt"):
        learned(folder, tmp_path / "o", "ostquant", start="orthogonal")


def test_weights_may_be_quantised_and_products_half_precision(folder, tmp_path):
    entry = {
        "kind": "ostquant",
        "learn": {**SMALL, "steps": 2, "quantise": {"bits": 4, **QUANTISE}},
    }
    path = tmp_path / "out.safetensors"
    rotation = learn_rotation(entry, folder / "model", folder / "learn", path, "cpu", torch.bfloat16)
    assert "query_key" not in rotation.transforms and rotation.about()["learned"]["quantise"]["bits"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, moves, where, step",
    [("spinquant", 3, "unfinished", 5), ("ostquant", 4, "unfinished", 10), ("spinquant", 2, "beside", 12)],
    ids=["early", "later", "while the result is written"],
)
def test_killed_runs_go_on_and_end_with_the_same_bytes(kind, moves, where, step, folder, request, tmp_path):
    run = request.getfixturevalue("obr_command")
    stage = ["learn-rotation", "--settings", json.dumps({"kind": kind, "learn": SMALL}), "--model", folder / "model"]
    stage += ["--tokens", folder / "learn"]
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    assert run(stage, whole)[0] == 0, (tmp_path / "log").read_text()
    unfinished = Path(f"{out}.unfinished")
    watched = str(unfinished if where == "unfinished" else tmp_path)
    assert run(stage, out, {"moves": moves, "folder": watched})[0] == -signal.SIGKILL
    assert not out.exists()
    assert Snapshots(out, json.loads((unfinished / "run.json").read_text())).read()[1]["step"] == step
    release(unfinished)
    assert run(stage, out)[0] == 0, (tmp_path / "log").read_text()
    for suffix in (".safetensors", ".csv"):
        assert out.with_suffix(suffix).read_bytes() == whole.with_suffix(suffix).read_bytes()
    assert not unfinished.exists()


@pytest.mark.slow
def test_unsupported_learning_is_refused_in_one_sentence(folder, tmp_path):
    with pytest.raises(ObrError, match=r"learn has the key 'stepps'.*known are .*steps"):
        learned(folder, tmp_path / "out", "spinquant", stepps=3)
    with pytest.raises(ObrError, match="held_out 24 of the 24"):
        learned(folder, tmp_path / "out", "spinquant", held_out=24)
    with pytest.raises(ObrError, match="'quarot' is not learned; those that are: spinquant"):
        learned(folder, tmp_path / "out", "quarot")
    with pytest.raises(ObrError, match="clip is 'learned', but this learner does not learn clips; use mse or minmax"):
        learned(folder, tmp_path / "out", "ostquant", quantise={"bits": 4, "clip": "learned"})
    (tmp_path / "other").mkdir()
    task_of(folder, tmp_path / "other", "spinquant")
    with pytest.raises(ObrError, match=r"holds the state of another run \(its entry differs\)"):
        task_of(folder, tmp_path / "other", "ostquant")
