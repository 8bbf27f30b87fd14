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
    there,
    left,
    w_stride,
    scales_stride,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The tile [BN, BK] in DTYPE, from column `start` of the rows that W and SCALES point to."""
    BLOCK: tl.constexpr = tl.constexpr(16 if FORMAT == "nvfp4" else 32)
    PER: tl.constexpr = tl.constexpr(1 if FORMAT == "mxfp8" else 2)
    row = tl.arange(0, BN)[:, None]
    at = tl.arange(0, BK // PER)[None, :]
    inside = there[:, None] & (start + at * PER < left)
    codes = tl.load(W + start // PER + row * w_stride + at, mask=inside, other=0)
    block = tl.arange(0, BK // BLOCK)[None, :]
    inside = there[:, None] & (start + block * BLOCK < left)
    s_at = SCALES + start // BLOCK + row * scales_stride + block
    scales = tl.load(s_at, mask=inside, other=0)
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
    left,
    x_stride,
    w_stride,
    scales_stride,
    FORMAT: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Sums [BN, BM] over `left` columns after the `first`; rows and columns: where the tile starts.

    The decoded weight is the left operand, which a tensor core takes from registers.
    """
    BLOCK: tl.constexpr = tl.constexpr(16 if FORMAT == "nvfp4" else 32)
    PER: tl.constexpr = tl.constexpr(1 if FORMAT == "mxfp8" else 2)
    here = rows + tl.arange(0, BM) < height
    there = columns + tl.arange(0, BN) < width
    x_at = tl.multiple_of(X + (rows.to(tl.int64) * x_stride + first), ALIGN)
    w_at = tl.multiple_of(W + (columns.to(tl.int64) * w_stride + first // PER), ALIGN)
    s_at = SCALES + columns.to(tl.int64) * scales_stride + first // BLOCK
    along = tl.arange(0, BK)[:, None]
    x_tile = tl.arange(0, BM)[None, :] * x_stride + along
    sums = tl.zeros([BN, BM], tl.float32)
    for start in range(0, left, BK):
        inside = here[None, :] & (start + along < left)
        x = tl.load(x_at + start + x_tile, mask=inside, other=0.0)
        w = mx_weight(
            w_at, s_at, start, there, left, w_stride, scales_stride, FORMAT, X.dtype.element_ty,
            BN, BK,
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
    sums = linear_mx_sums(
        X, W, SCALES, row * BM, column * BN, height, width, 0, length, x_stride, w_stride,
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
    column, split = tl.program_id(0) * BN, tl.program_id(1)
    first = split * run * BK
    left = tl.minimum(length - first, run * BK)
    sums = linear_mx_sums(
        X, W, SCALES, split * 0, column, height, width, first, left, x_stride, w_stride,
        scales_stride, FORMAT, ALIGN, BM, BN, BK,
    )  # fmt: skip
    if WHOLE is not None:
        sums *= tl.load(WHOLE).to(tl.float32)
    rows, columns = tl.arange(0, BM), column + tl.arange(0, BN)
    at = (split * height + rows).to(tl.int64)[None, :] * width + columns[:, None]
    inside = (rows[None, :] < height) & (columns[:, None] < width)
    tl.store(PARTS + at, sums, mask=inside)
