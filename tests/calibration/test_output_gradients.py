"""Output gradients: against the whole model's own backward pass, rotated or not, and as weights of rows."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import obr
from obr.calibration import output_gradients
from obr.data.token_windows import calibrate, load_tokens
from obr.errors import ObrError
from obr.models.blocks import Blocks, StreamedBlocks
from obr.models.hidden_states import MemoryBudget
from obr.rotations import apply
from obr.rotations.obtain import make


@pytest.fixture(scope="module")
def windows(tiny_folder, tmp_path_factory):
    """(file of calibration windows, tokens (6, 64))."""
    path = tmp_path_factory.mktemp("calibration") / "windows.safetensors"
    calibrate(tiny_folder / "model", tiny_folder / "train.txt", {"nsamples": 6, "seqlen": 64}, path)
    return path, load_tokens(path)[0]


@pytest.fixture(scope="module")
def rotation(tiny_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("rotation") / "quarot.safetensors"
    make({"kind": "quarot", "seed": 0}, tiny_folder / "model", path)
    return path


def by_one_graph(model, linears: dict, tokens) -> dict:
    """Mean squares of the outputs' gradients, all at once, with the graph of the whole model."""
    kept = {}
    hooks = [
        linear.register_forward_hook(lambda _m, _i, out, name=name: kept.update({name: out}))
        for name, linear in linears.items()
    ]
    sums = dict.fromkeys(linears, 0.0)
    for window in tokens:
        states = model.get_input_embeddings()(window[None]).detach().requires_grad_()
        logits = model(inputs_embeds=states).logits[0]
        loss = F.cross_entropy(logits[:-1], window[1:], reduction="sum")
        found = torch.autograd.grad(loss, [kept[name] for name in linears])
        for name, gradient in zip(linears, found, strict=True):
            sums[name] = sums[name] + gradient[0].square().sum(0)
    for hook in hooks:
        hook.remove()
    return {name: total / tokens.numel() for name, total in sums.items()}


def test_streamed_gradients_equal_backward_of_whole_model(tiny_folder, windows):
    """transformers' own model and graph, nothing of ours in it."""
    tokens = windows[1]
    found, loss = output_gradients.squared_gradients(StreamedBlocks(tiny_folder / "model"), tokens, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder / "model", dtype=torch.float32).eval()
    linears = {n.removeprefix("model.layers."): m for n, m in model.named_modules() if n.endswith("_proj")}
    expected = by_one_graph(model, linears, tokens)
    assert found.keys() == expected.keys() and len(found) == 14
    for name, values in expected.items():
        assert torch.allclose(found[name], values, rtol=1e-3, atol=1e-6 * float(values.max())), name
    with torch.no_grad():
        assert loss == pytest.approx(float(model(input_ids=tokens, labels=tokens).loss), rel=1e-4)


def test_gradients_of_rotated_model_are_behind_online_transforms(tiny_folder, windows, rotation, tmp_path):
    tokens = windows[1][:2]
    blocks = apply.open_blocks(tiny_folder / "model", rotation)
    found, _ = output_gradients.squared_gradients(
        blocks, tokens, MemoryBudget(0.0, tmp_path), progress=False
    )  # states in files
    whole = apply.open_blocks(tiny_folder / "model", rotation).whole()
    linears = {n.removeprefix("model.layers."): m for n, m in whole.named_modules() if n.endswith("_proj")}
    for name, values in by_one_graph(whole, linears, tokens).items():
        assert torch.allclose(found[name], values, rtol=1e-3, atol=1e-6 * float(values.max())), name
    plain, _ = output_gradients.squared_gradients(StreamedBlocks(tiny_folder / "model"), tokens, progress=False)
    name = "0.mlp.up_proj"  # whose outputs no rotation touches
    assert torch.allclose(found[name], plain[name], rtol=1e-2, atol=1e-6)
    name = "0.mlp.down_proj"  # whose outputs R1 mixes
    assert float(found[name].sum()) == pytest.approx(float(plain[name].sum()), rel=1e-2)
    assert not torch.allclose(found[name], plain[name], rtol=0.1)


def test_a_model_in_memory_is_left_as_it_was(tiny_folder, windows):
    model = obr.load_model(tiny_folder / "model")
    before = {name: p.clone() for name, p in model.named_parameters()}
    found, _ = output_gradients.squared_gradients(Blocks(model), windows[1][:1], progress=False)
    streamed, _ = output_gradients.squared_gradients(
        StreamedBlocks(tiny_folder / "model"), windows[1][:1], progress=False
    )
    assert all(torch.allclose(found[name], streamed[name], rtol=1e-4) for name in streamed)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_gradient_stage_writes_measured_values(tiny_folder, windows, tmp_path):
    out = tmp_path / "g" / "train.safetensors"
    notes = output_gradients.gradients(tiny_folder / "model", None, windows[0], out, nsamples=2, seqlen=32)
    found, told = output_gradients.load(out)
    assert told == notes and notes["windows"] == 2 and notes["seqlen"] == 32 and notes["tokens"] == 64
    tokens = windows[1][:2, :32]
    expected, loss = output_gradients.squared_gradients(StreamedBlocks(tiny_folder / "model"), tokens, progress=False)
    assert notes["loss"] == pytest.approx(loss) and all(torch.equal(found[n], expected[n]) for n in expected)
    output_gradients.gradients(tiny_folder / "model", None, windows[0], tmp_path / "again", nsamples=2, seqlen=32)
    assert (tmp_path / "again").read_bytes() == out.read_bytes()
    out.write_bytes(out.read_bytes()[:-9])
    with pytest.raises(ObrError, match="is not a whole file of output gradients"):
        output_gradients.load(out)


def test_weights_of_rows_have_a_mean_of_one():
    weights = output_gradients.row_weights(torch.tensor([0.0, 1.0, 3.0, 4.0]))
    assert weights.mean() == pytest.approx(1.0) and weights[0] > 0 and weights[3] == pytest.approx(2.0)
    assert torch.equal(output_gradients.row_weights(torch.zeros(3)), torch.ones(3))
