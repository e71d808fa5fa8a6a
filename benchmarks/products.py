"""Products of few tokens with weights larger than the caches: packed 4-bit ones, PyTorch's, llama.cpp's, in one run.

Every kernel goes through copies of its weight, together several times the last cache, so that each is read from
memory; kernels take turns, so that a slow minute slows all; and so does a plain read of memory, whose speed is the
bound of all of them. Quantising the activations is part of a 4-bit product. Each is checked before it is timed:
whole numbers exactly, the others against the product of their own operands. One thread's time is the processor's.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import ggml
from obr.config.pattern import Pattern
from obr.config.quantizer import QuantizerSettings
from obr.errors import ObrError
from obr.kernels.int4 import packed_weight
from obr.methods.grid import Grid
from obr.methods.masks import mask_from_scores
from timing import alternately, clock_of, machine, median

ACTIVATIONS = QuantizerSettings(bits=8)
PATTERNS = {"unstructured": None} | {name: Pattern.parse(name) for name in ("8:16", "4:8", "2:4", "paired 4:8")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
READ = "read"
SHAPES = {"down_proj of Llama-2-7B": (4096, 11008), "up_proj of Llama-2-7B": (11008, 4096)}


@dataclass
class Stored:
    """copies: of one weight as a kernel reads it; bytes: of one; exact: (r, n), the numbers or codes of it."""

    copies: list[Tensor] | list[packed_weight.Weight]
    bytes: int
    exact: Tensor


@dataclass
class Kernel:
    """copies: calls that each compute the product with weights of their own; bytes: of one weight as stored."""

    copies: list[Callable[[], Tensor | None]]
    bytes: int


def measure(
    repeats: int, threads: tuple[int, ...], shapes: dict[str, tuple[int, int]], batches: tuple[int, ...], cold: int
) -> list[dict]:
    """One row for each shape (rows, columns), number of tokens, number of threads, and kernel.

    cold: bytes that the copies of a weight must have together. bound: the least time, in which the weight's bytes
    can be read; of_bound: its share of the kernel's time. An unstructured 50 % weight is what others are compared to.
    """
    rows, before = [], torch.get_num_threads()
    memory = torch.ones(max(cold, 1 << 20), dtype=torch.uint8)
    for name, shape in shapes.items():
        weights = store(shape, cold)
        about = {"layer_kind": name, "rows": shape[0], "columns": shape[1]}
        for count, tokens in itertools.product(threads, batches):
            torch.set_num_threads(count)
            kernels = prepare(weights, tokens, count, cold)
            rows += _lines({**about, "tokens": tokens, **machine()}, kernels, timed(kernels, memory, count, repeats))
        torch.set_num_threads(before)
    return rows


def _lines(about: dict, kernels: dict[str, Kernel], seconds: dict[str, list[float]]) -> list[dict]:
    """One row for each kernel. seconds: of each, and of a byte that is read."""
    fastest = 1 / median(seconds[READ])
    packed = median(seconds["int4 unstructured"])
    lines = []
    for name, kernel in kernels.items():
        taken = seconds[name]
        middle, bits = median(taken), 8 * kernel.bytes / (about["rows"] * about["columns"])
        lines.append({
            **about, "kernel": name, "bits_per_weight": bits,
            "time_s": middle, "time_min_s": min(taken), "time_max_s": max(taken),
            "read_gb_s": fastest / 1e9, "of_bound": kernel.bytes / fastest / middle, "times_packed": middle / packed,
        })  # fmt: skip
    return lines


def timed(kernels: dict[str, Kernel], memory: Tensor, threads: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each kernel, its copies in turn, and of a byte of `memory` read, after one untimed round."""
    turns = {name: itertools.cycle(kernel.copies) for name, kernel in kernels.items()}
    calls = {name: (lambda turn=turn: next(turn)()) for name, turn in turns.items()}
    calls[READ] = lambda: packed_weight.read_memory(memory, threads)
    alternately(calls, 1)
    seconds = alternately(calls, repeats, clock_of(threads))[0]
    return {**seconds, READ: [taken / memory.nbytes for taken in seconds[READ]]}


@torch.no_grad()
def store(shape: tuple[int, int], cold: int) -> dict[str, Stored]:
    """A random weight (r, n) in the form of every kernel."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weights = {name: _copied(weight.to(dtype), weight.to(dtype), cold) for name, dtype in DTYPES.items()}
    grid = Grid.fit(weight, 4, clip="minmax")
    codes = grid.codes(weight)
    weights["int4"] = _copied(packed_weight.Weight.pack(codes, grid.scale), codes.char(), cold)
    for name, pattern in PATTERNS.items():
        mask = mask_from_scores(weight.abs(), 0.5, pattern)
        packed = packed_weight.Weight.pack(codes, grid.scale, mask, pattern)
        weights[f"int4 {name}"] = _copied(packed, (codes * mask).char(), cold)
    return weights


@torch.no_grad()
def prepare(weights: dict[str, Stored], tokens: int, threads: int, cold: int) -> dict[str, Kernel]:
    """All kernels for random tokens (t, n), each checked."""
    weight = weights["fp32"].exact
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(1))
    kernels = {name: (_torch if name in DTYPES else _packed)(stored, x) for name, stored in weights.items()}
    try:
        kernels["llama.cpp Q4_0"] = _llama(weight, x, threads, cold)
    except ObrError as reason:
        print(f"No row of llama.cpp: {reason}", file=sys.stderr)
    return kernels


def last_cache() -> int:
    """Bytes of the largest cache of the first core; 64 MB where the system does not tell."""
    sizes = [
        path.read_text(encoding="utf-8").strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=64 << 20)


def _copies(bytes_: int, cold: int) -> int:
    return max(2, -(-cold // bytes_))


def _copied(weight: Tensor | packed_weight.Weight, exact: Tensor, cold: int) -> Stored:
    tensor = isinstance(weight, Tensor)
    size = weight.nbytes if tensor else weight.bytes
    others = [weight.clone() if tensor else weight.copy() for _ in range(_copies(size, cold) - 1)]
    return Stored([weight, *others], size, exact)


def _torch(stored: Stored, x: Tensor) -> Kernel:
    x = x.to(stored.exact.dtype)
    exact = x.double() @ stored.exact.double().T
    error = float((F.linear(x, stored.copies[0]).double() - exact).abs().max() / exact.abs().max())
    if not error < 2e-2:
        raise ObrError(f"PyTorch's {x.dtype} product is off by {error:.2g}; nothing is compared with it.")
    return Kernel([lambda weight=weight: F.linear(x, weight) for weight in stored.copies], stored.bytes)


def _packed(stored: Stored, x: Tensor) -> Kernel:
    rounded, weight = packed_weight.quantize(x, ACTIVATIONS), stored.copies[0]
    exact = (rounded.q[:, : weight.columns].double() - rounded.zero[:, None]) @ stored.exact.double().T
    if not torch.equal(weight.integers(rounded).double(), exact):
        raise ObrError(f"The 4-bit product of layout {weight.layout} is wrong; it is not timed.")
    return Kernel(
        [lambda w=w: w.multiply(packed_weight.quantize(x, ACTIVATIONS)) for w in stored.copies], stored.bytes
    )


def _llama(weight: Tensor, x: Tensor, threads: int, cold: int) -> Kernel:
    def made() -> ggml.Product:
        product = ggml.Product(weight, len(x), threads)
        product.set(x)
        return product

    first = made()
    first.run()
    exact = x @ weight.T
    error = float((first.result() - exact).norm() / exact.norm())
    if not error < 0.2:  # 4 bits in blocks of 32 cost a tenth
        raise ObrError(f"llama.cpp's product is off by {error:.2g}; its row is left out.")
    products = [first, *(made() for _ in range(_copies(first.bytes, cold) - 1))]
    return Kernel([product.run for product in products], first.bytes)
