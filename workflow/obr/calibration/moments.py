"""Second moments of what layers read: summed sequence by sequence, on and above the diagonal."""

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 1024  # columns of the tiles in which symmetric matrices are summed and mirrored
ROWS = 64  # tokens whose squares are summed at a time: they stay in the processor's cache


@dataclass
class Moments:
    """Second moments of the inputs of a group of layers: hessian (n, n), and harmonic (n,), None if not known.

    tokens: those that the router sends to the expert that the layers are of; None for other layers.
    """

    hessian: Tensor
    harmonic: Tensor | None = None
    tokens: int | None = None


@dataclass
class GroupStatistics:
    """Of a group's inputs: their moments, how the dense model's differ, `2/S Σ (X - X̂)ᵀ X̂` (n, n), what the residual
    stream lacks, `2/S Σ (R - R̂)ᵀ X̂` (r, n), and the same of held-out windows."""

    moments: Moments
    drift: Tensor | None = None
    lacking: Tensor | None = None
    held_out: "GroupStatistics | None" = None


class Accumulator:
    """Sums the second moments of a layer's inputs (…, n), called with each of S sequences in their order.

    weights: (S, t) how much each token counts in the Hessian; None for alike. Harmonic norms count all alike.
    """

    def __init__(self, columns: int, sequences: int, device: torch.device, weights: Tensor | None = None):
        self.upper = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.harmonic = torch.zeros(columns, dtype=torch.float32, device=device)
        self.factor, self.seen, self.weights = 2 / sequences, 0, weights

    def __call__(self, x: Tensor) -> None:
        """Add one sequence's inputs x (..., n), tile by tile on and above the diagonal."""
        self.add(x.reshape(-1, x.shape[-1]).float())

    def add(self, x: Tensor) -> None:
        """The same for inputs (t, n) in float32."""
        counted = x if self.weights is None else x * self.weights[self.seen].sqrt()[:, None]
        for start in range(0, x.shape[1], TILE):
            rows = slice(start, start + TILE)
            self.upper[rows, start:].addmm_(counted[:, rows].T, counted[:, start:], alpha=self.factor)
        self.seen += 1
        for part in x.split(ROWS):
            self.harmonic += part.square().sum(0) / self.seen

    def moments(self) -> Moments:
        """The sums so far; those of all S sequences are the Hessian 2/S Σ XᵀX and the harmonic norms."""
        return Moments(mirror(self.upper), self.harmonic)


class Captured(Exception):
    """Ends a block's forward pass once the wanted inputs are in."""


def mirror(matrix: Tensor) -> Tensor:
    """Copy what is above the diagonal of (n, n) below it, in place."""
    for start in range(0, len(matrix), TILE):
        stop = min(start + TILE, len(matrix))
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    return matrix
