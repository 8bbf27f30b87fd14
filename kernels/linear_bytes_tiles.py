"""Matmul tiles of bytes: int8 codes with int32 sums, or fp8 with float32 ones; scales at the end.

The sums' type follows from the operands'. An fp8 tensor core of Hopper keeps only some 14 bits
while it adds, so the sums of a step go to float32 registers (DeepSeek-AI 2024, sec. 3.3.2): by an
addition here, since the one that tl.dot makes of max_num_imprecise_acc does not wait for the
matrix instruction whose result it reads.
"""
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from .linear_tiles import linear_store, linear_store_tile, linear_tile


@triton.jit
def linear_bytes_zeros(X, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.int32 if X.dtype.element_ty == tl.int8 else tl.float32)


@triton.jit
def linear_bytes_dot(a, b, sums):
    if a.dtype == tl.int8:
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    else:
        sums += tl.dot(a, b)
    return sums


@triton.jit
def linear_bytes_scaled(
    sums,
    rows,
    columns,
    height,
    width,
    X_SCALE,
    x_scale_step,
    X_ZERO,
    x_zero_step,
    W_SCALE,
    w_scale_step,
    W_SUMS,
):
    """(sums - zero * weight sums) * token's scale * channel's scale, in float32."""
    here, there = rows < height, columns < width
    if W_SUMS is not None:
        zero = tl.load(X_ZERO + rows * x_zero_step, mask=here, other=0)
        sums -= zero[:, None] * tl.load(W_SUMS + columns, mask=there, other=0)[None, :]
    x_scale = tl.load(X_SCALE + rows * x_scale_step, mask=here, other=0.0).to(tl.float32)
    w_scale = tl.load(W_SCALE + columns * w_scale_step, mask=there, other=0.0).to(tl.float32)
    return sums.to(tl.float32) * x_scale[:, None] * w_scale[None, :]


@triton.jit
def linear_bytes_kernel(
    X,
    W,
    OUT,
    X_SCALE,
    X_ZERO,
    W_SCALE,
    W_SUMS,
    height,
    width,
    length,
    x_stride,
    w_stride,
    x_scale_step,
    x_zero_step,
    w_scale_step,
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
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """X [M, K], W [N, K], of int8 or fp8, both with K side by side, to OUT [M, N]."""
    length, x_stride, w_stride = length * ALIGN, x_stride * ALIGN, w_stride * ALIGN
    row, column = linear_tile(tl.program_id(0), tl.cdiv(height, BM), tl.cdiv(width, BN), GROUP)
    rows, columns = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    along = tl.arange(0, BK)
    x_at = tl.multiple_of(X + (row * BM).to(tl.int64) * x_stride, ALIGN)
    w_at = tl.multiple_of(W + (column * BN).to(tl.int64) * w_stride, ALIGN)
    x_tile = tl.arange(0, BM)[:, None] * x_stride + along[None, :]
    w_tile = tl.arange(0, BN)[:, None] * w_stride + along[None, :]
    sums = linear_bytes_zeros(X, BM, BN)
    for start in range(0, length, BK):
        here = (start + along < length)[None, :]
        x = tl.load(x_at + start + x_tile, mask=(rows < height)[:, None] & here, other=0.0)
        w = tl.load(w_at + start + w_tile, mask=(columns < width)[:, None] & here, other=0.0)
        sums = linear_bytes_dot(x, w.T, sums)
    scaled = linear_bytes_scaled(
        sums, rows, columns, height, width, X_SCALE, x_scale_step, X_ZERO, x_zero_step,
        W_SCALE, w_scale_step, W_SUMS,
    )  # fmt: skip
    linear_store_tile(
        OUT, scaled, row * BM, column * BN, height, width, E0, E0_row, E0_col, E1, E1_row, E1_col,
        E2, E2_row, E2_col, E3, E3_row, E3_col, ACTIVATION, FINISH, BM, BN,
    )  # fmt: skip


@triton.jit
def linear_bytes_split_kernel(
    X,
    W,
    PARTS,
    height,
    width,
    length,
    x_stride,
    w_stride,
    run,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Sums over `run` columns of X [M, K] for each split: PARTS [splits, M, N], M to BM.

    The weight is the left operand: its tile is tall, x's rows are few.
    """
    length, x_stride, w_stride = length * ALIGN, x_stride * ALIGN, w_stride * ALIGN
    run *= BK
    rows = tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    along = tl.arange(0, BK)
    x_at = tl.multiple_of(X + split * run, ALIGN)
    w_at = W + (tl.program_id(0) * BN).to(tl.int64) * w_stride + split * run
    w_at = tl.multiple_of(w_at, ALIGN)
    x_tile = rows[:, None] * x_stride + along[None, :]
    w_tile = tl.arange(0, BN)[:, None] * w_stride + along[None, :]
    sums = linear_bytes_zeros(X, BN, BM)
    left = tl.minimum(length - split * run, run)
    for start in range(0, left, BK):
        here = (start + along < left)[None, :]
        x = tl.load(x_at + start + x_tile, mask=(rows < height)[:, None] & here, other=0.0)
        w = tl.load(w_at + start + w_tile, mask=(columns < width)[:, None] & here, other=0.0)
        sums = linear_bytes_dot(w, x.T, sums)
    at = (split * height + rows).to(tl.int64)[None, :] * width + columns[:, None]
    inside = (rows[None, :] < height) & (columns[:, None] < width)
    tl.store(PARTS + at, sums, mask=inside)


@triton.jit
def linear_bytes_reduce_kernel(
    PARTS,
    OUT,
    X_SCALE,
    X_ZERO,
    W_SCALE,
    W_SUMS,
    height,
    width,
    splits,
    x_scale_step,
    x_zero_step,
    w_scale_step,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """PARTS [splits, M, N] to OUT [M, N] through the scales and the epilogue."""
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    sums = tl.zeros([BM, BN], PARTS.dtype.element_ty)
    step = tl.cast(height, tl.int64) * width
    for split in range(0, splits):
        sums += tl.load(PARTS + split * step + at, mask=inside, other=0.0)
    scaled = linear_bytes_scaled(
        sums, rows, columns, height, width, X_SCALE, x_scale_step, X_ZERO, x_zero_step,
        W_SCALE, w_scale_step, W_SUMS,
    )  # fmt: skip
    linear_store(
        OUT, scaled, rows, columns, height, width, E0, E0_row, E0_col, E1, E1_row, E1_col,
        E2, E2_row, E2_col, E3, E3_row, E3_col, ACTIVATION, FINISH,
    )  # fmt: skip
