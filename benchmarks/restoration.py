"""OBR_GPTQ of whole layers: all rows at once against the published algorithm's loop over rows, in one run.

    python benchmarks/restoration.py --results results/demo --out results/benchmarks

Two real layers of SmolLM2-135M, rotated, with the Hessians that `make demo` cached, and a 4096 x 4096 layer whose
Hessian has the eigenvalues 1/i. Same threads, same mask and scale for both, and their relative errors are compared.
The loop is timed on 32 rows and scaled where it would take more than a few minutes. Ratios are of medians.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import pandas as pd
import torch

from obr import hessian as hessians
from obr.model import block_file
from obr.quantize import Grid
from obr.restoration import Hessian, restore
from row_loop import obr_gptq_rows

LOOP_ROWS = 32  # timed of layers whose loop takes too long as a whole


def real_layer(results: Path, block: int, name: str, group: str):
    model = results / "models" / "smollm2-135m"
    rotation = results / "rotations" / "quarot" / "smollm2-135m.safetensors"
    blocks = hessians.open_blocks(model, rotation, device="cpu")
    folder = results / "hessians" / "smollm2-135m" / "quarot" / "sotu"
    matrix = hessians.load(folder / block_file(block))[group]
    return blocks.load(block).get_submodule(name).weight.detach(), matrix


def made_layer(rows: int, columns: int):
    """A Hessian with eigenvalues 1/i in a random basis, as those of real inputs fall off."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator))
    matrix = (basis / torch.arange(1, columns + 1)) @ basis.T
    return torch.randn(rows, columns, generator=generator) / columns**0.5, (matrix + matrix.T) * columns


def timed(function, repeats: int) -> tuple[list[float], object]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return seconds, result


def compare(what: str, weight, matrix, repeats: int) -> dict:
    """One row of the table: medians and spread of both, and how their results differ."""
    rows, columns = weight.shape
    ours, restored = timed(lambda: restore(weight, matrix, "obr_gptq"), repeats)
    sample = slice(None) if rows * columns**2 < 2e9 else slice(0, LOOP_ROWS)

    def loop():
        shared = Hessian(matrix)
        grid = Grid.fit(weight[sample], 4)
        return shared, obr_gptq_rows(weight[sample], shared, restored.mask[sample], grid)

    shared_seconds = 0.0
    if sample != slice(None):  # what the loop does once a layer must not be scaled with the rows
        start = time.perf_counter()
        shared = Hessian(matrix)
        _ = shared.inverse_factor
        shared_seconds = time.perf_counter() - start
    theirs, (shared, plain) = timed(loop, 1 if sample == slice(None) else min(repeats, 2))
    scale = rows / len(plain)
    loop_seconds = [shared_seconds + (s - shared_seconds) * scale for s in theirs]
    dense = weight[sample]
    error = [shared.loss(dense - w) / shared.loss(dense) for w in (restored.weight[sample], plain)]
    ours_median, loop_median = statistics.median(ours), statistics.median(loop_seconds)
    return {
        "layer": what, "rows": rows, "columns": columns,
        "ours_s": ours_median, "ours_min_s": min(ours), "ours_max_s": max(ours),
        "loop_s": loop_median, "loop_rows_timed": len(plain), "ratio": loop_median / ours_median,
        "relative_error": error[0], "loop_relative_error": error[1], "error_ratio": error[0] / error[1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/demo"), help="results of `make demo`")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--large", type=int, default=4096, help="width of the made layer, 0 for none")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    layers = [
        ("down_proj, real", *real_layer(arguments.results, 15, "mlp.down_proj", "down")),
        ("up_proj, real", *real_layer(arguments.results, 15, "mlp.up_proj", "up_gate")),
    ]
    rows = [compare(what, weight, matrix, arguments.repeats) for what, weight, matrix in layers]
    if arguments.large:
        rows.append(compare("made, spectrum 1/i", *made_layer(arguments.large, arguments.large), 1))
    frame = pd.DataFrame(rows).assign(
        threads=torch.get_num_threads(), machine=platform.processor() or platform.machine()
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(arguments.out / "restoration.csv", index=False)
    print(frame.to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main()
