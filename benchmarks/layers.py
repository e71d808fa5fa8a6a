"""The layers that are timed: real ones of SmolLM2-135M, rotated, and made ones of any size."""

from pathlib import Path

import torch
from torch import Tensor

from obr.calibration import collect_hessians as hessians
from obr.rotations import apply
from obr.runtime.resume import block_file

MODEL, ROTATION, CALIBRATION = "smollm2-135m", "quarot", "sotu"  # as `make demo` names them


def real_layer(results: Path, block: int, name: str, group: str) -> tuple[Tensor, Tensor]:
    """A weight (r, n) of the demo's model and the Hessian (n, n) of its inputs that the demo cached."""
    blocks = apply.open_blocks(
        results / "models" / MODEL, results / "rotations" / ROTATION / f"{MODEL}.safetensors", device="cpu"
    )
    cached = hessians.load(results / "hessians" / MODEL / ROTATION / CALIBRATION / block_file(block))
    return blocks.load(block).get_submodule(name).weight.detach(), cached[group].hessian


def made_layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random weight (r, n) and a Hessian (n, n) with eigenvalues 1/i in a random basis, as real ones fall off."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator))
    matrix = (basis / torch.arange(1, columns + 1)) @ basis.T
    return torch.randn(rows, columns, generator=generator) / columns**0.5, (matrix + matrix.T) * columns
