"""mma.sp of PTX, m16n8k128 for .s4, as its documentation has it, on operands as they lie in memory.

Independent of how the operands were made: bytes and words in, whole numbers out.
"""

import numpy as np


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Bytes (r, n / 2) as signed numbers of 4 bits (r, n), the lower half of a byte first."""
    both = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1).astype(np.int32)
    return both - 16 * (both > 7)


def thread_words(metadata: np.ndarray, rows: int, row: int, step: int) -> np.ndarray:
    """What the 32 threads of a warp load for 16 rows from `row` on, and columns from 128 `step` on."""
    start = step * 2 * rows + 2 * row
    return metadata[start : start + 32].view(np.uint32)


def multiply_tile(a: np.ndarray, words: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One instruction: a (16, 64) kept numbers, words (32,) a thread each, b (128, t) -> (16, t).

    Raises AssertionError where the metadata are none: indices of a group's pairs must rise.
    """
    out = np.zeros((16, b.shape[1]), np.int64)
    for thread, word in enumerate(words.tolist()):
        row, half = thread // 4 + 8 * (thread % 2), thread % 4 // 2
        for group in range(8):  # of 8 columns, of which two pairs are there
            nibble = word >> 4 * group & 15
            first, second = nibble & 3, nibble >> 2
            assert first < second, f"thread {thread}, group {group}: pairs {first} and {second}"
            for place, pair in enumerate((first, second)):
                for i in range(2):
                    kept = a[row, 32 * half + 4 * group + 2 * place + i]
                    out[row] += kept * b[64 * half + 8 * group + 2 * pair + i]
    return out


def multiply(codes: np.ndarray, metadata: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """A whole product (rows, t), tile by tile. codes (rows, columns / 4), tokens (t, columns / 2): bytes."""
    kept, b = nibbles(codes), nibbles(tokens).T
    rows, columns = len(kept), b.shape[0]
    assert kept.shape[1] * 2 == columns and metadata.size == rows * columns // 64
    out = np.zeros((rows, b.shape[1]), np.int64)
    for row in range(0, rows, 16):
        for step in range(columns // 128):
            words = thread_words(metadata, rows, row, step)
            a = kept[row : row + 16, 64 * step : 64 * (step + 1)]
            out[row : row + 16] += multiply_tile(a, words, b[128 * step : 128 * (step + 1)])
    return out
