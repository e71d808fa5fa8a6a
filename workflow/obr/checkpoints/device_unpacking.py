"""Packed layers unpacked where the model computes, so that a GPU gets bits and not 16-bit weights."""

from __future__ import annotations

import torch
from torch import Tensor

from obr.checkpoints.packing import Packed, check_finite, check_room, check_stream, mask_table
from obr.config.pattern import Pattern
from obr.errors import ObrError, first_line
from obr.methods.grid import Grid


def unpacked_weight(packed: Packed, device: torch.device) -> Tensor:
    """The weight (r, n) of a packed layer in float32 on a device, equal to `unpack(packed).weight` to the last bit.

    Raises:
        ObrError: parts whose sizes contradict each other.

    Example:
        >>> from obr.checkpoints.packing import pack
        >>> from obr.methods.restore import restore
        >>> layer = restore(torch.tensor([[0.1, -0.7, 0.2, 0.4]]), None, "magnitude", bits=4, pattern="2:4")
        >>> torch.equal(unpacked_weight(pack(layer, torch.float16), torch.device("cpu")), layer.weight)
        True
    """
    try:
        return _unpacked(packed.about, packed.tensors, device)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise ObrError(f"A packed layer contradicts itself ({first_line(error)}); its file is broken.") from error


def _unpacked(about: dict, tensors: dict[str, Tensor], device: torch.device) -> Tensor:
    rows, columns = about["shape"]
    pattern = Pattern.parse(about["pattern"]) if about["pattern"] else None
    check_room(about, tensors, pattern)
    mask, kept = None, rows * columns
    if about["masked"]:
        mask = _mask(tensors["mask"].to(device), rows, columns, pattern)
        kept = int(mask.count_nonzero())
    if about["bits"] == 16:
        return _placed(check_finite(tensors["values"].to(device).float(), "values"), mask, rows, columns)
    half = 2 ** (about["bits"] - 1)
    numbers = _numbers(tensors["codes"].to(device), about["bits"], kept)
    codes = _placed((numbers.to(torch.int16) - half).to(torch.int8), mask, rows, columns)
    group = about.get("group")
    scale = check_finite(tensors["scale"].float() * half, "scales") / half  # checked as the grid's largest value
    scale = scale.reshape(rows, 1 if group is None else -(-columns // group)).to(device)
    return codes * Grid(scale, about["bits"], group).over(columns)


def _numbers(stream: Tensor, bits: int, count: int) -> Tensor:
    """As `unpack_bits`: unsigned integers (count,) of so many bits, uint8, or int32 above 8 bits."""
    check_stream(stream.numel(), str(stream.dtype).removeprefix("torch."), tuple(stream.shape), bits, count)
    if 8 % bits == 0:
        places = torch.arange(0, 8, bits, dtype=torch.uint8, device=stream.device)
        return ((stream[:, None] >> places) & (2**bits - 1)).reshape(-1)[:count]
    places = torch.arange(8, dtype=torch.uint8, device=stream.device)
    flat = ((stream[:, None] >> places) & 1).reshape(-1)[: count * bits].view(count, bits)
    numbers = flat[:, 0].to(torch.uint8 if bits <= 8 else torch.int32)
    for place in range(1, bits):
        numbers |= flat[:, place].to(numbers.dtype) << place
    return numbers


def _mask(stream: Tensor, rows: int, columns: int, pattern: Pattern | None) -> Tensor:
    """The mask (r, n) of its stored bits, or of the numbers of its groups."""
    if pattern is None:
        return _numbers(stream, 1, rows * columns).view(rows, columns).bool()
    words = torch.from_numpy(mask_table(pattern)[0].astype("int32")).to(stream.device)
    numbers = _numbers(stream, pattern.index_bits, rows * columns // pattern.group).int()
    if numbers.numel() and int(numbers.max()) >= len(words):
        raise ObrError(f"A packed mask names a group that pattern {pattern} does not have; the file is broken.")
    units = torch.arange(pattern.units[1], dtype=torch.int32, device=stream.device)
    bits = ((words[numbers][:, None] >> units) & 1).bool()
    return (bits.repeat_interleave(2, 1) if pattern.paired else bits).reshape(rows, columns)


def _placed(kept: Tensor, mask: Tensor | None, rows: int, columns: int) -> Tensor:
    """(r, n): the kept values, row by row, where the mask is True, and zeros elsewhere."""
    places = rows * columns if mask is None else int(mask.count_nonzero())
    if kept.numel() != places:
        raise ValueError(f"{kept.numel()} values for {places} places")
    if mask is None or places == mask.numel():
        return kept.reshape(rows, columns)
    return torch.zeros(rows, columns, dtype=kept.dtype, device=kept.device).masked_scatter_(mask, kept)
