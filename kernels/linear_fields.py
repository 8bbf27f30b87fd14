"""Inside the matmul kernels on coded weights: bit fields of words to numbers, and their products.

The words are those of `FieldWords`: a field of a tile of words is a whole left operand, so nothing
moves between registers. No conversion instruction either. Float16: a field that is masked out but
not shifted down is a number of its own, code * 2^(at - 24), a subnormal one; a multiplication and
addition makes (code - zero) * 2^-9 of it. Bfloat16: put into the mantissa of 128 it is
128 + code * 2^at, and one multiplication and addition gives code - zero. Float32, and 8 bits in
bfloat16: likewise 2^23 + code in float32. Every step is exact, since all are integers of at most 8
bits times one power of two. So the weight is rounded nowhere: float32 sums are scaled instead.
"""
# pyright: reportMissingParameterType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# ruff: noqa: SIM300

from __future__ import annotations

import triton
import triton.language as tl

from .prologue import prologue_applied


@triton.jit
def linear_field_words(first, second, third, FIELD: tl.constexpr, BITS: tl.constexpr):
    """The plane of words that holds a field; of the 16th field of 3 bits the field itself."""
    if BITS != 3 or FIELD < 5:
        words = first
    elif FIELD < 10:
        words = second
    elif FIELD < 15:
        words = third
    else:
        words = ((first >> 15) & 1) | ((second >> 14) & 2) | ((third >> 13) & 4)
    return words


@triton.jit
def linear_field_value(
    first, second, third, zero, FIELD: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr
):
    """code - zero of a field, in float16 times 2^-9. zero: float32 integers, for rows or all."""
    words = linear_field_words(first, second, third, FIELD, BITS).to(tl.uint16, bitcast=True)
    # Bits in which a field may lie without being shifted down.
    SPAN: tl.constexpr = (
        10 if DTYPE == tl.float16 else (7 if DTYPE == tl.bfloat16 and BITS < 8 else BITS)
    )
    SLOT: tl.constexpr = FIELD % 5 if BITS == 3 else FIELD
    PER: tl.constexpr = SPAN // BITS
    SHIFT: tl.constexpr = SLOT // PER * PER * BITS
    AT: tl.constexpr = SLOT % PER * BITS
    MASK: tl.constexpr = ((1 << BITS) - 1) << AT
    if SHIFT > 0:
        words = words >> SHIFT
    if SHIFT + BITS < 16:
        words = words & MASK
    if DTYPE == tl.float16:
        tiny = words.to(tl.float16, bitcast=True)
        factor = tl.full([1, 1], 2.0 ** (15 - AT), tl.float16)
        value = tiny * factor - (zero * 0.001953125).to(tl.float16)
    elif DTYPE == tl.bfloat16 and BITS < 8:
        whole = (words | 0x4300).to(tl.bfloat16, bitcast=True)
        factor = tl.full([1, 1], 2.0 ** (-AT), tl.bfloat16)
        value = whole * factor - (zero + 2.0 ** (7 - AT)).to(tl.bfloat16)
    else:
        wide = (words.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
        value = (wide - (zero + 8388608.0)).to(DTYPE)
    return value


@triton.jit
def linear_field_entry(
    first, second, third, BOOK, FIELD: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr
):
    """The codebook's entry for a field. BOOK: pointers, one for each row or one for all.

    A gather: the 16 entries of a codebook lie in one line of the first-level cache.
    """
    words = linear_field_words(first, second, third, FIELD, BITS).to(tl.uint16, bitcast=True)
    codes = ((words >> (FIELD * BITS)) & ((1 << BITS) - 1)).to(tl.int32)
    return tl.load(BOOK + codes).to(DTYPE)


@triton.jit
def linear_field_scale(
    SCALE, SCALE_BOOK, SECOND, OFFSET, group, columns, width, groups, inside, EVERY: tl.constexpr
):
    """Scales of a group for rows of the weight, float32.

    SCALE: [groups, N]; floats, or with SCALE_BOOK, codes: entry * SECOND + OFFSET, with a SECOND
    for every EVERY of the weight's groups, counted along its rows.
    """
    held = tl.load(SCALE + group * width + columns, mask=inside, other=0)
    if SCALE_BOOK is None:
        scale = held.to(tl.float32)
    else:
        place = (columns.to(tl.int64) * groups + group) // EVERY
        second = tl.load(SECOND + place, mask=inside, other=0.0)
        scale = tl.load(SCALE_BOOK + held.to(tl.int32)) * second + tl.load(OFFSET)
    return scale


@triton.jit
def linear_field_sums(
    X,
    WORDS,
    SCALE,
    ZERO,
    BOOK,
    SCALE_BOOK,
    SECOND,
    OFFSET,
    row,
    column,
    height,
    width,
    length,
    x_stride,
    groups,
    start,
    stop,
    P1,
    P1_row,
    P2,
    P2_row,
    PREPARE,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    FIELDS: tl.constexpr,
    TOGETHER: tl.constexpr,
    GROUP: tl.constexpr,
    CENTRE: tl.constexpr,
    BOOKS: tl.constexpr,
    EVERY: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums [BN, BM] of decode(W) times X.T over the blocks start to stop.

    GROUP: runs that share a scale, 0 for one scale a row. TOGETHER: fields whose products are
    added before they are scaled. CENTRE: the zero point where ZERO is None. BOOK: a codebook of
    2^BITS entries, one for all or, with BOOKS, one for each group and row. SCALE_BOOK, SECOND,
    OFFSET, EVERY: of scales that are coded themselves, see `linear_field_scale`.
    """
    DTYPE: tl.constexpr = X.dtype.element_ty
    UNIT: tl.constexpr = 512.0 if BOOK is None and DTYPE == tl.float16 else 1.0
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    length, x_stride = length * ALIGN, x_stride * ALIGN
    rows, columns, along = row + tl.arange(0, BM), column + tl.arange(0, BN), tl.arange(0, RUN)
    high, wide = (rows < height)[:, None], columns < width
    plane = tl.cast(width, tl.int64) * RUN
    w_at = WORDS + column.to(tl.int64) * RUN
    w_tile = tl.arange(0, BN)[:, None] * RUN + along[None, :]
    x_at = X + row.to(tl.int64) * x_stride
    x_tile = tl.arange(0, BM)[:, None] * x_stride + along[None, :]
    middle = tl.full([1, 1], CENTRE, tl.float32)
    sums = tl.zeros([BN, BM], tl.float32)
    for block in range(start, stop):
        at = tl.multiple_of(w_at + block * PLANES * plane, 16) + w_tile
        one = tl.load(at, mask=wide[:, None], other=0)
        two, three = one, one
        if BITS == 3:
            two = tl.load(at + plane, mask=wide[:, None], other=0)
            three = tl.load(at + 2 * plane, mask=wide[:, None], other=0)
        for chunk in tl.static_range(FIELDS // TOGETHER):
            zero, part, group = middle, sums, 0
            if GROUP > 0:
                group = tl.minimum((block * FIELDS + chunk * TOGETHER) // GROUP, groups - 1)
                part = tl.zeros([BN, BM], tl.float32)
            if ZERO is not None:
                zero = tl.load(ZERO + group * width + columns, mask=wide, other=0)
                zero = zero.to(tl.float32)[:, None]
            for member in tl.static_range(TOGETHER):
                # Written out twice over: a compile-time number cannot be assigned in a loop.
                k = (block * FIELDS + chunk * TOGETHER + member) * RUN
                inside = high & (k + along < length)[None, :]
                x = tl.load(tl.multiple_of(x_at + k, 2 * ALIGN) + x_tile, mask=inside, other=0.0)
                x = prologue_applied(x, rows, k + along, inside, P1, P1_row, P2, P2_row, PREPARE)
                if BOOK is None:
                    w = linear_field_value(
                        one, two, three, zero, chunk * TOGETHER + member, BITS, DTYPE
                    )
                else:
                    book = BOOK
                    if BOOKS:
                        at_row = tl.where(wide, group * width + columns, 0).to(tl.int64)
                        book = BOOK + (at_row << BITS)[:, None]
                    w = linear_field_entry(
                        one, two, three, book, chunk * TOGETHER + member, BITS, DTYPE
                    )
                part = tl.dot(w, x.T, part, input_precision=PRECISION)
            if GROUP > 0:
                scale = linear_field_scale(
                    SCALE, SCALE_BOOK, SECOND, OFFSET, group, columns, width, groups, wide, EVERY
                )  # fmt: skip
                sums += part * (scale * UNIT)[:, None]
            else:
                sums = part
    if GROUP == 0:
        scale = linear_field_scale(
            SCALE, SCALE_BOOK, SECOND, OFFSET, 0, columns, width, groups, wide, EVERY
        )
        sums *= (scale * UNIT)[:, None]
    return sums
