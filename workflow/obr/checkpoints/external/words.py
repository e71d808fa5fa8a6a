"""Integers of a few bits packed into 32-bit words, as GPTQ, AWQ and compressed-tensors store them."""

import numpy as np
import torch
from torch import Tensor


def unpack_words(words: Tensor, bits: int, count: int, whole: bool = False) -> Tensor:
    """(r, count) unsigned integers, uint8, of packed rows (r, w), int32.

    A row is one stream of bits, the lowest first. whole: no integer lies across two words, so that a word of
    3-bit integers has two bits to spare, as compressed-tensors up to version 0.17 packed them.

    Example:
        >>> unpack_words(torch.tensor([[0x87654321 - 2**32]], dtype=torch.int32), bits=4, count=8).tolist()
        [[1, 2, 3, 4, 5, 6, 7, 8]]
    """
    rows = np.ascontiguousarray(words.numpy()).astype("<i4", copy=False)
    if whole and 32 % bits:
        fits = 32 // bits
        shifts = np.arange(fits, dtype=np.uint32) * np.uint32(bits)
        numbers = (rows.view(np.uint32)[:, :, None] >> shifts) & np.uint32(2**bits - 1)
        return torch.from_numpy(numbers.reshape(len(rows), -1)[:, :count].astype(np.uint8))
    stream = rows.view(np.uint8)
    if 8 % bits == 0:
        numbers = np.stack([(stream >> place) & (2**bits - 1) for place in range(0, 8, bits)], axis=2)
        return torch.from_numpy(numbers.reshape(len(rows), -1)[:, :count].astype(np.uint8))
    single = np.unpackbits(stream, axis=1, count=count * bits, bitorder="little").reshape(len(rows), count, bits)
    numbers = single[:, :, 0].copy()
    for place in range(1, bits):
        numbers |= single[:, :, place] << np.uint8(place)
    return torch.from_numpy(numbers)


def words_for(count: int, bits: int, whole: bool = False) -> int:
    """How many words a row of `count` integers takes.

    Example:
        >>> words_for(100, bits=3), words_for(100, bits=3, whole=True)
        (10, 10)
    """
    return -(-count // (32 // bits)) if whole else -(-count * bits // 32)
