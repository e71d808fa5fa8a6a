"""The packed form of a compressed layer: what it really weighs.

A layer is stored as the b-bit codes of its kept weights, row by row; the mask as one bit a weight, or for N:M
patterns the number of each group's mask among all possible ones; a scale a row in 32 bits, or one a group of
columns in 16. At 16 bits the kept values themselves are stored. `pack` and `unpack` are inverse to each other, to
the last bit.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from obr.config.pattern import Pattern
from obr.config.recipe_checks import WEIGHT_BITS
from obr.errors import ObrError, first_line
from obr.methods.grid import Grid
from obr.methods.restore import Restored


@dataclass
class Packed:
    """One layer as stored. about: {"shape", "bits", "pattern", "masked"}, and "group" if any; tensors by part."""

    about: dict
    tensors: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        """Of all tensors as they are stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers (k,) below 2^bits as a little-endian stream of bits, uint8."""
    places = np.arange(bits, dtype=np.uint32)
    return np.packbits(((values.astype(np.uint32)[:, None] >> places) & 1).astype(np.uint8), bitorder="little")


def unpack_bits(stream: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `pack_bits`, (count,): uint8 for at most 8 bits, else uint32.

    Raises:
        ObrError: the stream is not of that length or type.
    """
    check_stream(stream.size, str(stream.dtype), stream.shape, bits, count)
    if bits > 1 and 8 % bits == 0:
        numbers = np.empty((stream.size, 8 // bits), dtype=np.uint8)
        for place in range(0, 8, bits):
            numbers[:, place // bits] = (stream >> np.uint8(place)) & np.uint8(2**bits - 1)
        return numbers.reshape(-1)[:count]
    flat = np.unpackbits(stream, count=count * bits, bitorder="little").reshape(count, bits)
    numbers = flat[:, 0].astype(np.uint8 if bits <= 8 else np.uint32)
    for place in range(1, bits):
        numbers |= flat[:, place].astype(numbers.dtype) << numbers.dtype.type(place)
    return numbers


def check_stream(size: int, dtype: str, shape: tuple[int, ...], bits: int, count: int) -> None:
    """Raise ObrError unless an array of this size, dtype and shape holds `count` numbers of `bits` bits."""
    if dtype != "uint8" or len(shape) != 1:
        raise ObrError(f"A packed stream is {dtype} {shape}, not a row of bytes; the file is broken.")
    if size != -(-count * bits // 8):
        raise ObrError(
            f"A packed stream has {size} bytes, not those of {count} numbers of {bits} bits; the file is broken."
        )


def pack(restored: Restored, dtype: torch.dtype) -> Packed:
    """A compressed layer in its stored form; dtype is that of values kept at 16 bits.

    Example:
        >>> from obr.methods.restore import restore
        >>> layer = restore(torch.tensor([[0.1, -0.7, 0.2, 0.4]]), None, "magnitude", bits=4, pattern="2:4")
        >>> packed = pack(layer, torch.float16)
        >>> {name: tensor.tolist() for name, tensor in packed.tensors.items() if name != "scale"}
        {'codes': [193], 'mask': [4]}
        >>> torch.equal(unpack(packed).weight, layer.weight)
        True
    """
    rows, columns = restored.weight.shape
    mask = restored.mask.cpu()
    masked = not bool(mask.all())
    about = {
        "shape": [rows, columns],
        "bits": restored.bits,
        "pattern": str(restored.pattern) if restored.pattern else None,
        "masked": masked,
    }
    tensors = {}
    if restored.codes is None:
        tensors["values"] = restored.weight.cpu()[mask].to(dtype)
    else:
        codes = restored.codes.cpu()[mask].numpy().astype(np.int32) + 2 ** (restored.bits - 1)
        tensors["codes"] = torch.from_numpy(pack_bits(codes, restored.bits))
        tensors["scale"] = restored.scale[:, 0].float().cpu()
        if restored.group is not None:
            about["group"], tensors["scale"] = restored.group, restored.scale.half().cpu()
    if masked:
        tensors["mask"] = torch.from_numpy(_pack_mask(mask.numpy(), restored.pattern))
    return Packed(about, tensors)


def unpack(packed: Packed) -> Restored:
    """The layer as it was packed, float32.

    Raises:
        ObrError: parts whose sizes contradict each other.
    """
    about, tensors = packed.about, packed.tensors
    try:
        rows, columns = about["shape"]
        pattern = Pattern.parse(about["pattern"]) if about["pattern"] else None
        check_room(about, tensors, pattern)
        mask = np.ones((rows, columns), dtype=bool)
        if about["masked"]:
            mask = _unpack_mask(tensors["mask"].numpy(), rows, columns, pattern)
        if about["bits"] == 16:
            weight = torch.from_numpy(_placed(check_finite(tensors["values"].float(), "values").numpy(), mask))
            return Restored(weight, None, None, torch.from_numpy(mask), float("nan"), 16, pattern)
        stream = unpack_bits(tensors["codes"].numpy(), about["bits"], np.count_nonzero(mask))
        kept = (stream - np.uint8(2 ** (about["bits"] - 1))).view(np.int8)  # bytes wrap: 0 to 255 are -128 to 127
        codes = torch.from_numpy(_placed(kept, mask))
        group = about.get("group")
        scales = (rows, 1 if group is None else -(-columns // group))
        scale = check_finite(tensors["scale"].float() * 2 ** (about["bits"] - 1), "scales").reshape(scales)
        scale = scale / 2 ** (about["bits"] - 1)  # a power of two: as it was
        weight = codes * Grid(scale, about["bits"], group).over(columns)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise ObrError(f"A packed layer contradicts itself ({first_line(error)}); its file is broken.") from error
    return Restored(weight, codes, scale, torch.from_numpy(mask), float("nan"), about["bits"], pattern, group=group)


def _placed(kept: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(r, n): the kept values, row by row, where the mask (r, n) is True, and zeros elsewhere."""
    places = np.count_nonzero(mask)
    if kept.size != places:
        raise ValueError(f"{kept.size} values for {places} places")
    if places == mask.size:
        return kept.reshape(mask.shape)
    values = np.zeros(mask.shape, dtype=kept.dtype)
    values[mask] = kept
    return values


def check_room(about: dict, tensors: dict[str, Tensor], pattern: Pattern | None) -> None:
    """Raise ObrError before anything is allocated that the layer's own bytes do not call for, roughly."""
    rows, columns = about["shape"]
    if not all(type(n) is int and n > 0 for n in (rows, columns)) or about["bits"] not in WEIGHT_BITS:
        raise ObrError(f"A packed layer has shape {about['shape']!r} and {about['bits']!r} bits; its file is broken.")
    group = about.get("group")
    if group is not None and (type(group) is not int or group < 1):
        raise ObrError(f"A packed layer has groups of {group!r} columns; its file is broken.")
    if pattern is not None:
        pattern.check_width(columns, "a packed layer")
    if about["masked"]:
        have, bits = tensors["mask"].numel(), pattern.index_bits if pattern else 1
        weights = 8 * have * (pattern.group if pattern else 1) // bits
    elif about["bits"] == 16:
        have = weights = tensors["values"].numel()
    else:
        have = tensors["codes"].numel()
        weights = 8 * have // about["bits"]
    if rows * columns > 2 * (weights + 64):
        raise ObrError(f"A packed layer of {rows} x {columns} weights has {have} bytes for them; its file is broken.")


def check_finite(values: Tensor, what: str) -> Tensor:
    """The values. Raises ObrError at one that is not finite."""
    if not bool(values.isfinite().all()):
        raise ObrError(f"A packed layer has {what} that are not finite; its file is broken, compress again.")
    return values


def _pack_mask(mask: np.ndarray, pattern: Pattern | None) -> np.ndarray:
    if pattern is None:
        return np.packbits(mask, bitorder="little")  # as pack_bits with one bit, but quicker
    return pack_bits(mask_table(pattern)[1][_group_words(mask, pattern)], pattern.index_bits)


def _unpack_mask(stream: np.ndarray, rows: int, columns: int, pattern: Pattern | None) -> np.ndarray:
    if pattern is None:
        return unpack_bits(stream, 1, rows * columns).reshape(rows, columns).astype(bool)
    groups = rows * columns // pattern.group
    words = mask_table(pattern)[0]
    numbers = unpack_bits(stream, pattern.index_bits, groups)
    if numbers.size and numbers.max() >= len(words):
        raise ObrError(f"A packed mask names a group that pattern {pattern} does not have; the file is broken.")
    units = pattern.units[1]
    bits = (words[numbers][:, None] >> np.arange(units, dtype=np.uint32)) & 1
    return np.repeat(bits, 2 if pattern.paired else 1, axis=1).reshape(rows, columns).astype(bool)


def _group_words(mask: np.ndarray, pattern: Pattern) -> np.ndarray:
    """Each group's mask as an integer, bit i for its unit i."""
    groups = mask.reshape(-1, pattern.group)
    units = groups[:, ::2] if pattern.paired else groups
    return units.astype(np.uint32) @ (np.uint32(1) << np.arange(units.shape[1], dtype=np.uint32))


@lru_cache(maxsize=8)
def mask_table(pattern: Pattern) -> tuple[np.ndarray, np.ndarray]:
    """(number -> word, word -> number) over all masks of a group."""
    kept, units = pattern.units
    words = np.array([sum(1 << i for i in c) for c in combinations(range(units), kept)], dtype=np.uint32)
    numbers = np.zeros(2**units, dtype=np.uint32)
    numbers[words] = np.arange(len(words), dtype=np.uint32)
    return words, numbers
