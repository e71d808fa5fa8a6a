"""OSTQuant's other start (arXiv 2501.13987): rotations along the principal axes of the weights that take them.

The Karhunen-Loève transform of rows: U of their covariance U Λ Uᵀ. A random Hadamard matrix H after it spreads each
axis over all channels, so the start is U H.
"""

import torch
from torch import Tensor

from obr.models.architectures import Layout
from obr.rotations.ostquant import OSTQuant


@torch.no_grad()
def turn(rotation: OSTQuant, blocks: list[dict[str, Tensor]], layout: Layout) -> None:
    """Put U before the rotation's R_res (d, d) and before every head's R_ov (k, m, m), in place.

    blocks: parameters of each block, by name. R_res: U of the rows of all q, k, v, up and gate, norm gains in them.
    R_ov of a block: U of o_proj's rows, cut to the m columns of each of the query heads that share a KV head.
    """
    dimensions, parameters = rotation.dimensions, rotation.parameters
    parameters["R_res"] = principal_axes(_readers(blocks, layout)) @ parameters["R_res"].double()
    for index, block in enumerate(blocks):
        weight = block[f"{layout.roles['o']}.weight"]  # (d, h m)
        heads = weight.unflatten(1, (dimensions.kv_heads, -1, dimensions.head_dim))  # (d, k, g, m)
        axes = [principal_axes([heads[:, head].flatten(0, 1)]) for head in range(dimensions.kv_heads)]
        parameters[f"blocks.{index}.R_ov"] = torch.stack(axes) @ parameters[f"blocks.{index}.R_ov"].double()


def _readers(blocks: list[dict[str, Tensor]], layout: Layout):
    """Weights (r, d) of the layers that read the residual stream, with their norms' gains."""
    for block in blocks:
        for group, norm in layout.norms.items():
            gain = block[f"{norm}.weight"] + layout.norm_offset
            for path in layout.groups[group]:
                yield block[f"{path}.weight"] * gain


def principal_axes(matrices) -> Tensor:
    """Eigenvectors (n, n), float64, as columns, of the covariance of the rows of all matrices (r, n) together."""
    count, total, gram = 0, 0.0, 0.0
    for matrix in matrices:
        rows = matrix.double()
        count, total, gram = count + len(rows), total + rows.sum(0), gram + rows.T @ rows
    mean = total / count
    return torch.linalg.eigh(gram / count - mean.outer(mean)).eigenvectors
