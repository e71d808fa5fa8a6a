"""OSTQuant's other start (arXiv 2501.13987): rotations along the principal axes of the weights that take them.

The Karhunen-Loève transform of rows: U of their covariance U Λ Uᵀ. A random Hadamard matrix H after it spreads each
axis over all channels, so the start is U H.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from obr.models.blocks import Blocks
from obr.rotations.ostquant import OSTQuant


@torch.no_grad()
def turn(rotation: OSTQuant, blocks: Blocks) -> None:
    """Put U before the rotation's R_res (d, d) and before every head's R_ov (k, m, m), in place.

    blocks: of the plain model; one is in memory at a time. R_res: U of the rows of all q, k, v, up and gate, of every
    expert too, norm gains in them. R_ov of a block: U of o_proj's rows, cut to the m columns of each of the query
    heads that share a KV head; latent attention has none.
    """
    parameters = rotation.parameters
    parameters["R_res"] = principal_axes(_readers(blocks)) @ parameters["R_res"].double()
    for index in range(0 if blocks.dimensions.latent else len(blocks)):
        parameters[f"blocks.{index}.R_ov"] = _head_axes(blocks, index) @ parameters[f"blocks.{index}.R_ov"].double()


def _head_axes(blocks: Blocks, index: int) -> Tensor:
    """(k, m, m) of the heads of a block."""
    dimensions = blocks.dimensions
    weight = blocks.load(index).get_submodule(blocks.layout.roles["o"]).weight  # (d, h m)
    heads = weight.unflatten(1, (dimensions.kv_heads, -1, dimensions.head_dim))  # (d, k, g, m)
    return torch.stack([principal_axes([heads[:, head].flatten(0, 1)]) for head in range(dimensions.kv_heads)])


def _readers(blocks: Blocks) -> Iterator[Tensor]:
    """Weights (r, d) of the layers that read the residual stream, with their norms' gains."""
    for index in range(len(blocks)):
        yield from _readers_of(blocks, index)


def _readers_of(blocks: Blocks, index: int) -> Iterator[Tensor]:
    block, layout = blocks.load(index), blocks.layout_at(index)
    for kind, norm in layout.norms.items():
        gain = block.get_submodule(norm).weight + layout.norm_offset
        for path in layout.of_kind(kind):
            yield block.get_submodule(path).weight * gain


def principal_axes(matrices: Iterable[Tensor]) -> Tensor:
    """Eigenvectors (n, n), float64, as columns, of the covariance of the rows of all matrices (r, n) together."""
    count, total, gram = 0, 0.0, 0.0
    for matrix in matrices:
        rows = matrix.double()
        count, total, gram = count + len(rows), total + rows.sum(0), gram + rows.T @ rows
    mean = total / count
    return torch.linalg.eigh(gram / count - mean.outer(mean)).eigenvectors
