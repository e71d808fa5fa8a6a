"""The joint method against OBR_GPTQ, on layers of SmolLM2-135M, rotated: how much less error, for how much more time.

Beside them OBR_GPTQ with the mask that the joint method finds, and with one that is learned (`learned_mask`).

Timed on both sides: from the undamped Hessian and the weight to the compressed weight and its error, on a Hessian of
its own for each call, so that every call factors. Calls alternate.
"""

import math
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from layers import made_layer, real_layer
from learned_mask import learned_mask
from obr.methods.restore import Restored, restore
from timing import alternately, clock_of, machine, median

LAYERS = {"self_attn.q_proj": "qkv", "self_attn.o_proj": "o", "mlp.up_proj": "up_gate", "mlp.down_proj": "down"}
BLOCKS = (4, 15, 26)
RIVAL = "OBR_GPTQ"
METHODS = {
    RIVAL: {"method": "obr_gptq"},
    "joint, ADMM alone": {"method": "joint", "sweeps": 0},
    "joint, 100 sweeps": {"method": "joint", "sweeps": 100},
    "joint, 600 sweeps": {"method": "joint", "sweeps": 600},
    "joint, 100 sweeps, layer budget": {"method": "joint", "sweeps": 100, "scope": "layer"},
    "joint, 600 sweeps, layer budget": {"method": "joint", "sweeps": 600, "scope": "layer"},
    "joint, 100 sweeps, 8:16": {"method": "joint", "sweeps": 100, "pattern": "8:16"},
    f"{RIVAL}, mask of joint": {"method": "obr_gptq", "mask": "joint"},
    f"{RIVAL}, mask learned": {"method": "obr_gptq", "mask": "learned"},
}
MASKS = {"joint": lambda *layer: restore(*layer, "joint", sweeps=100).mask, "learned": learned_mask}


def restored_by(weight: Tensor, hessian: Tensor, **options) -> Restored:
    """As `restore`, with the masks of MASKS, too."""
    if options.get("mask") in MASKS:
        options["mask"] = MASKS[options["mask"]](weight, hessian)
    return restore(weight, hessian, **options)


def measure(results: Path | None, repeats: int, threads: int, width: int = 128) -> list[dict]:
    """One row for each layer and method: relative error, seconds, and both in units of OBR_GPTQ's.

    results: of `make demo`; None takes one made layer (width, width) instead of its.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = {"made": lambda: made_layer(width, width)}
    if results is not None:
        found = {
            f"{block}.{name}": lambda block=block, name=name, group=group: real_layer(results, block, name, group)
            for block in BLOCKS
            for name, group in LAYERS.items()
        }
    rows = []
    for layer, load in found.items():
        weight, matrix = load()
        sides = {name: partial(restored_by, weight, matrix, **options) for name, options in METHODS.items()}
        seconds, restored = alternately(sides, repeats, clock_of(threads))
        errors = {name: result.relative_error for name, result in restored.items()}
        rows += [
            {
                "layer": layer, "rows": weight.shape[0], "columns": weight.shape[1], "method": name, **machine(),
                "relative_error": errors[name], "error_ratio": errors[name] / errors[RIVAL],
                "time_s": median(seconds[name]), "time_ratio": median(seconds[name]) / median(seconds[RIVAL]),
            }
            for name in METHODS
        ]  # fmt: skip
    torch.set_num_threads(before)
    return rows


def means(frame: pd.DataFrame) -> pd.DataFrame:
    """Geometric means over layers, by method, in the order measured: error_ratio, time_ratio."""
    logs = frame[["error_ratio", "time_ratio"]].apply(lambda column: column.map(math.log))
    return logs.groupby(frame["method"], sort=False).mean().map(math.exp)
