"""Sensitivity: how much loss each linear layer is predicted to cost at each of several options of bits and zeros.

Of a layer's weights W and what an option makes of them, Ŵ, with D = W - Ŵ: half of Σ_r G_r D_r A D_rᵀ nats a token,
G_r the mean square of the output's gradient (`gradients`), A the mean of x xᵀ over tokens, from a cached Hessian.
That compares options that prune, and those that do not. The two kinds it misjudges, and layers among themselves: of
keys and values it expects three times what is measured, of other layers half as much again. So at one option of
either kind, the references, the loss of each layer is measured (`divergence`), and its losses at the others of the
kind are scaled alike. Layers are taken one by one, as if all the others stayed dense.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from obr.calibration import collect_hessians, output_gradients
from obr.config.recipe import Option, Recipe
from obr.data import token_windows
from obr.errors import ObrError
from obr.methods.layer_hessian import Hessian
from obr.methods.restore import restore_together
from obr.mixed_precision.divergence import divergences, measurement_windows
from obr.models import dtypes
from obr.models.blocks import Blocks
from obr.models.hidden_states import MemoryBudget
from obr.rotations import apply
from obr.runtime.files import atomic_write, read_json, write_json
from obr.runtime.progress import Progress
from obr.runtime.provenance import fingerprint
from obr.runtime.resume import Unfinished, block_file


@torch.no_grad()
def predicted_losses(
    blocks: Blocks,
    hessians: Iterable[tuple[int, dict[str, collect_hessians.Moments]]],
    slopes: dict[str, Tensor],
    options: tuple[Option, ...],
    seqlen: int,
) -> Iterator[tuple[int, list[dict], dict[str, Tensor]]]:
    """Yields (block, its layers, {"5.mlp.up_proj": weight (r, n) at the reference 5}); losses by gradients alone.

    A layer is {"block", "layer", "rows", "columns", "losses", "relative_errors"}.

    Masks and codes are found as by recipes with their other settings left at the defaults, joint without annealing.

    Args:
        blocks: of the dense model, rotated as it is to be. hessians: (index, {group: moments}), see `dense_hessians`.
        slopes: G of every layer, not normalised, see `squared_gradients`.
        seqlen: tokens of a calibration window, which the Hessians sum up.

    Raises:
        ObrError: a layer has no gradients, or cannot be restored.
    """
    if blocks.layout.experts:
        raise ObrError(
            f"Losses of single layers are not measured for {blocks.config.model_type} models, whose experts each see "
            "some of the tokens; leave allocation out of the recipe."
        )
    chosen = references(options)
    for index, matrices in hessians:
        block, layers, weights_then = blocks.load(index), [], {}
        for group, names in blocks.layout.groups.items():
            weights = {f"{index}.{name}": block.get_submodule(name).weight for name in names}
            if lacking := [name for name in weights if name not in slopes]:
                raise ObrError(f"Layer {lacking[0]} has no output gradients; they are of another model.")
            factors = Hessian(matrices.pop(group).hessian, name=f"block {index} {group}")
            measured = []
            for number, option in enumerate(options):
                restored = _restored(weights, factors, option)
                measured.append(_losses(weights, factors, slopes, restored, seqlen))
                if number in chosen:
                    changed = {n.partition(".")[2]: weight for n, (weight, _) in restored.items()}
                    weights_then |= {f"{number}.{name}": weight for name, weight in changed.items()}
            for name, weight in weights.items():
                layer = {"block": index, "layer": name.partition(".")[2]}
                layer |= {"rows": weight.shape[0], "columns": weight.shape[1]}
                layer["losses"] = [losses[name][0] for losses in measured]
                layer["relative_errors"] = [losses[name][1] for losses in measured]
                layers.append(layer)
        yield index, layers, weights_then


def references(options: tuple[Option, ...]) -> list[int]:
    """The options at which losses are measured: of those that do not prune, and of those that do, the middle one."""
    order = sorted(range(len(options)), key=lambda i: options[i].stored_bits(1024, 1024))
    kinds = [[i for i in order if options[i].prunes == prunes] for prunes in (False, True)]
    return [kind[len(kind) // 2] for kind in kinds if kind]


def _at(number: int, weights_of: Callable[[int], dict[str, Tensor] | None], index: int) -> dict[str, Tensor]:
    """Of a block's weights at all references, as `weights_of(index)` has them, those at one: {layer: (r, n)}."""
    named = ((*name.split(".", 1), weight) for name, weight in (weights_of(index) or {}).items())
    return {layer: weight for option, layer, weight in named if option == str(number)}


def _restored(weights: dict[str, Tensor], factors: Hessian, option: Option) -> dict[str, tuple[Tensor, float]]:
    """{layer: (weight, relative error)} of the layers of a group at an option."""
    restored = restore_together(weights, factors, {**asdict(option), "sweeps": 0})
    return {name: (found.weight, found.relative_error) for name, found in restored.items()}


def _losses(
    weights: dict[str, Tensor],
    factors: Hessian,
    slopes: dict[str, Tensor],
    restored: dict[str, tuple[Tensor, float]],
    seqlen: int,
) -> dict[str, tuple[float, float]]:
    """{layer: (predicted loss, relative error)} of the layers of a group."""
    found = {}
    for name, weight in weights.items():
        change = weight.float() - restored[name][0]
        losses = ((change @ factors.matrix) * change).sum(1)  # H is 2 seqlen A
        found[name] = (float(losses @ slopes[name].to(losses)) / (4 * seqlen), restored[name][1])
    return found


def scaled(layers: list[dict], measured: dict[int, dict[str, float]], options: tuple[Option, ...]) -> list[dict]:
    """The layers with losses that are as measured at the references; what was predicted there is in `by_gradients`.

    measured: by reference, {"0.self_attn.q_proj": nats a token …}. Where no loss was predicted, none is expected.

    Raises:
        ObrError: a loss is not finite.
    """
    measured_layers = []
    for layer in layers:
        name, factors = f"{layer['block']}.{layer['layer']}", {}
        for number, found in measured.items():
            predicted = layer["losses"][number]
            if not math.isfinite(found[name] + predicted):
                raise ObrError(f"Layer {name} cost no finite loss at {options[number].label}; use dtype float32.")
            factors[options[number].prunes] = max(found[name], 0.0) / predicted if predicted > 0 else 0.0
        losses = [factors[option.prunes] * loss for option, loss in zip(options, layer["losses"], strict=True)]
        measured_layers.append(
            {**layer, "losses": losses, "by_gradients": [layer["losses"][number] for number in measured]}
        )
    return measured_layers


def measured_losses(
    blocks: Blocks,
    hessians: Iterable[tuple[int, dict[str, collect_hessians.Moments]]],
    slopes: dict[str, Tensor],
    options: tuple[Option, ...],
    tokens: Tensor,
    progress: bool = True,
) -> list[dict]:
    """The layers with their losses, of a model in memory. Arguments as of `predicted_losses`; tokens: (b, s)."""
    layers, weights = [], {}
    for index, own, then in predicted_losses(blocks, hessians, slopes, options, tokens.shape[1]):
        layers += own
        weights[index] = then
    windows, found = measurement_windows(tokens), {}
    for number in references(options):
        found[number] = divergences(blocks, windows, partial(_at, number, weights.get), progress=progress)
    return scaled(layers, found, options)


def measure_sensitivity(
    model: Path,
    rotation: Path | None,
    tokens: Path,
    hessians: Path,
    gradient_file: Path,
    options: tuple[Option, ...],
    out: Path,
    chosen: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    megabytes: float = MemoryBudget.megabytes,
) -> dict:
    """The stage: write `losses.json` into the folder `out`, returned too.

    One parameter per flag of `obr sensitivity`. An interrupted run continues at its block; the divergences, which
    are measured last, start again. Until then copies of the layers at the references lie beside `out`.

    Args:
        rotation: the rotation's file, None for none. tokens: file of calibration windows. hessians: folder of cached
            Hessians. gradient_file: of the stage gradients. chosen: the blocks to be measured, as in a recipe; None
            for all. megabytes: of memory for hidden states, see `MemoryBudget`.

    Raises:
        ObrError: files of different models, or blocks of an unfinished run with other inputs or settings.
    """
    slopes, notes = output_gradients.load(gradient_file, device or "cpu")
    windows, _ = token_windows.load_tokens(tokens)
    about = read_json(hessians / "hessian.json")["calibration"]
    blocks = apply.open_blocks(model, rotation, dtype, device)
    slopes = {name: values.to(blocks.target) for name, values in slopes.items()}
    files = {"rotation": rotation, "calibration": tokens, "hessians": hessians / "hessian.json"}
    run = fingerprint(
        "mixed_precision.sensitivity", model, {**files, "gradients": gradient_file},
        device=str(blocks.target), dtype=str(blocks.dtype), chosen=chosen,
        options=[asdict(option) for option in options],
    )  # fmt: skip
    unfinished = Unfinished(out, run)
    measured = Recipe("dense", blocks=chosen).chosen(len(blocks))
    missing = [index for index in measured if unfinished.note(index) is None]
    cached = ((index, collect_hessians.load(hessians / block_file(index), blocks.target)) for index in missing)
    with Progress("sensitivity", len(measured)) as shown:
        for _ in range(len(measured) - len(missing)):
            shown.resume()
        for index, layers, weights in predicted_losses(blocks, cached, slopes, options, about["seqlen"]):
            unfinished.keep(index, partial(_write, weights, blocks.storage_dtype), {"layers": layers})
            weights.clear()  # before the next block's are made
            shown.block()
    layers = [layer for index in measured for layer in unfinished.note(index)["layers"]]
    windows = measurement_windows(windows)
    found = _divergences(blocks, windows, options, unfinished, measured, megabytes)
    measured_layers = {
        "options": [asdict(option) for option in options], "blocks": len(blocks),
        "layers": scaled(layers, found, options), "calibration": about, "gradients": notes,
        "references": list(found), "tokens": windows.numel(), "device": str(blocks.target),
        "dtype": dtypes.name_of(blocks.dtype),
    }  # fmt: skip
    write_json(measured_layers, out / "losses.json")
    unfinished.remove()
    return measured_layers


def _divergences(
    blocks: Blocks,
    windows: Tensor,
    options: tuple[Option, ...],
    unfinished: Unfinished,
    measured: range,
    megabytes: float,
) -> dict[int, dict[str, float]]:
    """{reference: {layer: divergence}}, with the layers' weights at the references as they lie beside the result."""
    room, found = MemoryBudget(megabytes, unfinished.folder), {}
    for number in references(options):
        weights_of = partial(_at, number, lambda i: load_file(unfinished.file(i)) if i in measured else None)
        found[number] = divergences(blocks, windows, weights_of, room)
    return found


def _write(weights: dict[str, Tensor], dtype: torch.dtype, path: Path) -> None:
    with atomic_write(path) as partial_file:
        save_file({name: weight.to("cpu", dtype).contiguous() for name, weight in weights.items()}, partial_file)
