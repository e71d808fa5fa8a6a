"""Hessians of a model's layer inputs: collected block by block, cached as one triangle each.

H = 2/S Σ_s X_sᵀ X_s over S calibration sequences, X_s (t, n) the inputs of one sequence, tokens summed;
collected behind online transforms and in front of activation quantisers, in float32.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from obr import data, rotations
from obr.errors import BROKEN_FILE, ObrError
from obr.files import whole, write_json
from obr.layout import Layout
from obr.model import Blocks, StreamedBlocks, block_file, run_block


class Accumulator:
    """Sums 2/S XᵀX of a layer's inputs; `matrix` (n, n) is the Hessian once all S sequences were seen."""

    def __init__(self, columns: int, sequences: int, device: torch.device):
        self.matrix = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.factor = 2 / sequences

    def __call__(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        self.matrix.addmm_(x.T, x, alpha=self.factor)


class _Captured(Exception):
    """Ends a block's forward pass once the wanted inputs are in."""


def collect(
    block: nn.Module, layout: Layout, hidden: list[Tensor], arguments: dict, groups: list[str], whole: bool
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Hessians of some groups of a block, and its outputs if the pass is run as a whole.

    hidden: b inputs (1, s, d). groups: keys of `layout.groups`. whole: run every pass to its end and return
    the outputs; otherwise each stops where the last group's inputs are known, and the list is empty.
    """
    observed, accumulators = {}, {}
    for group in groups:
        linear = block.get_submodule(layout.groups[group][0])  # the others of a group read the same input
        accumulators[group] = Accumulator(linear.weight.shape[1], len(hidden), linear.weight.device)
        observed[group] = linear
        linear.observer = accumulators[group]
    if not whole:
        observed[groups[-1]].observer = _then_stop(accumulators[groups[-1]])
    try:
        outputs = list(_passes(block, hidden, arguments))
    finally:
        for linear in observed.values():
            linear.observer = None
    return {group: accumulator.matrix for group, accumulator in accumulators.items()}, outputs


def _then_stop(accumulator: Accumulator) -> Callable[[Tensor], None]:
    def observe(x: Tensor) -> None:
        accumulator(x)
        raise _Captured

    return observe


def _passes(block: nn.Module, hidden: list[Tensor], arguments: dict):
    for x in hidden:
        try:
            yield from run_block(block, [x], arguments)
        except _Captured:
            continue


@torch.no_grad()
def dense_hessians(blocks: Blocks, tokens: Tensor, progress: bool = True):
    """Yields {group: (n, n)} for each block of an uncompressed model. tokens: (b, s)."""
    hidden, arguments = blocks.embed(tokens)
    for index in tqdm(range(len(blocks)), desc="Hessians", unit="block", disable=not progress):
        block = blocks.load(index)
        groups = list(blocks.layout.groups)
        hessians, hidden = collect(block, blocks.layout, hidden, arguments[index], groups, whole=True)
        yield hessians


def hessian(model: Path, rotation: Path | None, tokens: Path, out: Path, dtype=None, device=None) -> None:
    """The stage: write `block_NNN.safetensors` for every block, and `hessian.json` when all are there."""
    windows, about = data.load_tokens(tokens)
    blocks = open_blocks(model, rotation, dtype, device)
    out.mkdir(parents=True, exist_ok=True)
    for index, matrices in enumerate(dense_hessians(blocks, windows)):
        save(matrices, out / block_file(index))
    write_json({"calibration": about, "blocks": len(blocks)}, out / "hessian.json")


def open_blocks(model: Path, rotation: Path | None, dtype=None, device=None) -> StreamedBlocks:
    """A downloaded model, rotated by the file `rotation` unless it is None."""
    from transformers import AutoConfig

    from obr.layout import Dimensions

    loaded = rotations.load(rotation, Dimensions.of(AutoConfig.from_pretrained(model))) if rotation else None
    return StreamedBlocks(model, loaded, dtype, device)


def save(matrices: dict[str, Tensor], path: Path) -> None:
    """Write the upper triangles of symmetric matrices, float32."""
    tensors = {
        name: matrix.masked_select(_triangle(len(matrix), matrix.device)).cpu() for name, matrix in matrices.items()
    }
    with whole(path) as partial:
        save_file(tensors, partial, metadata={"sizes": json.dumps({k: len(m) for k, m in matrices.items()})})


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """{group: (n, n)} of one block. Raises ObrError if the file is missing or broken."""
    try:
        with safe_open(path, framework="pt") as file:
            sizes = json.loads(file.metadata()["sizes"])
            triangles = {name: file.get_tensor(name).to(device) for name in sizes}
    except BROKEN_FILE as error:
        raise ObrError(f"{path} is not a whole Hessian file ({error}); delete and rebuild it.") from error
    return {name: _symmetric(triangle, sizes[name]) for name, triangle in triangles.items()}


def _triangle(n: int, device: torch.device | str) -> Tensor:
    """Mask (n, n) of the upper triangle; a mask, since indices would take eight times the matrix."""
    return torch.ones(n, n, dtype=torch.bool, device=device).triu_()


def _symmetric(triangle: Tensor, n: int) -> Tensor:
    matrix = torch.zeros(n, n, dtype=triangle.dtype, device=triangle.device)
    matrix.masked_scatter_(_triangle(n, triangle.device), triangle)
    return matrix + matrix.triu(1).T
