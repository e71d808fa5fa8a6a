"""Where the time of compressing a model goes, stage by stage.

* passes: the model is read, rotated and run over the calibration tokens block by block; nothing is collected.
* Hessians: the same with the Hessians of all groups summed and written.
* restoration: all layers from those files; only `restore` is timed, with its mask, grid and relative error.
* sequential: raw model to packed checkpoint by the command line, the Hessians of each group taken behind what is
  already compressed; a process of its own, imports included.
"""

import shutil
from pathlib import Path

import torch

from obr import data, hessian
from obr.model import advance, block_file
from obr.recipe import Recipe
from obr.restoration import Hessian, restore
from peak import run_stage
from timing import machine, summary, timed


@torch.no_grad()
def measure(model: Path, rotation: Path, tokens: Path, scratch: Path, repeats: int) -> list[dict]:
    """Rows (stage, seconds, tokens, layers). scratch: a folder for what is written on the way."""
    windows, _ = data.load_tokens(tokens)
    cached = scratch / "hessians"
    cached.mkdir(parents=True, exist_ok=True)

    def passes() -> None:
        blocks = hessian.open_blocks(model, rotation, device="cpu")
        hidden, arguments = blocks.embed(windows)
        for index in range(len(blocks)):
            advance(blocks.load(index), hidden, arguments[index])

    def collected() -> None:
        blocks = hessian.open_blocks(model, rotation, device="cpu")
        for index, matrices in hessian.dense_hessians(blocks, windows, progress=False):
            hessian.save(matrices, cached / block_file(index))
            matrices.clear()

    seconds = {"passes": timed(passes, repeats)[0], "Hessians": timed(collected, repeats)[0]}
    layers = [_restoration(model, rotation, cached) for _ in range(repeats)]
    seconds["restoration"] = [sum(taken) for taken in layers]
    seconds["sequential"] = [_sequential(model, rotation, tokens, scratch) for _ in range(max(1, repeats // 2))]
    return [
        {
            "model": model.name, "stage": name, **summary("time", taken), "repeats": len(taken),
            "tokens": windows.numel(), "layers": len(layers[0]), **machine(),
        }
        for name, taken in seconds.items()
    ]  # fmt: skip


def _restoration(model: Path, rotation: Path, cached: Path) -> list[float]:
    """Seconds in `restore` for every layer of the model."""
    recipe = Recipe.parse({"method": "obr_gptq", "calibration": "given"})
    blocks = hessian.open_blocks(model, rotation, device="cpu")
    seconds = []
    for index in range(len(blocks)):
        block, matrices = blocks.load(index), hessian.load(cached / block_file(index))
        for group, names in blocks.layout.groups.items():
            factors = Hessian(matrices[group], recipe.damp)  # as in compression, the layers of a group share them
            for name in names:
                weight = block.get_submodule(name).weight
                seconds += timed(lambda w=weight, f=factors: restore(w, f, recipe.method), 1)[0]
    return seconds


def _sequential(model: Path, rotation: Path, tokens: Path, scratch: Path) -> float:
    out = scratch / "sequential"
    entry = {"method": "obr_gptq", "calibration": "given", "rotation": "quarot", "hessian": "sequential"}
    found = run_stage(
        "compress", "--entry", entry, "--model", model, "--rotation", rotation, "--tokens", tokens, "--out", out,
        "--threads", machine()["threads"],
    )  # fmt: skip
    shutil.rmtree(out)
    return found["seconds"]
