"""Tiles of the microscaling matmul: weights decoded in registers, by shifts alone.

The bits of a small float, moved to their place in a 16-bit float, are that float times a power of
two, subnormals included. So no conversion instruction is needed, which sm_80 would not have.
"""
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from .linear_tiles import linear_store_tile, linear_tile


@triton.jit
def mx_e2m1(codes):
    """Codes of 4 bits in a wider integer to float32."""
    codes = codes.to(tl.int16)
    bits = ((codes & 8) << 12) | ((codes & 7) << 9)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def mx_e4m3(codes):
    """Bytes to float32."""
    codes = codes.to(tl.int16)
    bits = ((codes & 128) << 8) | ((codes & 127) << 7)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def mx_e8m0(codes):
    """2^(code - 127) in float32; 0 is the subnormal 2^-127, 255 NaN."""
    codes = codes.to(tl.int32)
    bits = tl.where(codes == 0, 0x00400000, codes << 23)
    bits = tl.where(codes == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def mx_weight(
    W,
    SCALES,
    start,
    columns,
    width,
    length,
    w_stride,
    scales_stride,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The weight's tile [BN, BK] from column `start`, in DTYPE."""
    BLOCK: tl.constexpr = tl.constexpr(16 if FORMAT == "nvfp4" else 32)
    PER: tl.constexpr = tl.constexpr(1 if FORMAT == "mxfp8" else 2)
    there = (columns < width)[:, None]
    at = start // PER + tl.arange(0, BK // PER)
    w_at = tl.multiple_of(W, ALIGN) + columns.to(tl.int64)[:, None] * w_stride + at[None, :]
    codes = tl.load(w_at, mask=there & (at * PER < length)[None, :], other=0)
    block = start // BLOCK + tl.arange(0, BK // BLOCK)
    s_at = SCALES + columns.to(tl.int64)[:, None] * scales_stride + block[None, :]
    scales = tl.load(s_at, mask=there & (block * BLOCK < length)[None, :], other=0)
    if FORMAT == "mxfp8":
        values = mx_e4m3(codes)
    else:
        values = tl.join(mx_e2m1(codes & 15), mx_e2m1(codes >> 4))
    steps = mx_e4m3(scales) if FORMAT == "nvfp4" else mx_e8m0(scales)
    values = tl.reshape(values, (BN, BK // BLOCK, BLOCK)) * steps[:, :, None]
    return tl.reshape(values, (BN, BK)).to(DTYPE)


@triton.jit
def linear_mx_sums(
    X,
    W,
    SCALES,
    rows,
    columns,
    height,
    width,
    first,
    last,
    length,
    x_stride,
    w_stride,
    scales_stride,
    FORMAT: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Sums [BN, BM] over the columns first to last: the decoded weight is the left operand, which a
    tensor core takes from registers."""
    sums = tl.zeros([BN, BM], tl.float32)
    x_at = tl.multiple_of(X, ALIGN) + rows.to(tl.int64)[None, :] * x_stride
    for start in range(first, last, BK):
        along = start + tl.arange(0, BK)
        inside = (rows < height)[None, :] & (along < length)[:, None]
        x = tl.load(x_at + along[:, None], mask=inside, other=0.0)
        w = mx_weight(
            W, SCALES, start, columns, width, length, w_stride, scales_stride, FORMAT,
            X.dtype.element_ty, ALIGN, BN, BK,
        )  # fmt: skip
        sums = tl.dot(w, x, sums)
    return sums


@triton.jit
def linear_mx_kernel(
    X,
    W,
    SCALES,
    WHOLE,
    OUT,
    height,
    width,
    length,
    x_stride,
    w_stride,
    scales_stride,
    E0,
    E0_row,
    E0_col,
    E1,
    E1_row,
    E1_col,
    E2,
    E2_row,
    E2_col,
    E3,
    E3_row,
    E3_col,
    ACTIVATION: tl.constexpr,
    FINISH: tl.constexpr,
    FORMAT: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """X [M, K] of 16 bits, W and SCALES of FORMAT, WHOLE one float32 or None, to OUT [M, N]."""
    length, x_stride, w_stride = length * ALIGN, x_stride * ALIGN, w_stride * ALIGN
    row, column = linear_tile(tl.program_id(0), tl.cdiv(height, BM), tl.cdiv(width, BN), GROUP)
    rows, columns = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    sums = linear_mx_sums(
        X, W, SCALES, rows, columns, height, width, 0, length, length, x_stride, w_stride,
        scales_stride, FORMAT, ALIGN, BM, BN, BK,
    )  # fmt: skip
    if WHOLE is not None:
        sums *= tl.load(WHOLE).to(tl.float32)
    linear_store_tile(
        OUT, sums.T, row * BM, column * BN, height, width, E0, E0_row, E0_col, E1, E1_row, E1_col,
        E2, E2_row, E2_col, E3, E3_row, E3_col, ACTIVATION, FINISH, BM, BN,
    )  # fmt: skip


@triton.jit
def linear_mx_split_kernel(
    X,
    W,
    SCALES,
    WHOLE,
    PARTS,
    height,
    width,
    length,
    x_stride,
    w_stride,
    scales_stride,
    run,
    FORMAT: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Sums over `run` steps of columns for each split: PARTS [splits, M, N], M up to BM."""
    length, x_stride, w_stride = length * ALIGN, x_stride * ALIGN, w_stride * ALIGN
    rows, columns = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    first = split * run * BK
    last = tl.minimum(length, first + run * BK)
    sums = linear_mx_sums(
        X, W, SCALES, rows, columns, height, width, first, last, length, x_stride, w_stride,
        scales_stride, FORMAT, ALIGN, BM, BN, BK,
    )  # fmt: skip
    if WHOLE is not None:
        sums *= tl.load(WHOLE).to(tl.float32)
    at = (split * height + rows).to(tl.int64)[None, :] * width + columns[:, None]
    inside = (rows[None, :] < height) & (columns[:, None] < width)
    tl.store(PARTS + at, sums, mask=inside)
