"""The Hessian stage: symmetric sums, hidden states in memory or in a file, resumption, progress."""

import resource
import time

import pytest
import torch
from safetensors.torch import save_file

from obr.calibration import collect_hessians
from obr.calibration.moments import TILE
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.evaluation.perplexity import perplexity
from obr.models.blocks import StreamedBlocks
from obr.models.hidden_states import HiddenStates, MemoryBudget
from obr.rotations.obtain import make
from obr.runtime.progress import Progress

FILE = 0  # megabytes of memory: everything goes to the file


@pytest.fixture(scope="module")
def inputs(tiny_folder, tmp_path_factory):
    """Model, rotation and tokens, as the stage's arguments."""
    folder = tmp_path_factory.mktemp("inputs")
    make({"kind": "quarot", "seed": 0}, tiny_folder / "model", folder / "rotation.safetensors")
    tokens = torch.randint(0, 512, (6, 64), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, folder / "tokens.safetensors", metadata={"calibration": "{}"})
    return tiny_folder / "model", folder / "rotation.safetensors", folder / "tokens.safetensors"


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("columns", [5, TILE, TILE + 300])
def test_sums_and_triangles_are_whole(columns, tmp_path):
    generator = torch.Generator().manual_seed(columns)
    inputs = [torch.randn(1, 7, columns, generator=generator) for _ in range(3)]
    accumulator = collect_hessians.Accumulator(columns, len(inputs), torch.device("cpu"))
    for x in inputs:
        accumulator(x)
    moments = accumulator.moments()
    matrix = moments.hessian
    wanted = 2 / 3 * sum(x[0].double().T @ x[0].double() for x in inputs)
    assert torch.allclose(matrix.double(), wanted, atol=1e-4) and torch.equal(matrix, matrix.T)
    harmonic = sum(x[0].double().square().sum(0) / number for number, x in enumerate(inputs, start=1))
    assert torch.allclose(moments.harmonic.double(), harmonic, rtol=1e-5)
    path = tmp_path / "block.safetensors"
    collect_hessians.save({"qkv": moments, "o": collect_hessians.Moments(2 * matrix)}, path)
    found = collect_hessians.load(path, groups=["qkv"], harmonic=True)["qkv"]
    assert torch.equal(found.hessian, matrix) and torch.equal(found.harmonic, moments.harmonic)
    assert torch.equal(collect_hessians.load(path, groups=["o"])["o"].hessian, 2 * matrix)
    assert collect_hessians.load(path).keys() == {"qkv", "o"}
    with pytest.raises(ObrError, match="has no harmonic norms, which mask wanda_harmonic needs; delete its folder"):
        collect_hessians.load(path, harmonic=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_kept_in_a_file_as_in_memory(dtype, tmp_path):
    states = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for megabytes in (1, FILE):
        kept = HiddenStates(3, (5, 8), dtype, torch.device("cpu"), MemoryBudget(megabytes, tmp_path))
        assert (kept.file is None) == (megabytes == 1)
        for index in (2, 0, 1):
            kept[index] = states[index][None]
        kept[1] = kept[1] * 2
        assert torch.equal(torch.cat(list(kept)), torch.stack([states[0], states[1] * 2, states[2]]))
    assert not list(tmp_path.iterdir())  # the file has no name


def test_a_full_disk_is_told_in_one_sentence(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ObrError, match=r"hidden states cannot be written to .* free that space, or give more"):
            HiddenStates(3, (50, 8), torch.float32, torch.device("cpu"), MemoryBudget(FILE, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_results_do_not_depend_on_where_states_lie(inputs, tmp_path):
    model, rotation, tokens = inputs
    recipe = Recipe.parse({"method": "obr_gptq", "rotation": "quarot", "calibration": "x"})
    for name, megabytes in (("memory", 100), ("file", FILE)):
        collect_hessians.hessian_stage(
            model, rotation, tokens, tmp_path / name / "h", device="cpu", megabytes=megabytes
        )
        out = tmp_path / name / "c"
        compress_stage(model, recipe, out, rotation=rotation, tokens=tokens, device="cpu", megabytes=megabytes)
    assert files_of(tmp_path / "memory" / "h") == files_of(tmp_path / "file" / "h")
    for path in (tmp_path / "memory" / "c").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "file" / "c" / path.name).read_bytes(), path.name
    windows = torch.randint(0, 512, (3, 64), generator=torch.Generator().manual_seed(1))
    values = [
        perplexity(StreamedBlocks(model, device="cpu"), windows, room=MemoryBudget(mb, tmp_path))
        for mb in (100, FILE)
    ]
    assert values[0] == values[1]


def test_tokens_of_another_model_are_refused(inputs):
    with pytest.raises(ObrError, match=r"Token 512 is none of the model's 512; tokenise"):
        perplexity(StreamedBlocks(inputs[0], device="cpu"), torch.tensor([[3, 512, 5]]))


class Plug(Exception):
    """Pulled."""


def test_an_interrupted_stage_goes_on_where_it_was(inputs, tmp_path, monkeypatch):
    model, rotation, tokens = inputs
    collect_hessians.hessian_stage(model, rotation, tokens, tmp_path / "undisturbed", device="cpu")
    save, saved = collect_hessians.save, []

    def pulled(matrices, path):
        saved.append(path.name)
        if len(saved) == 2:
            raise Plug
        save(matrices, path)

    monkeypatch.setattr(collect_hessians, "save", pulled)
    with pytest.raises(Plug):
        collect_hessians.hessian_stage(model, rotation, tokens, tmp_path / "out", device="cpu")
    assert not list((tmp_path / "out").iterdir())

    with pytest.raises(
        ObrError, match=r"out.unfinished holds blocks of another run \(its rotation differs\); go back"
    ):
        collect_hessians.hessian_stage(model, None, tokens, tmp_path / "out", device="cpu")
    with pytest.raises(ObrError, match=r"its dtype differs.*or delete the folder to start again"):
        collect_hessians.hessian_stage(model, rotation, tokens, tmp_path / "out", dtype=torch.bfloat16, device="cpu")

    collect_hessians.hessian_stage(model, rotation, tokens, tmp_path / "out", device="cpu")
    assert saved == ["block_000.safetensors", "block_001.safetensors", "block_001.safetensors"]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")
    assert not (tmp_path / "out.unfinished").exists()


def test_remaining_time_excludes_resumed_blocks(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress("obr_gptq", 10) as shown:
        for _ in range(4):
            now[0] += 1
            shown.resume()
        for _ in range(2):
            now[0] += 30
            shown.layer("group 1/4, qkv")
            shown.block()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "obr_gptq: going on with an interrupted run"
    assert lines[1:] == [
        "obr_gptq: block 5 of 10, 00:30 elapsed, 02:30 left",
        "obr_gptq: block 6 of 10, 01:00 elapsed, 02:00 left",
    ]
