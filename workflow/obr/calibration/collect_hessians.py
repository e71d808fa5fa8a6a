"""Hessians of a model's layer inputs: collected block by block, cached as one triangle each.

H = 2/S Σ_s X_sᵀ X_s over S calibration sequences, X_s (t, n) the inputs of one sequence, tokens summed;
collected behind online transforms and in front of activation quantisers. The sums are in float32; the inputs are in
the dtype of the computation. Beside H the harmonic norms of the inputs' columns, Σ_s ‖X_s[:, j]‖² / s with s from 1,
for the mask "wanda_harmonic".
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from obr.calibration.expert_inputs import ExpertInputs, is_of_expert
from obr.calibration.moments import Accumulator, Captured, Moments, mirror
from obr.data import token_windows
from obr.errors import BROKEN_FILE, ObrError, first_line
from obr.models import dtypes
from obr.models.architectures import Layout
from obr.models.blocks import Blocks, run_block, run_in_place
from obr.models.hidden_states import HiddenStates, MemoryBudget
from obr.rotations.apply import open_blocks
from obr.runtime.files import atomic_write, write_json
from obr.runtime.progress import Progress
from obr.runtime.provenance import fingerprint, model_hashes
from obr.runtime.resume import Unfinished


def collect(
    block: nn.Module,
    layout: Layout,
    hidden: HiddenStates,
    arguments: dict,
    groups: list[str],
    whole: bool,
    weights: dict[str, Tensor] | None = None,
) -> dict[str, Moments]:
    """{group: moments of its inputs} of some groups of a block.

    Seven parameters: a block with what it is called with, and which moments are wanted.

    hidden: b inputs (1, s, d). groups: keys of `layout.groups`. whole: run every pass to its end and replace
    the inputs by the block's outputs; otherwise each stops where the last group's inputs are known.
    weights: {group: (b, s)} how much each token counts; None for alike.
    """
    observed, accumulators = {}, {}
    for group in groups:
        linear = block.get_submodule(layout.groups[group][0])  # the others of a group read the same input
        own = weights[group] if weights else None
        accumulators[group] = Accumulator(linear.weight.shape[1], len(hidden), linear.weight.device, own)
        observed[group] = linear
        linear.observer = accumulators[group]
    if not whole:
        observed[groups[-1]].observer = _then_stop(accumulators[groups[-1]])
    try:
        if whole:
            run_in_place(block, hidden, arguments)
        else:
            for states in hidden:
                with suppress(Captured):
                    run_block(block, states, arguments)
    finally:
        for linear in observed.values():
            linear.observer = None
    return {group: accumulator.moments() for group, accumulator in accumulators.items()}


def inputs_of(block: nn.Module, name: str, states: Tensor, arguments: dict) -> Tensor:
    """(t, n) float32: what the layer `name` of a block reads, behind its online transform, for states (1, s, d)."""
    return inputs_of_each(block, [name], states, arguments)[0]


def inputs_of_each(block: nn.Module, names: list[str], states: Tensor, arguments: dict) -> list[Tensor]:
    """`inputs_of` several layers, in the order in which the block runs them, from one pass that ends at the last."""
    linears, found = [block.get_submodule(name) for name in names], []
    for linear in linears:
        linear.observer = found.append
    linears[-1].observer = _then_stop(found.append)
    try:
        with suppress(Captured):
            run_block(block, states, arguments)
    finally:
        for linear in linears:
            linear.observer = None
    return [x.reshape(-1, x.shape[-1]).float() for x in found]


def _then_stop(take: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def observe(x: Tensor) -> None:
        take(x)
        raise Captured

    return observe


@torch.no_grad()
def dense_hessians(
    blocks: Blocks, tokens: Tensor, room: MemoryBudget | None = None, finished: int = 0, progress: bool = True
) -> Iterator[tuple[int, dict[str, Moments]]]:
    """Yields (index, {group: moments of its inputs}) for the blocks of an uncompressed model, in turn.

    tokens: (b, s). room: for the hidden states. finished: so many blocks are not asked for; the hidden states
    are passed through them again, which costs little beside a Hessian and needs nothing kept on the disk.
    """
    if finished == len(blocks):
        return
    room, last = room or MemoryBudget(), len(blocks) - 1
    if blocks.layout.experts:  # beside what enters a block, what enters its experts, twice
        room = replace(room, megabytes=room.megabytes / 3)
    hidden, arguments = blocks.embed(tokens, room)
    with Progress("Hessians", len(blocks), progress) as shown:
        for index in range(len(blocks)):
            block = blocks.load(index)
            if index < finished:
                run_in_place(block, hidden, arguments[index])
                shown.resume()
            else:
                layout, found = blocks.layout_at(index), {}
                if layout.experts:
                    inputs = ExpertInputs(block, layout, hidden, arguments[index], room)
                    found = {group: inputs.collect(group) for group in layout.groups if is_of_expert(group)}
                groups = [group for group in layout.groups if group not in found]
                found |= collect(block, layout, hidden, arguments[index], groups, whole=index < last)
                yield index, found
                shown.block()
            block = None  # before the next is loaded


def hessian_stage(
    model: Path,
    rotation: Path | None,
    tokens: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    megabytes: float = MemoryBudget.megabytes,
) -> None:
    """The stage: write `block_NNN.safetensors` for every block, and `hessian.json` when all are there.

    One parameter per flag of `obr hessian`.

    An interrupted run goes on with the block it was at. megabytes: of memory for hidden states, see `MemoryBudget`.

    Raises:
        ObrError: blocks of an unfinished run with other inputs or settings are there; activations are not finite.
    """
    windows, about = token_windows.load_tokens(tokens)
    blocks = open_blocks(model, rotation, dtype, device)
    files = {"rotation": rotation, "calibration": tokens}
    run = fingerprint(
        "calibration.collect_hessians", model, files, device=str(blocks.target), dtype=str(blocks.dtype)
    )
    unfinished = Unfinished(out, run)
    finished = unfinished.finished(len(blocks))
    for index, moments in dense_hessians(blocks, windows, MemoryBudget(megabytes, unfinished.folder), finished):
        _check_finite(index, moments)
        unfinished.keep(index, partial(save, moments), {})
        moments.clear()  # before the next block's are made
    (out / "hessian.json").unlink(missing_ok=True)  # of older ones, which go now
    unfinished.move(len(blocks))
    notes = {
        "calibration": about, "blocks": len(blocks), "dtype": dtypes.name_of(blocks.dtype),
        "model": model_hashes(model), "rotation": run["rotation"],
    }  # fmt: skip
    write_json(notes, out / "hessian.json")
    unfinished.remove()


def _check_finite(index: int, moments: dict[str, Moments]) -> None:
    """Raise ObrError at the first block whose inputs are not finite; those of all later ones are not, either."""
    for group, found in moments.items():
        if not found.hessian.isfinite().all():
            raise ObrError(
                f"block {index} {group}: the Hessian has NaN or infinite values; check the model's weights, or "
                "compute in float32 or bfloat16, since half precision overflows on some models."
            )


def save(moments: dict[str, Moments], path: Path) -> None:
    """Write one block's moments in float32: the upper triangle of each Hessian, and `{group}.harmonic` (n,)."""
    tensors = {
        group: found.hessian.masked_select(_triangle(len(found.hessian), found.hessian.device)).cpu()
        for group, found in moments.items()
    }
    for group, found in moments.items():
        if found.harmonic is not None:
            tensors[_harmonic(group)] = found.harmonic.cpu()
    with atomic_write(path) as partial:
        sizes = {group: len(found.hessian) for group, found in moments.items()}
        tokens = {group: found.tokens for group, found in moments.items() if found.tokens is not None}
        routed = {"tokens": json.dumps(tokens)} if tokens else {}
        save_file(tensors, partial, metadata={"sizes": json.dumps(sizes)} | routed)


def _harmonic(group: str) -> str:
    """Name of a group's harmonic norms in a file."""
    return f"{group}.harmonic"


def load(
    path: Path, device: torch.device | str = "cpu", groups: Iterable[str] | None = None, harmonic: bool = False
) -> dict[str, Moments]:
    """{group: moments} of one block, or of some groups of it.

    harmonic: whether the harmonic norms are needed, which files of earlier versions lack. Raises ObrError if the file
    is missing or broken, or lacks what is needed.
    """
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            sizes, names = json.loads(file.metadata()["sizes"]), set(file.keys())
            tokens = json.loads(file.metadata().get("tokens", "{}"))
            for group in groups or sizes:
                n, norms = sizes[group], _harmonic(group)
                triangle = _read(file, group, n * (n + 1) // 2, device)
                norms = _read(file, norms, n, device) if norms in names else None
                found[group] = Moments(triangle, norms, tokens.get(group))
    except BROKEN_FILE as error:
        why = first_line(error)
        raise ObrError(f"{path} is not a whole Hessian file ({why}); delete and rebuild it.") from error
    for group, moments in found.items():
        if harmonic and moments.harmonic is None:
            raise ObrError(
                f"{path} has no harmonic norms, which mask wanda_harmonic needs; delete its folder and run the stage "
                "hessian again, or use mask wanda."
            )
        moments.hessian = _symmetric(moments.hessian, sizes[group])
    return found


def _read(file, name: str, length: int, device: torch.device | str) -> Tensor:
    """A tensor (length,) of floats. Raises ValueError for any other."""
    tensor = file.get_tensor(name).to(device)
    if tensor.shape != (length,) or not tensor.is_floating_point():
        raise ValueError(f"{name} has not the shape ({length},)")
    return tensor


def _triangle(n: int, device: torch.device | str) -> Tensor:
    """Mask (n, n) of the upper triangle; a mask, since indices would take eight times the matrix."""
    return torch.ones(n, n, dtype=torch.bool, device=device).triu_()


def _symmetric(triangle: Tensor, n: int) -> Tensor:
    matrix = torch.zeros(n, n, dtype=triangle.dtype, device=triangle.device)
    return mirror(matrix.masked_scatter_(_triangle(n, triangle.device), triangle))
