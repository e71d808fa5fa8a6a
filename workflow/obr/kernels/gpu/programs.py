"""Triton kernels: packed codes of few tokens' weights, expanded word by word and multiplied; and rows unpacked.

A word is eight columns of a row. LAYOUT is 0 for dense codes, 1 for a bitmask, 2 for numbers of N:M masks. Imported
only where Triton is; with TRITON_INTERPRET=1 the kernels run on CPU tensors. layout.py describes the operands.
"""

import triton
import triton.language as tl

DENSE, BITMASK, NUMBERS = 0, 1, 2


@triton.jit
def _bits_at(stream, at, inside):
    """The 32 bits of a stream of int32 words that begin with bit `at`."""
    shift = (at & 31).to(tl.uint32)
    low = tl.load(stream + (at >> 5), mask=inside, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(stream + (at >> 5) + 1, mask=inside, other=0).to(tl.uint32, bitcast=True)
    return (low >> shift) | ((high << 1) << (31 - shift))


@triton.jit
def _masks(masks, table, stride, row, word, inside, LAYOUT: tl.constexpr, M: tl.constexpr, FIELD: tl.constexpr):
    """(mask of a word's columns, kept columns before it in its group, the latter where M is 16), int32.

    The parameters are those of `_expanded`.
    """
    if LAYOUT == 1:
        mask = tl.load(masks + row.to(tl.int64) * stride + word, mask=inside, other=0).to(tl.int32)
        before = mask * 0
    else:
        number = word // (M // 8) if M > 8 else word
        field = _bits_at(masks + row.to(tl.int64) * stride, number * FIELD, inside) & ((1 << FIELD) - 1)
        mask = tl.load(table + field, mask=inside, other=0)
        before = mask * 0
        if M > 8:
            low = mask & 255
            pairs = low - ((low >> 1) & 0x55)
            fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
            second = (word & 1) == 1
            before = tl.where(second, (fours + (fours >> 4)) & 15, 0)
            mask = tl.where(second, mask >> 8, low)
    return mask, before


@triton.jit
def _expanded(
    codes, starts, masks, table, controls, stride, row, word, running, rows, words,
    BITS: tl.constexpr, LAYOUT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FIELD: tl.constexpr,
):  # fmt: skip
    """Eight fields of BITS bits a word, (r, w) uint32, zeros where pruned; and the kept codes so far, (r,).

    The parameters are a weight's tensors (layout.py), stride: elements of `masks` in a row; row (r, 1), word (1, w):
    which words; running (r,): kept codes of the rows before these words, for a bitmask; rows, words: of the weight.
    """
    inside = (row < rows) & (word < words)
    start = tl.load(starts + row, mask=row < rows, other=0).to(tl.int64)
    if LAYOUT == 0:
        at = word * (8 * BITS)
        if BITS == 3:
            fields = _bits_at(codes + start, at + row * 0, inside)
        else:
            fields = tl.load(codes + start + (at >> 5), mask=inside, other=0).to(tl.uint32, bitcast=True)
            fields = fields >> (at & 31).to(tl.uint32)
    else:
        mask, before = _masks(masks, table, stride, row, word, inside, LAYOUT, M, FIELD)
        moves = tl.load(controls + mask)
        if LAYOUT == 1:
            count = moves & 15
            first = tl.cumsum(count, 1) - count + running[:, None]
            running += tl.sum(count, 1)
        elif M > 8:
            first = (word // (M // 8)) * N + before
        else:
            first = word * (8 // M * N) + before
        fields = _bits_at(codes + start, first * BITS, inside & (mask != 0))
        move = ((moves >> (4 * BITS)) << (4 * BITS)).to(tl.uint32, bitcast=True)
        fields = (fields & ~move) | ((fields << (4 * BITS)) & move)
        move = tl.load(controls + 256 + mask).to(tl.uint32, bitcast=True)
        fields = (fields & ~move) | ((fields << (2 * BITS)) & move)
        move = tl.load(controls + 512 + mask).to(tl.uint32, bitcast=True)
        fields = (fields & ~move) | ((fields << BITS) & move)
        fields = fields & tl.load(controls + 768 + mask).to(tl.uint32, bitcast=True)
    return fields, running


@triton.jit
def _column(place, columns, GROUP: tl.constexpr, WIDE: tl.constexpr):
    """(column of a place in memory, whether there is one); they differ where groups are widened."""
    if GROUP == WIDE:
        return place, place < columns
    column = place // WIDE * GROUP + place % WIDE
    return column, (place % WIDE < GROUP) & (column < columns)


@triton.jit
def one_token(
    x, x_scale, codes, starts, masks, table, controls, scale, bias, out, stride, rows, columns, words, groups,
    BITS: tl.constexpr, LAYOUT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FIELD: tl.constexpr,
    GROUP: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr, BIAS: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """out (rows,) = weight (rows, columns) x, a program for R rows, W words at a time, sums in registers.

    The parameters are those of `_expanded`, and: x (columns,), 16- or 32-bit floats, or whole numbers where WHOLE
    (int8, int16), which x_scale (1,) multiplies; scale, bias: the weight's; groups: scales of a row; GROUP, WIDE:
    columns of a group, and as it lies in memory, 0 for one scale a row.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    running = tl.zeros((R,), tl.int32)
    total = tl.zeros((R, W), tl.int32 if WHOLE and GROUP == 0 else tl.float32)
    for first in range(0, words, W):
        word = first + tl.arange(0, W)[None, :]
        fields, running = _expanded(
            codes, starts, masks, table, controls, stride, row, word, running, rows, words, BITS, LAYOUT, M, N, FIELD
        )
        part = tl.zeros((R, W), tl.int32 if WHOLE else tl.float32)
        for j in tl.static_range(8):
            code = (fields << (32 - BITS * (j + 1))).to(tl.int32, bitcast=True) >> (32 - BITS)
            column, there = _column(word * 8 + j, columns, GROUP, WIDE)
            value = tl.load(x + column, mask=there, other=0)
            if WHOLE:
                part += code * value.to(tl.int32)
            else:
                part += code.to(tl.float32) * value.to(tl.float32)
        if GROUP == 0:
            total += part
        else:
            inside = (row < rows) & (word < words)
            factor = tl.load(scale + row * groups + word // (WIDE // 8), mask=inside, other=0)
            total += part.to(tl.float32) * factor.to(tl.float32)
    index = tl.program_id(0) * R + tl.arange(0, R)
    result = tl.sum(total, 1).to(tl.float32)
    factor = tl.full((R,), 1.0, tl.float32)
    if WHOLE:
        factor *= tl.load(x_scale)
    if GROUP == 0:
        factor *= tl.load(scale + index, mask=index < rows, other=0)
    result *= factor
    if BIAS:
        result += tl.load(bias + index, mask=index < rows, other=0).to(tl.float32)
    tl.store(out + index, result.to(out.dtype.element_ty), mask=index < rows)


@triton.jit
def few_tokens(
    x, x_scale, codes, starts, masks, table, controls, scale, bias, out, stride, rows, columns, words, groups, tokens,
    BITS: tl.constexpr, LAYOUT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FIELD: tl.constexpr,
    GROUP: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr, BIAS: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """out (tokens, rows) = x (tokens, columns) weight^T for at most T tokens, by tensor cores.

    The parameters are those of `one_token`, x_scale (tokens,). With groups, W words lie in one of them. int8 tokens
    are multiplied as such where W allows it, int16 ones (at most 8 bits and a sign) as float16: sums of a block are
    exact in either.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    token = tl.arange(0, T)
    running = tl.zeros((R,), tl.int32)
    total = tl.zeros((R, T), tl.int32 if WHOLE and GROUP == 0 else tl.float32)
    index = tl.program_id(0) * R + tl.arange(0, R)
    for first in range(0, words, W):
        word = first + tl.arange(0, W)[None, :]
        fields, running = _expanded(
            codes, starts, masks, table, controls, stride, row, word, running, rows, words, BITS, LAYOUT, M, N, FIELD
        )
        left = 32 - BITS * (tl.arange(0, 8)[None, None, :] + 1)
        code = (fields[:, :, None] << left.to(tl.uint32)).to(tl.int32, bitcast=True) >> (32 - BITS)
        code = tl.reshape(code, (R, W * 8))
        column, there = _column(first * 8 + tl.arange(0, W * 8)[None, :], columns, GROUP, WIDE)
        place = x + token[:, None] * columns + column
        value = tl.load(place, mask=there & (token[:, None] < tokens), other=0)
        if WHOLE:
            if x.dtype.element_ty == tl.int8 and W >= 4:
                part = tl.dot(code.to(tl.int8), tl.trans(value), out_dtype=tl.int32)
            else:
                part = tl.dot(code.to(tl.float16), tl.trans(value.to(tl.float16))).to(tl.int32)
        else:
            part = tl.dot(code.to(x.dtype.element_ty), tl.trans(value), input_precision="ieee")
        if GROUP == 0:
            total += part
        else:
            factor = tl.load(scale + index * groups + first * 8 // WIDE, mask=index < rows, other=0)
            total += part.to(tl.float32) * factor.to(tl.float32)[:, None]
    result = total.to(tl.float32)
    factor = tl.full((R, T), 1.0, tl.float32)
    if WHOLE:
        factor *= tl.load(x_scale + token, mask=token < tokens, other=0)[None, :]
    if GROUP == 0:
        factor *= tl.load(scale + index, mask=index < rows, other=0)[:, None]
    result *= factor
    if BIAS:
        result += tl.load(bias + index, mask=index < rows, other=0).to(tl.float32)[:, None]
    place = out + token[None, :] * rows + index[:, None]
    tl.store(place, result.to(out.dtype.element_ty), mask=(index[:, None] < rows) & (token[None, :] < tokens))


@triton.jit
def unpack_rows(
    codes, starts, masks, table, controls, scale, out, stride, rows, columns, words, groups, first_row, last_row,
    BITS: tl.constexpr, LAYOUT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FIELD: tl.constexpr,
    GROUP: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """out (last_row - first_row, columns): codes times scales of these rows, in the dtype of `out`.

    The parameters are those of `one_token`.
    """
    row = first_row + tl.program_id(0) * R + tl.arange(0, R)[:, None]
    running = tl.zeros((R,), tl.int32)
    for first in range(0, words, W):
        word = first + tl.arange(0, W)[None, :]
        fields, running = _expanded(
            codes, starts, masks, table, controls, stride, row, word, running, rows, words, BITS, LAYOUT, M, N, FIELD
        )
        group = word * 0 if GROUP == 0 else word // (WIDE // 8)
        factor = tl.load(scale + row * groups + group, mask=(row < last_row) & (word < words), other=0)
        factor = factor.to(tl.float32)
        for j in tl.static_range(8):
            code = (fields << (32 - BITS * (j + 1))).to(tl.int32, bitcast=True) >> (32 - BITS)
            column, there = _column(word * 8 + j, columns, GROUP, WIDE)
            place = out + (row - first_row).to(tl.int64) * columns + column
            value = (code.to(tl.float32) * factor).to(out.dtype.element_ty)
            tl.store(place, value, mask=there & (row < last_row))
