"""How the time grows: of the solver with a layer's rows and columns, of a Hessian with the calibration's tokens."""

import torch

from layers import made_layer
from obr.calibration.collect_hessians import Accumulator
from restoration import solver
from timing import machine, summary, timed

METHOD = "obr_gptq"
SEQUENCE = 512  # tokens a window, each of which enters the Hessian at once


@torch.no_grad()
def measure(rows: list[int], columns: list[int], tokens: list[int], repeats: int) -> list[dict]:
    """One row for each size: the solver at a middle width, at a middle height, and a Hessian of a middle width."""
    middle_rows, middle_columns = rows[len(rows) // 2], columns[len(columns) // 2]
    weight, matrix = made_layer(max(rows), middle_columns)
    measured = [
        _row("rows", count, middle_columns, _solved(weight[:count], matrix, repeats), count) for count in rows
    ]
    for count in columns:
        measured.append(_row("columns", middle_rows, count, _solved(*made_layer(middle_rows, count), repeats), count))
    for count in tokens:
        measured.append(_row("tokens", 0, middle_columns, _accumulated(count, middle_columns, repeats), count))
    return measured


def _row(varied: str, rows: int, columns: int, seconds: list[float], size: int) -> dict:
    of = "Hessian" if varied == "tokens" else METHOD
    return {
        "varied": varied, "of": of, "size": size, "rows": rows, "columns": columns, **summary("time", seconds),
        **machine(),
    }  # fmt: skip


def _solved(weight: torch.Tensor, matrix: torch.Tensor, repeats: int) -> list[float]:
    return timed(solver(weight, matrix, METHOD)[0], repeats)[0]


def _accumulated(tokens: int, columns: int, repeats: int) -> list[float]:
    windows = torch.randn(tokens // SEQUENCE, SEQUENCE, columns, generator=torch.Generator().manual_seed(0))

    def accumulate() -> torch.Tensor:
        accumulator = Accumulator(columns, len(windows), windows.device)
        for window in windows:
            accumulator(window)
        return accumulator.moments().hessian

    accumulate()
    return timed(accumulate, repeats)[0]
