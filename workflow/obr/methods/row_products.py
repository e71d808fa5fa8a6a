"""Products of a layer's rows with a matrix, in which no row's result depends on the rows beside it.

A BLAS library chooses its kernel by the shape of a product, and kernels differ in the last bits. Here every product
has the same number of rows: a layer is cut into parts of that many, and the last part is filled up with zeros. In
products of one shape a row's result depends on neither its place nor the other rows; tests check that.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows of a part, by device: few enough that the solver's nine arrays of a part stay in a CPU's cache, enough that
# products are fast. Divides the row counts of common models: 576, 960, 3072.
PART = {"cpu": 192, "cuda": 2048}


def parts(rows: int, device: torch.device) -> Iterator[slice]:
    """Consecutive slices of PART rows; the last may reach beyond `rows`."""
    size = PART[device.type]
    return (slice(first, first + size) for first in range(0, rows, size))


def whole(count: int, device: torch.device) -> int:
    """`count` rows rounded up to whole parts."""
    size = PART[device.type]
    return -(-count // size) * size


def filled(rows: Tensor, value: float = 0) -> Tensor:
    """`rows (r, n)` with further rows of `value`, up to whole parts; `rows` itself if it has that many."""
    missing = whole(len(rows), rows.device) - len(rows)
    return torch.cat([rows, rows.new_full((missing, rows.shape[1]), value)]) if missing else rows


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows (r, n) @ matrix (n, m)`, (r, m), part by part."""
    out = rows.new_empty(len(rows), matrix.shape[1])
    for part in parts(len(rows), rows.device):
        given = rows[part]
        out[part] = (filled(given) @ matrix)[: len(given)]
    return out
