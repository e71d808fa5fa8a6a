"""Products of few tokens with weights larger than the caches: packed 4-bit ones, PyTorch's, llama.cpp's, in one run.

Every kernel goes through copies of its weight, together several times the last cache, so that each is read from
memory; kernels take turns, so that a slow minute slows all; and so does a plain read of memory, whose speed is the
bound of all of them. Quantising the activations is part of a 4-bit product. Each is checked before it is timed:
whole numbers exactly, the others against the product of their own operands.
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
from obr import int4
from obr.errors import ObrError
from obr.prune import mask_from_scores
from obr.quantize import Grid
from obr.recipe import Pattern, QuantizerSettings
from timing import alternately, machine, median

ACTIVATIONS = QuantizerSettings(bits=8)
PATTERNS = {"unstructured": None} | {name: Pattern.parse(name) for name in ("8:16", "4:8", "2:4", "paired 4:8")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
READ = "read"
SHAPES = {"down_proj of Llama-2-7B": (4096, 11008), "up_proj of Llama-2-7B": (11008, 4096)}


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
    for (name, shape), count, tokens in itertools.product(shapes.items(), threads, batches):
        torch.set_num_threads(count)
        kernels = prepare(shape, tokens, count, cold)
        seconds = timed(kernels, memory, count, repeats)
        fastest = memory.nbytes / median(seconds.pop(READ))
        packed = median(seconds["int4 unstructured"])
        for kernel, taken in seconds.items():
            middle, bytes_ = median(taken), kernels[kernel].bytes
            rows.append({
                "layer_kind": name, "rows": shape[0], "columns": shape[1], "tokens": tokens, "kernel": kernel,
                **machine(), "bits_per_weight": 8 * bytes_ / (shape[0] * shape[1]),
                "time_s": middle, "time_min_s": min(taken), "time_max_s": max(taken),
                "read_gb_s": fastest / 1e9, "of_bound": bytes_ / fastest / middle, "times_packed": middle / packed,
            })  # fmt: skip
        del kernels
    torch.set_num_threads(before)
    return rows


def timed(kernels: dict[str, Kernel], memory: Tensor, threads: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each kernel, its copies in turn, and of a read of `memory`, after one untimed round."""
    turns = {name: itertools.cycle(kernel.copies) for name, kernel in kernels.items()}
    calls = {name: (lambda turn=turn: next(turn)()) for name, turn in turns.items()}
    calls[READ] = lambda: int4.read_memory(memory, threads)
    alternately(calls, 1)
    return alternately(calls, repeats)[0]


@torch.no_grad()
def prepare(shape: tuple[int, int], tokens: int, threads: int, cold: int) -> dict[str, Kernel]:
    """All kernels for a random weight (r, n) and tokens (t, n), each checked."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(shape, generator=generator), torch.randn(tokens, shape[1], generator=generator)
    kernels = {name: _torch(weight.to(dtype), x.to(dtype), cold) for name, dtype in DTYPES.items()}
    grid = Grid.fit(weight, 4, clip="minmax")
    codes = grid.codes(weight)
    kernels["int4"] = _packed(int4.Weight.pack(codes, grid.scale), codes, x, cold)
    for name, pattern in PATTERNS.items():
        mask = mask_from_scores(weight.abs(), 0.5, pattern)
        packed = int4.Weight.pack(codes, grid.scale, mask, pattern)
        kernels[f"int4 {name}"] = _packed(packed, codes * mask, x, cold)
    try:
        kernels["llama.cpp Q4_0"] = _llama(weight, x, threads, cold)
    except ObrError as reason:
        print(f"No row of llama.cpp: {reason}", file=sys.stderr)
    return kernels


def last_cache() -> int:
    """Bytes of the largest cache of the first core; 64 MB where the system does not tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=64 << 20)


def _copies(bytes_: int, cold: int) -> int:
    return max(2, -(-cold // bytes_))


def _torch(weight: Tensor, x: Tensor, cold: int) -> Kernel:
    exact = x.double() @ weight.double().T
    error = float((F.linear(x, weight).double() - exact).abs().max() / exact.abs().max())
    if not error < 2e-2:
        raise ObrError(f"PyTorch's {weight.dtype} product is off by {error:.2g}; nothing is compared with it.")
    weights = [weight, *(weight.clone() for _ in range(_copies(weight.nbytes, cold) - 1))]
    return Kernel([lambda weight=weight: F.linear(x, weight) for weight in weights], weight.nbytes)


def _packed(weight: int4.Weight, codes: Tensor, x: Tensor, cold: int) -> Kernel:
    rounded = int4.quantize(x, ACTIVATIONS)
    exact = (rounded.q[:, : weight.columns].double() - rounded.zero[:, None]) @ codes.double().T
    if not torch.equal(weight.integers(rounded).double(), exact):
        raise ObrError(f"The 4-bit product of layout {weight.layout} is wrong; it is not timed.")
    weights = [weight, *(weight.copy() for _ in range(_copies(weight.bytes, cold) - 1))]
    return Kernel([lambda w=w: w.multiply(int4.quantize(x, ACTIVATIONS)) for w in weights], weight.bytes)


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
