"""Calibration windows that a model writes, and mixtures."""

import pytest
import torch

from obr.data import self_generated
from obr.data.self_generated import generate, mix
from obr.data.token_windows import load_tokens, write_tokens
from obr.errors import ObrError
from obr.models.loading import load_model

SPEC = {"generated": {"batch_size": 4}, "nsamples": 3, "seqlen": 64, "seed": 0}


@pytest.fixture(scope="module")
def written(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("generated") / "tokens.safetensors"
    generate(tiny_folder / "model", SPEC, out)
    return out


def test_generated_windows_are_likelier_than_shuffled_ones(written, tiny_folder):
    tokens, about = load_tokens(written)
    assert tokens.shape == (3, 64) and about["text"] == "its own writing" and about["tokens"] == 192
    model = load_model(tiny_folder / "model", device="cpu")
    shuffled = tokens[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    told, noise = (float(model(input_ids=t, labels=t).loss) for t in (tokens, shuffled))
    assert told < noise - 1


def test_documents_begin_and_end_as_the_tokenizer_says(written):
    stream = load_tokens(written)[0].flatten()
    assert stream[0] == 0
    for end in (stream[:-1] == 1).nonzero().flatten():
        assert stream[end + 1] == 0


def test_the_same_seed_writes_the_same(written, tiny_folder, tmp_path):
    for seed in (0, 1):
        generate(tiny_folder / "model", {**SPEC, "seed": seed}, tmp_path / f"{seed}.safetensors")
    again, other = (load_tokens(tmp_path / f"{seed}.safetensors")[0] for seed in (0, 1))
    assert torch.equal(again, load_tokens(written)[0]) and not torch.equal(again, other)


def test_logits_that_are_not_finite_are_told(tiny_folder, tmp_path, monkeypatch):
    model = load_model(tiny_folder / "model", device="cpu")
    model.model.norm.weight.data.fill_(torch.nan)
    monkeypatch.setattr(self_generated, "load_model", lambda *_: model)
    with pytest.raises(ObrError, match="logits are not finite"):
        generate(tiny_folder / "model", SPEC, tmp_path / "tokens.safetensors")


@pytest.fixture
def parts(tmp_path):
    for number, windows in enumerate((4, 3)):
        tokens = torch.full((windows, 8), 10 * number) + torch.arange(windows)[:, None]
        about = {"model": "m", "text": f"text {number}", "tokenizer": "T"}
        write_tokens(tokens, about, tmp_path / f"{number}.safetensors")
    return [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]


def test_windows_are_taken_in_turns(parts, tmp_path):
    mix(parts, {"mix": ["a", "b"], "nsamples": 5, "seqlen": 8}, tmp_path / "mixed.safetensors")
    tokens, about = load_tokens(tmp_path / "mixed.safetensors")
    assert tokens[:, 0].tolist() == [0, 10, 1, 11, 2] and about["text"] == "a + b"


@pytest.mark.parametrize("spec", [{"nsamples": 8, "seqlen": 8}, {"nsamples": 2, "seqlen": 16}])
def test_parts_that_do_not_suffice_are_named(parts, tmp_path, spec):
    with pytest.raises(ObrError, match=r"\.safetensors has [34] windows of 8 tokens, and a mixture of 2 needs"):
        mix(parts, {"mix": ["a", "b"], **spec}, tmp_path / "mixed.safetensors")
    assert not (tmp_path / "mixed.safetensors").exists()
