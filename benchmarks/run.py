"""Measure speed and memory, side by side in one run, and write tables and figures.

    python benchmarks/run.py                    # everything but the large model; needs the results of `make demo`
    python benchmarks/run.py --only large       # a model of Llama-2-7B's shape: 30 GB of disk, hours
    python benchmarks/run.py --quick            # small sizes, under a minute, no figure of worth: does it run?

Each part writes one CSV file; the Markdown table and the figures are made of all that are there.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

import decoding
import joint
import large
import memory
import products
import restoration
import scaling
import stages
import zero_shot
from layers import CALIBRATION, MODEL, ROTATION
from models import TINY, write_inputs
from obr.errors import ObrError
from obr.runtime.files import atomic_write
from render import render
from timing import machine


@dataclass
class Settings:
    """What the parts read. results: of `make demo`. scratch: for models and checkpoints made on the way."""

    results: Path
    scratch: Path
    threads: int
    repeats: int
    quick: bool
    keep: bool


def measure_restoration(s: Settings) -> list[dict]:
    if s.quick:
        return restoration.measure(None, 1, 128, (s.threads,))
    return restoration.measure(s.results, s.repeats, 4096, tuple(sorted({1, s.threads})))


def measure_joint(s: Settings) -> list[dict]:
    if s.quick:
        return joint.measure(None, 1, s.threads)
    return joint.measure(s.results, 1, 1)


def measure_scaling(s: Settings) -> list[dict]:
    if s.quick:
        return scaling.measure([32, 64, 128], [64, 128, 256], [512, 1024], 1)
    rows, columns = [64, 128, 256, 512, 1024, 2048, 4096], [256, 512, 1024, 2048, 4096]
    return scaling.measure(rows, columns, [1024, 2048, 4096, 8192, 16384, 32768], s.repeats)


def measure_stages(s: Settings) -> list[dict]:
    model = s.results / "models" / MODEL
    rotation = s.results / "rotations" / ROTATION / f"{MODEL}.safetensors"
    tokens = s.results / "calibration" / CALIBRATION / f"{MODEL}.safetensors"
    if s.quick:
        inputs = write_inputs(s.scratch / "tiny", TINY, windows=2, seqlen=32)
        model, rotation, tokens = inputs.model, inputs.rotation, inputs.tokens
    return stages.measure(model, rotation, tokens, s.scratch, 1 if s.quick else max(3, s.repeats // 2))


def measure_memory(s: Settings) -> list[dict]:
    if s.quick:
        return memory.measure(s.scratch, [1], TINY, windows=2, seqlen=32)
    return memory.measure(s.scratch, [4, 16, 30])


def measure_large(s: Settings) -> list[dict]:
    if s.quick:
        return large.measure(s.scratch, TINY, blocks=1, windows=2, seqlen=32, keep=s.keep)
    return large.measure(s.scratch, keep=s.keep)


def measure_products(s: Settings) -> list[dict]:
    if s.quick:
        return products.measure(2, (s.threads,), {"tiny": (64, 256)}, (1, 3), cold=1 << 16)
    threads = tuple(sorted({1, s.threads}))
    return products.measure(5 * s.repeats, threads, products.SHAPES, (1, 8, 64), cold=4 * products.last_cache())


def measure_decoding(s: Settings) -> list[dict]:
    if s.quick:
        wider = {**TINY, "hidden_size": 256, "intermediate_size": 512}  # or scales weigh more than codes
        return decoding.measure(None, s.scratch, (s.threads,), 3, 1, wider, apart=False)
    return decoding.measure(s.results, s.scratch, tuple(sorted({1, s.threads})), 12 * s.repeats, 2)


def measure_zero_shot(s: Settings) -> list[dict]:
    if s.quick:
        return zero_shot.measure(write_inputs(s.scratch / "tiny", TINY, 2, 32).model, [], 4, (1, 4), 1)
    tasks = zero_shot.real_tasks(s.scratch) or sorted(s.results.glob("tasks/*"))
    return zero_shot.measure(s.results / "models" / MODEL, tasks, 16, (1, 4, 8, 16, 32), 1)


PARTS: dict[str, Callable[[Settings], list[dict]]] = {
    "restoration": measure_restoration,
    "joint": measure_joint,
    "scaling": measure_scaling,
    "stages": measure_stages,
    "memory": measure_memory,
    "products": measure_products,
    "decoding": measure_decoding,
    "zero_shot": measure_zero_shot,
    "large": measure_large,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/demo"), help="results of `make demo`")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--only", nargs="+", choices=PARTS, help="default: all but the large model")
    parser.add_argument("--threads", type=int, default=machine()["cores"], help="default: all cores")
    parser.add_argument("--repeats", type=int, default=5, help="calls of which the median is taken")
    parser.add_argument("--scratch", type=Path, help="where models are made; default: a folder in --out")
    parser.add_argument("--keep", action="store_true", help="keep the large model and its checkpoint in --scratch")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all parts run")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except ObrError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Measure the parts asked for, writing each as it is done, then render all."""
    parts = arguments.only or ([*PARTS] if arguments.quick else [p for p in PARTS if p != "large"])
    demo = {"restoration", "joint", "stages", "decoding", "zero_shot"}
    if demo & set(parts) and not arguments.quick and not (arguments.results / "hessians").exists():
        raise ObrError(
            f"{arguments.results} has no Hessians; run `make demo` first or name its results by --results."
        )
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    scratch = arguments.scratch or Path(tempfile.mkdtemp(prefix="scratch_", dir=arguments.out))
    scratch.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        arguments.results, scratch, arguments.threads, arguments.repeats, arguments.quick, arguments.keep
    )
    try:
        for part in parts:
            start = time.perf_counter()
            print(f"{part} ...", flush=True)
            frame = pd.DataFrame(PARTS[part](settings))
            with atomic_write(arguments.out / f"{part}.csv") as partial:
                frame.to_csv(partial, index=False)
            print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
    finally:
        if arguments.scratch is None and not arguments.keep:
            shutil.rmtree(scratch, ignore_errors=True)
    print(render(arguments.out))


if __name__ == "__main__":
    sys.exit(main())
