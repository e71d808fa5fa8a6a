"""Learning through a whole model holds one block at a time, with the gradients of the model held whole."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from helpers.answer_likelihoods import tiny
from obr.data import token_windows
from obr.models.blocks import StreamedBlocks
from obr.models.hadamard import Kronecker
from obr.models.hidden_states import StoredStates
from obr.models.layers import set_quantizers
from obr.rotations import fold, registry
from obr.rotations.learning import network, straight_through
from obr.rotations.learning.registry import learn_rotation
from obr.rotations.learning.run import LearningRun

pytestmark = pytest.mark.slow

VALUES = {"bits": 4}
LEARN = {
    "steps": 3,
    "batch": 3,
    "every": 2,
    "keep_every": 2,
    "held_out": 2,
    "quantise": {"bits": 4, "values": VALUES},
}


@pytest.fixture(scope="module")
def folder(tiny_folder):
    options = {"nsamples": 8, "seqlen": 32}
    token_windows.calibrate(tiny_folder / "model", tiny_folder / "train.txt", options, tiny_folder / "streamed")
    return tiny_folder


def task_of(folder, out, kind, **quantise) -> LearningRun:
    entry = {"kind": kind, "learn": {**LEARN, "quantise": {"bits": 4, **quantise}}}
    return LearningRun.of(entry, folder / "model", folder / "streamed", out / "out", "cpu", torch.float32)


def rounded(weight, bits, clip, quantise):
    if quantise is straight_through.ste_identity:
        return straight_through.ste_weight(weight, bits, clip)
    if clip == "mse":
        return straight_through.clipped_weight(weight, bits)
    return straight_through.ste_range_weight(weight, bits)


def whole_loss(task, rotation, quantise, windows, places, objective):
    """The loss with one graph through all blocks, every weight folded."""
    source, recipe = StreamedBlocks(task.model, None, torch.float32, "cpu"), task.recipe
    rows, arguments = source.embed(windows)
    residual = rotation.residual()
    states = residual(torch.cat(list(rows)))
    for index in range(len(source)):
        block, changes = source.load(index), rotation.changes(index)
        fold.attach(block, changes, source.layout)
        set_quantizers(block, source.layout, recipe)
        straight_through.swap(block, quantise)
        new = fold.fold_block(dict(block.named_parameters()), changes, source.layout, dtype=torch.float32)
        for path in source.layout.linears:
            new[f"{path}.weight"] = rounded(new[f"{path}.weight"], recipe.bits, recipe.clip, quantise)
        states = functional_call(block, new, (states,), arguments[index])
        states = states[0] if isinstance(states, tuple) else states
    logits = source.logits(Kronecker.right(residual.factors())(states))
    aims = objective.aims(windows, places)
    count = aims.shape[0] * aims.shape[1]
    return objective.criterion(logits[:, : aims.shape[1]].flatten(0, 1), aims.flatten(0, 1)) / count


@pytest.mark.parametrize("megabytes", [100, 0.05, 0], ids=["memory", "memory and files", "files"])
@pytest.mark.parametrize("kind, quantise", [("spinquant", "ste_identity"), ("ostquant", "ste_range")])
@pytest.mark.parametrize("clip", ["mse", "minmax"])
def test_the_gradient_is_that_of_one_graph_through_the_whole_model(
    kind, quantise, clip, megabytes, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(network, "TOKENS", 40)
    task = replace(task_of(folder, tmp_path, kind, clip=clip), megabytes=megabytes)
    windows, places = task.windows[:3], torch.arange(3)
    next_token = network.Objective(
        lambda logits, targets: F.cross_entropy(logits, targets, reduction="sum"), lambda windows, _: windows[:, 1:]
    )
    quantise, found = getattr(straight_through, quantise), []
    for streamed in (True, False):
        rotation = registry.draw(kind, task.dimensions)
        rotation.parameters = leaves = {n: p.float().requires_grad_() for n, p in rotation.parameters.items()}
        if streamed:
            own = network.Network(task, quantise, at_once=2)
            loss = own.loss(rotation, windows, places, next_token, backward=True)
            assert own.loss(rotation, windows, places, next_token) == loss
        else:
            loss = whole_loss(task, rotation, quantise, windows, places, next_token)
            loss.backward()
        found.append((float(torch.as_tensor(loss).detach()), {name: leaf.grad for name, leaf in leaves.items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert set(found[0][1]) == set(found[1][1])
    for name, gradient in found[1][1].items():
        assert (found[0][1][name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("kind", ["spinquant", "ostquant"])
def test_learned_rotations_do_not_depend_on_where_hidden_states_lie(kind, folder, tmp_path):
    entry, found = {"kind": kind, "learn": LEARN}, []
    for megabytes in (100, 0):
        out = tmp_path / f"{megabytes}.safetensors"
        learn_rotation(entry, folder / "model", folder / "streamed", out, "cpu", megabytes=megabytes)
        found.append((out.read_bytes(), out.with_suffix(".csv").read_bytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("loss, bits", [("cross_entropy", 4), ("kl_top", 16)])
def test_learning_has_one_block_in_memory_at_a_time(loss, bits, folder, tmp_path, monkeypatch):
    """No block outlives the loading of the next, though nothing collects garbage in between."""
    source, depth, loaded = tmp_path / "deep", 5, []
    tiny(num_hidden_layers=depth, vocab_size=512, max_position_embeddings=512).save_pretrained(source)
    real = StreamedBlocks.load

    def watched(self, index):
        assert not any(block() is not None for _, block in loaded), "another block is still in memory"
        block = real(self, index)
        loaded.append((index, weakref.ref(block)))
        return block

    monkeypatch.setattr(StreamedBlocks, "load", watched)
    learn = {**LEARN, "steps": 2, "every": 2, "loss": loss, "quantise": {"bits": bits, "values": VALUES}}
    gc.disable()
    try:
        learn_rotation(
            {"kind": "spinquant", "learn": learn}, source, folder / "streamed", tmp_path / "out.safetensors", "cpu"
        )
    finally:
        gc.enable()
    # A look goes forward, a step forward and back; the block between two passes is loaded once.
    forward, back = list(range(depth)), list(reversed(range(depth - 1)))
    teacher = forward if loss == "kl_top" else []
    assert [index for index, _ in loaded] == [*teacher, *forward, *forward, *back, *forward[1:], *back, *forward[1:]]


def test_hidden_states_take_the_memory_they_are_given(folder, tmp_path, monkeypatch):
    kept, real = [], StoredStates.__init__

    def watched(self, shapes, dtype, device, room=None):
        real(self, shapes, dtype, device, room)
        kept.append((self.needed, self.file is not None, None if room is None else room.folder))

    monkeypatch.setattr(StoredStates, "__init__", watched)
    task = replace(task_of(folder, tmp_path, "spinquant"), megabytes=0.08)
    rotation = registry.draw("spinquant", task.dimensions)
    rotation.parameters = {name: p.float().requires_grad_() for name, p in rotation.parameters.items()}
    own = network.Network(task, straight_through.ste_identity)
    same = network.Objective(lambda logits, aims: F.cross_entropy(logits, aims, reduction="sum"), lambda w, _: w)
    own.loss(rotation, task.windows[:3], torch.arange(3), same, backward=True)
    own_states = [(needed, filed) for needed, filed, folder in kept if folder == task.kept.folder]
    assert own_states == [(36864, False), (36864, False), (36864, True)]
