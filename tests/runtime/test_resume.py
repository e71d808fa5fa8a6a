"""Runs that are killed at random moments go on, and end with the same bytes as undisturbed ones."""

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import OlmoeConfig, OlmoeForCausalLM

from helpers.random_llama import random_llama
from helpers.released_checkpoints import FlatModel, written
from helpers.workflow_runs import digests
from obr.rotations.obtain import make
from obr.runtime.files import read_json
from obr.runtime.resume import Unfinished

BLOCKS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Folder with random models of six blocks, one of them with experts, their rotations, tokens to calibrate on, and
    a released checkpoint."""
    folder = tmp_path_factory.mktemp("inputs")
    model = random_llama(BLOCKS)
    model.save_pretrained(folder / "model")
    written(folder, FlatModel(model).state_dict())
    make({"kind": "quarot", "seed": 0}, folder / "model", folder / "rotation.safetensors")
    config = OlmoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=32, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, num_experts=6, num_experts_per_tok=2, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(folder / "experts")
    make({"kind": "quarot", "seed": 0}, folder / "experts", folder / "experts.safetensors")
    tokens = torch.randint(0, 128, (16, 64), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, folder / "tokens.safetensors", metadata={"calibration": "{}"})
    return folder


def kills_of(kind: str, out: Path, times: list[float], draw: random.Random) -> Iterator[dict]:
    """Moments for one kind of run: in the midst of a block, about the renaming of a file, among the last moves.

    times: of an undisturbed run's notes. Each moment is drawn when the one before it is past: a run that was killed
    late has fewer moves before it.
    """
    of_a_block = (times[-1] - times[0]) / BLOCKS
    yield {"notes": draw.randint(1, 3), "seconds": draw.uniform(0.1, 1.0) * of_a_block}
    yield {"renames": draw.randint(2, 7)}  # the first is the note of whose run it is
    unmoved = BLOCKS - len(list(out.glob("block_*.safetensors")))
    yield {"moves": draw.randint(min(2, unmoved + 1), unmoved + 1), "folder": str(out)}
    if kind in ("sequential", "experts", "released"):
        yield {"removals": draw.randint(1, BLOCKS + 1), "folder": str(out) + ".unfinished"}


def test_interrupted_tidying_leaves_the_note_of_whose_run_it_is(tmp_path, monkeypatch):
    """Without the note the next run would take the rest for nobody's."""
    run, removed = {"seed": 0}, []
    unfinished = Unfinished(tmp_path / "out", run)
    for index in range(2):
        unfinished.keep(index, lambda path: path.write_bytes(b"block"), {"seconds": 1})
    unfinished.move(2)

    def interrupted(path: Path) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(path.name)
        os.unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unfinished.remove()
    assert removed[0].startswith("block_") and read_json(unfinished.folder / "run.json") == run
    Unfinished(tmp_path / "out", run).remove()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hessian", "cached", "sequential", "experts", "released"])
def test_killed_runs_go_on_and_end_with_the_same_bytes(kind, inputs, obr_command, tmp_path):
    names = ("experts", "experts.safetensors") if kind == "experts" else ("model", "rotation.safetensors")
    common = ["--model", inputs / names[0], "--rotation", inputs / names[1]]
    tokens = ["--tokens", inputs / "tokens.safetensors"]
    if kind == "cached":
        assert obr_command(["hessian", *common, *tokens], tmp_path / "h")[0] == 0
        tokens = ["--hessians", tmp_path / "h"]
    if kind == "hessian":
        stage = ["hessian", *common, *tokens]
    elif kind == "released":
        entry = {"method": "released", "sparsity": 0.5, "rotation": "flatquant"}
        stage = ["released", "--recipe", json.dumps(entry), *common[:2], "--released", inputs / "released"]
    else:
        entry = {"method": "obr_gptq", "rotation": "quarot", "calibration": "random"}
        entry["hessian"] = "cached" if kind == "cached" else "sequential"
        stage = ["compress", "--recipe", json.dumps(entry), *common, *tokens]

    status, times = obr_command(stage, tmp_path / "undisturbed")
    assert status == 0 and len(times) == 1 + BLOCKS, (times, (tmp_path / "log").read_text())
    out, progress = tmp_path / "killed", []
    for kill in kills_of(kind, out, times, random.Random(f"3 {kind}")):
        status, _ = obr_command(stage, out, kill)
        assert status in (-signal.SIGKILL, -signal.SIGPROF), (kill, (tmp_path / "log").read_text())
        progress.append(len(list(out.with_name("killed.unfinished").glob("block_*.json"))))
        if "removals" not in kill:
            assert not (out / "manifest.json").exists() and not (out / "hessian.json").exists()
    assert progress[0] < BLOCKS and len(set(progress)) > 1, progress  # the kills fell in different blocks
    assert obr_command(stage, out)[0] == 0
    assert digests(out) == digests(tmp_path / "undisturbed")
    assert not list(tmp_path.glob("*.unfinished"))
