"""Sensitivity: how much loss each linear layer is predicted to cost at each of several options of bits and zeros.

Of a layer's weights W and what an option makes of them, Ŵ, with D = W - Ŵ: half of Σ_r G_r D_r A D_rᵀ nats a token,
G_r the mean square of the output's gradient (`gradients`), A the mean of x xᵀ over tokens, from a cached Hessian.
One pass over the Hessians of the dense model; layers are taken one by one, as if all the others stayed dense.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from obr import gradients, hessian
from obr.errors import ObrError
from obr.files import read_json, write_json
from obr.model import Blocks, block_file
from obr.progress import Progress
from obr.provenance import fingerprint
from obr.recipe import Option, Recipe
from obr.restoration import Hessian, restore_together
from obr.resume import Unfinished


@torch.no_grad()
def predicted_losses(
    blocks: Blocks,
    hessians: Iterable[tuple[int, dict[str, Tensor]]],
    slopes: dict[str, Tensor],
    options: tuple[Option, ...],
    seqlen: int,
) -> Iterator[tuple[int, list[dict]]]:
    """Yields (block, its layers), each layer {"block", "layer", "rows", "columns", "losses", "relative_errors"}.

    Masks and codes are found as by recipes with their other settings left at the defaults, joint without annealing.

    Args:
        blocks: of the dense model, rotated as it is to be. hessians: (index, {group: (n, n)}), see `dense_hessians`.
        slopes: G of every layer, not normalised, see `squared_gradients`.
        seqlen: tokens of a calibration window, which the Hessians sum up.

    Raises:
        ObrError: a layer has no gradients, or cannot be restored.
    """
    for index, matrices in hessians:
        block, layers = blocks.load(index), []
        for group, names in blocks.layout.groups.items():
            weights = {f"{index}.{name}": block.get_submodule(name).weight for name in names}
            if lacking := [name for name in weights if name not in slopes]:
                raise ObrError(f"Layer {lacking[0]} has no output gradients; they are of another model.")
            factors = Hessian(matrices.pop(group), name=f"block {index} {group}")
            measured = [_measured(weights, factors, slopes, option, seqlen) for option in options]
            for name, weight in weights.items():
                layer = {"block": index, "layer": name.partition(".")[2]}
                layer |= {"rows": weight.shape[0], "columns": weight.shape[1]}
                layer["losses"] = [losses[name][0] for losses in measured]
                layer["relative_errors"] = [losses[name][1] for losses in measured]
                layers.append(layer)
        yield index, layers


def _measured(
    weights: dict[str, Tensor], factors: Hessian, slopes: dict[str, Tensor], option: Option, seqlen: int
) -> dict[str, tuple[float, float]]:
    """{layer: (predicted loss, relative error)} of the layers of a group."""
    restored = restore_together(
        weights, factors, option.method,
        bits=option.bits, sparsity=option.sparsity, pattern=option.pattern, sweeps=0,
    )  # fmt: skip
    found = {}
    for name, weight in weights.items():
        change = weight.float() - restored[name].weight
        losses = ((change @ factors.matrix) * change).sum(1)  # H is 2 seqlen A
        found[name] = (float(losses @ slopes[name].to(losses)) / (4 * seqlen), restored[name].relative_error)
    return found


def sensitivity(
    model: Path,
    rotation: Path | None,
    hessians: Path,
    gradient_file: Path,
    options: tuple[Option, ...],
    out: Path,
    chosen: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> dict:
    """The stage: write `losses.json` into the folder `out`, returned too.

    An interrupted run goes on with the block it was at.

    Args:
        rotation: the rotation's file, None for none. hessians: folder of cached Hessians.
        gradient_file: of the stage gradients. chosen: the blocks to be measured, as in a recipe; None for all.

    Raises:
        ObrError: files of different models, or blocks of an unfinished run with other inputs or settings.
    """
    slopes, notes = gradients.load(gradient_file, device or "cpu")
    about = read_json(hessians / "hessian.json")["calibration"]
    blocks = hessian.open_blocks(model, rotation, dtype, device)
    slopes = {name: values.to(blocks.target) for name, values in slopes.items()}
    files = {"rotation": rotation, "hessians": hessians / "hessian.json", "gradients": gradient_file}
    run = fingerprint(
        "sensitivity", model, files,
        device=str(blocks.target), dtype=str(blocks.dtype), chosen=chosen,
        options=[asdict(option) for option in options],
    )  # fmt: skip
    unfinished = Unfinished(out, run)
    measured = Recipe("dense", blocks=chosen).chosen(len(blocks))
    missing = [index for index in measured if unfinished.note(index) is None]
    cached = ((index, hessian.load(hessians / block_file(index), blocks.target)) for index in missing)
    with Progress("sensitivity", len(measured)) as shown:
        for _ in range(len(measured) - len(missing)):
            shown.resume()
        for index, layers in predicted_losses(blocks, cached, slopes, options, about["seqlen"]):
            unfinished.keep(index, lambda _: None, {"layers": layers})  # the note is all there is to keep
            shown.block()
    layers = [layer for index in measured for layer in unfinished.note(index)["layers"]]
    told = {
        "options": [asdict(option) for option in options], "blocks": len(blocks), "layers": layers,
        "calibration": about, "gradients": notes, "device": str(blocks.target),
    }  # fmt: skip
    write_json(told, out / "losses.json")
    unfinished.remove()
    return told
