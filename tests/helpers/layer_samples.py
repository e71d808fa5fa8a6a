"""Layers to compress: random ones, and real ones with what the published implementation makes of them."""

from pathlib import Path

import numpy as np
import torch


def layer(rows: int, columns: int, seed: int = 0, tokens: int | None = None):
    """A random layer (r, n) whose inputs are correlated, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens or 4 * columns, columns, generator=generator) @ (mixing + 0.3)
    return torch.randn(rows, columns, generator=generator), x.T @ x


def golden(path: Path):
    data = np.load(path)
    upper = torch.tensor(data["hessian"])  # the whole matrix, or its upper triangle
    weight, hessian = torch.tensor(data["weight"]), upper.triu() + upper.triu(1).T
    errors = dict(zip(data["relative_error_of"].tolist(), data["relative_error"].tolist(), strict=True))
    return data, weight, hessian, errors
