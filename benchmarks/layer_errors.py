"""Layer errors of recipes side by side, on some blocks of a dense model: one CSV line for each recipe and input.

    python benchmarks/layer_errors.py --model DIR --calibration TEXT --out out.csv \\
        --recipe "method=gptq bits=3" --recipe "method=joint bits=3 sparsity=0"

The layers that read one input are restored together. Errors are those of `obr.restore`: of the outputs, relative,
with the Hessian of the dense model. Rows are thinned out, which changes no row's result but SparseGPT's thresholds.
"""

import argparse
import csv
import math
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

import obr
from obr.calibration.collect_hessians import dense_hessians
from obr.config.recipe_settings import command_line, parse_settings
from obr.methods.restore import restore
from obr.models.blocks import Blocks
from recipes import calibrated
from timing import machine


@torch.no_grad()
def layers(
    model: Path, text: str, blocks: list[int], windows: int, seqlen: int, every: int
) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """{(block, group): (every so many rows of its layers (r, n), the Hessian (n, n) of their input)}."""
    tokens = calibrated(model, text, windows, seqlen)
    found, source = {}, Blocks(obr.load_model(model, device="cpu"))
    for index, moments in dense_hessians(source, tokens, progress=False):
        block = source.load(index)
        for group, names in source.layout.groups.items() if index in blocks else ():
            rows = torch.cat([block.get_submodule(name).weight.float() for name in names])[::every]
            found[index, group] = rows.clone(), moments[group].hessian
        if index == max(blocks):
            return found
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--calibration", type=Path, required=True, help="text of the calibration windows")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--recipe", action="append", default=[], required=True, help="settings of one recipe")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 6, 14, 24])
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of a calibration window")
    parser.add_argument("--every", type=int, default=6, help="take every so many rows of a layer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = args.calibration.read_text(encoding="utf-8")
    taken, rows = layers(args.model, text, args.blocks, args.windows, args.seqlen, args.every), []
    for words in args.recipe:
        entry, logs = parse_settings(words.split()), defaultdict(list)
        for (block, group), (weight, hessian) in taken.items():
            started = time.process_time()
            error = restore(weight, hessian, **entry).relative_error
            seconds = round(time.process_time() - started, 3)
            logs[group].append(math.log(error))
            rows.append({"recipe": command_line(entry), "block": block, "input": group, "relative_error": error})
            rows[-1] |= {"rows": len(weight), "columns": weight.shape[1], "seconds": seconds, **machine()}
        means = {group: math.exp(sum(found) / len(found)) for group, found in logs.items()}
        whole = math.exp(sum(map(math.log, means.values())) / len(means))
        print(command_line(entry), f"{whole:.5f}", {g: round(e, 5) for g, e in means.items()}, flush=True)
    with args.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
