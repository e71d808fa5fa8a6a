"""The solver of whole layers against the published loop over rows, in one run.

Timed on both sides: from the undamped Hessian, the weight, the mask and the grid to the compressed weight. That holds
damping and all factorisations, and leaves out the choice of mask and grid and the evaluation of the error, which are
the same work for both. Calls alternate; the loop over rows of a layer for which it would take too long is timed on
evenly spaced rows and scaled, while what it does once a layer (factors, GPTQ's sweep) is timed in full.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import published_loop
from layers import made_layer, real_layer
from obr.errors import ObrError
from obr.methods.grid import Grid
from obr.methods.layer import Layer
from obr.methods.layer_hessian import Hessian
from obr.methods.registry import FUNCTIONS
from obr.methods.restore import recipe_of_layers, restore
from timing import alternately, machine, median, summary, timed

TIMED = ("obr_gptq", "obr_rtn")
LOOP_ROWS = 32  # timed of a layer whose loop takes too long as a whole
LONG_LOOP = 4e12  # r n³, above which it does
# By how much the two errors may differ: a ratio of times means nothing if the results are not the same. Weights half
# way between two values are rounded up by one side and down by the other, which alone makes up to 7e-4.
EQUAL = 1e-3


def measure(results: Path | None, repeats: int, large: int, threads: tuple[int, ...]) -> list[dict]:
    """One row for each layer, method and number of threads.

    results: of `make demo`, for the real layers; None leaves them out. large: width of the made layer.
    """
    layers = {"made, spectrum 1/i": lambda: made_layer(large, large)}
    if results is not None:
        layers = {
            "down_proj": lambda: real_layer(results, 15, "mlp.down_proj", "down"),
            "up_proj": lambda: real_layer(results, 15, "mlp.up_proj", "up_gate"),
            **layers,
        }
    rows, before = [], torch.get_num_threads()
    for name, load in layers.items():
        weight, matrix = load()
        for count in threads:
            torch.set_num_threads(count)
            rows += [{"layer": name, **compare(weight, matrix, method, repeats)} for method in TIMED]
    torch.set_num_threads(before)
    return rows


def solver(weight: Tensor, matrix: Tensor, method: str) -> tuple[Callable[[], Tensor], Tensor, Tensor]:
    """The library's call that is timed, and the mask (r, n) and scale (r, 1) it is given."""
    first, recipe = restore(weight, matrix, method), recipe_of_layers({"method": method})  # also warms up

    def solve() -> Tensor:
        layer = Layer(
            weight.clone(), Hessian(matrix), first.mask.clone(), Grid(first.scale, 4), recipe, (len(weight),)
        )
        return FUNCTIONS[method](layer).weight

    return solve, first.mask, first.scale


@torch.no_grad()
def compare(weight: Tensor, matrix: Tensor, method: str, repeats: int) -> dict:
    """Medians and spread of both sides, and how far their results' errors are apart."""
    rows, columns = weight.shape
    ours, mask, scale = solver(weight, matrix, method)
    if rows * columns**3 < LONG_LOOP:
        sample = torch.arange(rows)
        sides = {"ours": ours, "loop": lambda: getattr(published_loop, method)(weight, matrix, mask, scale)}
        seconds, result = alternately(sides, repeats)
    else:
        sample = torch.arange(0, rows, max(1, rows // LOOP_ROWS))[:LOOP_ROWS]
        parts: dict[str, list[float]] = {"once": [], "rows": []}
        sides = {"ours": ours, "loop": lambda: _sampled_loop(weight, matrix, mask, scale, sample, method, parts)}
        seconds, result = alternately(sides, min(repeats, 3))
        seconds["loop"] = [
            once + rows / len(sample) * loop for once, loop in zip(parts["once"], parts["rows"], strict=True)
        ]
    # Rows do not depend on each other: of a sample, the errors of the same rows are compared.
    hessian = Hessian(matrix)
    dense = weight[sample]
    changes = (dense, dense - result["ours"][sample], dense - result["loop"])
    loss, ours_loss, loop_loss = (hessian.loss(change) for change in changes)
    if abs(ours_loss / loop_loss - 1) > EQUAL:
        raise ObrError(
            f"{method}, {rows} x {columns}: relative error {ours_loss / loss:.6f} here and {loop_loss / loss:.6f} by "
            "the row loop; they must be equal before times are compared, so one of the two is wrong."
        )
    return {
        "method": method, "rows": rows, "columns": columns, **machine(),
        **summary("ours", seconds["ours"]), **summary("loop", seconds["loop"]), "loop_rows_timed": len(sample),
        "ratio": median(seconds["loop"]) / median(seconds["ours"]),
        "relative_error": ours_loss / loss, "loop_relative_error": loop_loss / loss,
        "error_ratio": ours_loss / loop_loss,
    }  # fmt: skip


def _sampled_loop(weight, matrix, mask, scale, sample: Tensor, method: str, parts: dict[str, list[float]]) -> Tensor:
    """The loop's result on some rows; appends to `parts` the seconds of what is done once, and of these rows."""
    cut = weight.shape[1] // 2
    (damping,), hessian = timed(lambda: published_loop.damped(matrix), 1)
    (looping,), restored = timed(
        lambda: published_loop.restored_rows(weight[sample], hessian, mask[sample], scale[sample]), 1
    )
    once, result = damping, published_loop.rounded(restored, scale[sample])
    if method == "obr_gptq":
        (factoring,), factor = timed(lambda: published_loop.inverse_factor(hessian), 1)
        filled = weight * mask  # of the other rows: the sweep's cost does not depend on values
        filled[sample] = restored
        (sweeping,), right = timed(lambda: published_loop.swept(filled, factor, mask, scale, cut), 1)
        once, result[:, cut:] = damping + factoring + sweeping, right[sample]
    parts["once"].append(once)
    parts["rows"].append(looping)
    return result
