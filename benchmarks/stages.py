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

from obr.calibration import collect_hessians
from obr.config.recipe import Recipe
from obr.data import token_windows
from obr.methods.restore import restore_together
from obr.models.blocks import run_in_place
from obr.rotations import apply
from obr.runtime.resume import block_file
from peak import run_stage
from timing import machine, summary, timed


@torch.no_grad()
def measure(model: Path, rotation: Path, tokens: Path, scratch: Path, repeats: int) -> list[dict]:
    """Rows (stage, seconds, tokens, layers). scratch: a folder for what is written on the way."""
    windows, _ = token_windows.load_tokens(tokens)
    cached = scratch / "hessians"
    cached.mkdir(parents=True, exist_ok=True)

    def passes() -> None:
        blocks = apply.open_blocks(model, rotation, device="cpu")
        hidden, arguments = blocks.embed(windows)
        for index in range(len(blocks)):
            run_in_place(blocks.load(index), hidden, arguments[index])

    def collected() -> None:
        blocks = apply.open_blocks(model, rotation, device="cpu")
        for index, matrices in collect_hessians.dense_hessians(blocks, windows, progress=False):
            collect_hessians.save(matrices, cached / block_file(index))
            matrices.clear()

    seconds = {"passes": timed(passes, repeats)[0], "Hessians": timed(collected, repeats)[0]}
    restored = [_restoration(model, rotation, cached) for _ in range(repeats)]
    seconds["restoration"] = [taken for taken, _ in restored]
    whole = [_sequential(model, rotation, tokens, scratch) for _ in range(max(1, repeats // 2))]
    seconds["sequential"] = [run["seconds"] for run in whole]
    about = {
        "tokens": windows.numel(), "layers": restored[0][1],
        "sequential_peak_mb": max(run["peak_mb"] for run in whole), **machine(),
    }  # fmt: skip
    return [
        {"model": model.name, "stage": name, **summary("time", taken), "repeats": len(taken), **about}
        for name, taken in seconds.items()
    ]


def _restoration(model: Path, rotation: Path, cached: Path) -> tuple[float, int]:
    """Seconds in `restore_together` for all layers of the model, and how many these are."""
    recipe = Recipe.parse({"method": "obr_gptq", "calibration": "given"})
    blocks = apply.open_blocks(model, rotation, device="cpu")
    seconds, layers = 0.0, 0
    for index in range(len(blocks)):
        block, matrices = blocks.load(index), collect_hessians.load(cached / block_file(index))
        for group, names in blocks.layout.groups.items():
            weights = {name: block.get_submodule(name).weight for name in names}
            (taken,), _ = timed(lambda w=weights, m=matrices[group].hessian: restore_together(w, m, recipe), 1)
            seconds, layers = seconds + taken, layers + len(names)
    return seconds, layers


def _sequential(model: Path, rotation: Path, tokens: Path, scratch: Path) -> dict[str, float]:
    out = scratch / "sequential"
    entry = {"method": "obr_gptq", "calibration": "given", "rotation": "quarot", "hessian": "sequential"}
    found = run_stage(
        "compress", "--recipe", entry, "--model", model, "--rotation", rotation, "--tokens", tokens, "--out", out,
        "--threads", machine()["threads"],
    )  # fmt: skip
    shutil.rmtree(out)
    return found
