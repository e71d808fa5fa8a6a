"""4-bit weights as they were compressed, dense or pruned, multiplied by 8-bit activations on the CPU.

A `Weight` holds the codes of a layer and nothing else: kept codes of 4 bits, masks of one bit a weight or, for N:M
patterns, the number of each group's mask. `Tokens` are activations rounded to at most 8 bits, as `quantize` does it.
Their product is exact in integers; then the scales are multiplied in. layout.h has the layout, kernels.cpp the loops,
compiled on first use for each level of vector instructions, of which the processor's best is taken.
"""

import ctypes
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from obr.config.pattern import Pattern
from obr.config.quantizer import QuantizerSettings
from obr.errors import ObrError
from obr.runtime import compiler

if TYPE_CHECKING:
    from obr.models.online_transforms import Range

HERE = Path(__file__).parent
SOURCES = [HERE / name for name in ("kernels.cpp", "layout.h", "pool.h", "avx512.h", "avx2.h", "portable.h")]
# No fused multiply-add, which only some levels have: scales are multiplied in with the same result by all of them.
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-ffp-contract=off"]
# Best first; the flags of the compiler, and by which the processor is known.
LEVELS: dict[str, list[str]] = {
    "avx512": [
        *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi"),
        *("avx512_vbmi2", "avx512_vnni", "popcnt", "bmi2", "fma"),
    ],
    "avx2": ["avx2", "fma", "popcnt", "bmi2"],
    "portable": [],
}
# In the order of layout.h's Format. A layout with the name of a pattern stores the numbers of its groups' masks;
# others have a bitmask: the numbers of 8:16 take longer to look up than they save in reading.
LAYOUTS = ("dense", "bitmask", "2:4", "4:8", "paired 4:8")
ROWS, WIDTH = 8, 64  # of a block, of a group
PARTS = ("data", "starts", "order", "sums", "scales")  # a weight's tensors, as layout.h's Weight has them
OVERREAD = 128  # bytes behind the last that a kernel may read, and ignores
MOST_COLUMNS = 1 << 19  # sums of more may leave 32 bits


class _Weight(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("format", "rows", "groups")),
        *((name, ctypes.c_void_p) for name in (*PARTS, "masks")),
    )


@cache
def levels() -> tuple[str, ...]:
    """The levels of vector instructions that this processor has, best first."""
    has = set(compiler.processor_flags())
    return tuple(name for name, needed in LEVELS.items() if has.issuperset(needed))


@cache
def library(level: str) -> ctypes.CDLL:
    """The kernels compiled for a level. Raises ObrError if there is no compiler, or not that level."""
    if level not in levels():
        raise ObrError(f"Level {level!r} is not one this processor has; choose from {', '.join(levels())}.")
    machine = [f"-m{flag.replace('512_', '512')}" for flag in LEVELS[level]]
    compiled = compiler.build(SOURCES, [*FLAGS, *machine])
    for function in (compiled.pack, compiled.multiply, compiled.quantize_tokens):
        function.restype = None
    compiled.read_memory.restype = ctypes.c_uint64
    return compiled


@dataclass(frozen=True)
class Tokens:
    """Activations rounded to whole numbers: (q - zero) * scale.

    q: (t, n filled up to whole groups), uint8. zero: (t,) int32. scale: (t,) float32. columns: n.
    """

    q: Tensor
    zero: Tensor
    scale: Tensor
    columns: int


def quantize(
    x: Tensor, settings: QuantizerSettings, bounds: "Range | None" = None, level: str | None = None
) -> Tokens:
    """Round `x (t, n)` token by token to the grid of `fake_quant.fake_quantize`, the same whole numbers.

    bounds: factors `low` and `high` (1,) of a token's extremes, for a learned clip_ratio.

    Raises:
        ObrError: settings that one scale a token and 8 bits cannot hold, or tokens that are not on the CPU.
    """
    if x.device.type != "cpu":
        raise ObrError(f"Activations on {x.device} cannot meet packed weights; move the model back to the CPU.")
    if settings.bits > 8 or settings.group_size is not None:
        raise ObrError(
            f"Activations of {settings.bits} bits, group_size {settings.group_size}: the 4-bit kernels take 2 to 8 "
            "bits and one scale a token (group_size null)."
        )
    x = x.float().contiguous()
    tokens, columns = x.shape
    stride = -(-columns // WIDTH) * WIDTH
    q = torch.empty(tokens, stride, dtype=torch.uint8)
    zero, scale = torch.empty(tokens, dtype=torch.int32), torch.empty(tokens)
    low = high = settings.clip_ratio
    if settings.clip_ratio == "learned":
        low, high = float(bounds.low), float(bounds.high)
    library(level or levels()[0]).quantize_tokens(
        _pointer(x), ctypes.c_int64(tokens), ctypes.c_int64(columns), ctypes.c_int64(stride),
        ctypes.c_int(settings.bits), ctypes.c_int(settings.symmetric), ctypes.c_float(low), ctypes.c_float(high),
        _pointer(q), _pointer(zero), _pointer(scale),
    )  # fmt: skip
    return Tokens(q, zero, scale, columns)


@dataclass(frozen=True)
class Weight:
    """A matrix (r, n) of 4-bit codes and a scale a row, as the kernels read it. See layout.h.

    Tensors: data, uint8; starts (blocks, 5) int64; order, sums, scales (rows filled up to whole blocks).
    """

    layout: str
    rows: int
    columns: int
    data: Tensor
    starts: Tensor
    order: Tensor
    sums: Tensor
    scales: Tensor

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scale: Tensor,
        mask: Tensor | None = None,
        pattern: Pattern | None = None,
        layout: str | None = None,
    ) -> "Weight":
        """Bring codes (r, n) in [-8, 7] into a layout, by default the smallest that holds them.

        scale: (r, 1) or (r,). mask: (r, n), True where kept; None for all. pattern: which N:M the mask is of.

        Raises:
            ObrError: codes of more than 4 bits, an unknown layout, or a mask that is not of the layout's pattern.
        """
        rows, columns = codes.shape
        layout = layout or _layout_of(mask, pattern)
        _check(codes, mask, layout, columns)
        codes = codes.to(torch.int8).contiguous()
        kept = torch.ones_like(codes, dtype=torch.bool) if mask is None else mask.contiguous()
        codes = codes * kept
        counts = kept.sum(1)
        filled_codes, filled_kept = _whole_words(codes, kept, layout)
        order, starts, size = _places(layout, counts, columns)
        data = torch.zeros(size + OVERREAD, dtype=torch.uint8)
        numbers = _numbers(layout)[1]
        library(levels()[0]).pack(
            ctypes.c_int64(LAYOUTS.index(layout)), ctypes.c_int64(rows), ctypes.c_int64(filled_codes.shape[1]),
            ctypes.c_int64(-(-columns // WIDTH)), _pointer(filled_codes), _pointer(filled_kept), _pointer(order),
            _pointer(starts), ctypes.c_void_p(numbers.ctypes.data), _pointer(data),
        )  # fmt: skip
        filling, places = order < 0, order.clamp_min(0).long()
        sums = codes.sum(1, dtype=torch.int32)[places].masked_fill(filling, 0)
        scales = scale.reshape(-1).float()[places].masked_fill(filling, 0)
        return cls(layout, rows, columns, data, starts, order, sums, scales)

    def copy(self) -> "Weight":
        """The same in memory of its own."""
        return replace(self, **{name: getattr(self, name).clone() for name in PARTS})

    @property
    def bytes(self) -> int:
        """All that is kept in memory, scales and places included."""
        return sum(getattr(self, name).nbytes for name in PARTS)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over the number of weights, zeros included."""
        return 8 * self.bytes / (self.rows * self.columns)

    def integers(self, tokens: Tokens, level: str | None = None, threads: int | None = None) -> Tensor:
        """Σ (q - zero) code, exactly: (t, r), int32."""
        out = torch.empty(len(tokens.q), self.rows, dtype=torch.int32)
        self._multiply(tokens, None, level, threads, out, None)
        return out

    def multiply(
        self, tokens: Tokens, bias: Tensor | None = None, level: str | None = None, threads: int | None = None
    ) -> Tensor:
        """The layer's output (t, r), float32. bias: (r,). threads: PyTorch's number by default."""
        out = torch.empty(len(tokens.q), self.rows)
        self._multiply(tokens, bias, level, threads, None, out)
        return out

    def _multiply(self, tokens: Tokens, bias, level, threads, whole, real) -> None:
        if tokens.columns != self.columns:
            raise ObrError(f"Tokens of {tokens.columns} channels do not fit a weight of {self.columns} columns.")
        bias = None if bias is None else bias.float().contiguous()
        weight = _Weight(
            LAYOUTS.index(self.layout), self.rows, -(-self.columns // WIDTH),
            *(getattr(self, name).data_ptr() for name in PARTS),
            _numbers(self.layout)[0].ctypes.data,
        )  # fmt: skip
        library(level or levels()[0]).multiply(
            ctypes.byref(weight), ctypes.c_int64(len(tokens.q)), ctypes.c_int64(tokens.q.shape[1]),
            _pointer(tokens.q), _pointer(tokens.zero), _pointer(tokens.scale), _pointer(bias),
            ctypes.c_int(threads or torch.get_num_threads()), _pointer(whole), _pointer(real),
        )  # fmt: skip


def read_memory(buffer: Tensor, threads: int, level: str | None = None) -> None:
    """Read all of `buffer` once, as fast as so many threads can: what a product at best takes."""
    library(level or levels()[0]).read_memory(
        _pointer(buffer), ctypes.c_int64(buffer.nbytes), ctypes.c_int(threads)
    )  # fmt: skip


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _layout_of(mask: Tensor | None, pattern: Pattern | None) -> str:
    if mask is None or bool(mask.all()):
        return "dense"
    return str(pattern) if str(pattern) in LAYOUTS else "bitmask"


def _check(codes: Tensor, mask: Tensor | None, layout: str, columns: int) -> None:
    if layout not in LAYOUTS:
        raise ObrError(f"Layout {layout!r} is unknown; choose from {', '.join(LAYOUTS)}.")
    if columns > MOST_COLUMNS:
        raise ObrError(f"A weight of {columns} columns is too wide for sums in 32 bits; the most are {MOST_COLUMNS}.")
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ObrError(
            f"Codes from {int(codes.min())} to {int(codes.max())} are not 4-bit; use weights of 2 to 4 bits."
        )
    if layout in ("dense", "bitmask"):
        return
    pattern = Pattern.parse(layout)
    pattern.check_width(columns, "the weight")
    units = torch.ones_like(codes, dtype=torch.bool) if mask is None else mask
    groups = units.reshape(-1, pattern.group)
    fits = (groups.sum(1) == pattern.kept).all()
    if pattern.paired:
        fits &= (groups[:, ::2] == groups[:, 1::2]).all()
    if not fits:
        raise ObrError(f"The mask is not of pattern {layout} in every group; use the layout bitmask.")


def _whole_words(codes: Tensor, kept: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Codes and mask (r, n), widened by groups of zeros to whole words of sixteen columns, whose masks are kept as
    numbers: none stands for half a word."""
    missing = -codes.shape[1] % 16
    if layout in ("dense", "bitmask") or not missing:
        return codes, kept
    pattern = Pattern.parse(layout)
    group = torch.arange(pattern.group) < pattern.kept  # in pairs too
    filling = group.repeat(len(kept), missing // pattern.group)
    return functional.pad(codes, (0, missing)), torch.cat([kept, filling], dim=1)


def _places(layout: str, counts: Tensor, columns: int) -> tuple[Tensor, Tensor, int]:
    """Order of the rows (blocks * 8), starts (blocks, 5) in bytes, and bytes in all. counts: (r,), kept in a row."""
    rows, groups = len(counts), -(-columns // WIDTH)
    blocks = -(-rows // ROWS)
    order = torch.full((blocks * ROWS,), -1, dtype=torch.int32)
    # Two rows share their bytes: those of about equal length go together.
    order[:rows] = counts.argsort(stable=True) if layout == "bitmask" else torch.arange(rows)
    if layout == "bitmask":
        lengths = torch.zeros(blocks * ROWS, dtype=torch.int64)
        lengths[:rows] = counts[order[:rows].long()]
        streams = lengths.reshape(blocks, ROWS // 2, 2).amax(2)
        head = groups * ROWS * 8
    else:
        streams = torch.full((blocks, ROWS // 2), groups * (WIDTH if layout == "dense" else WIDTH // 2))
        masks = 0 if layout == "dense" else groups * Pattern.parse(layout).index_bits * ROWS * 8
        head = masks // (1 if layout == "dense" else Pattern.parse(layout).group)
        head = -(-head // 32) * 32  # so that loads of 32 bytes cross no line of the cache
    parts = torch.cat([torch.full((blocks, 1), head), streams], dim=1)
    ends = parts.flatten().cumsum(0)
    starts = (ends - parts.flatten()).reshape(blocks, 1 + ROWS // 2)
    return order, starts.contiguous(), int(ends[-1]) if blocks else 0


@lru_cache(maxsize=len(LAYOUTS))
def _numbers(layout: str) -> tuple[np.ndarray, np.ndarray]:
    """(number -> mask, mask -> number) of sixteen columns, uint16; what is none stands at 0."""
    if layout in ("dense", "bitmask"):
        return np.zeros(1, np.uint16), np.zeros(1 << 16, np.uint16)
    pattern = Pattern.parse(layout)
    kept, units = pattern.units
    step = pattern.group // units
    words = [sum((2**step - 1) << (step * i) for i in chosen) for chosen in combinations(range(units), kept)]
    groups = 16 // pattern.group
    masks = np.zeros(1 << (groups * pattern.index_bits), np.uint16)
    numbers = np.zeros(1 << 16, np.uint16)
    for chosen in product(range(len(words)), repeat=groups):
        number = sum(n << (pattern.index_bits * i) for i, n in enumerate(chosen))
        mask = sum(words[n] << (pattern.group * i) for i, n in enumerate(chosen))
        masks[number], numbers[mask] = mask, number
    return masks, numbers
