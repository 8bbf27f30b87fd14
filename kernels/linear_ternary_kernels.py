"""Matmul kernels on ternary weights and int8 activations: int8 products, int32 sums.

(W x.T).T as in `linear_field_kernels`: a field of a tile of words is a whole left operand.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .linear_tiles import linear_store_tile, linear_tile


@triton.jit
def linear_ternary_sums(
    X,
    X_SCALE,
    WORDS,
    SCALE,
    row,
    column,
    height,
    width,
    length,
    x_stride,
    start,
    stop,
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Scaled sums [BN, BM] of W times X.T over the blocks start to stop, float32.

    WORDS: int16 [blocks, N, RUN], 8 fields of 2 bits, each a weight plus one. X: int8 [M, K].
    """
    length, x_stride = length * ALIGN, x_stride * ALIGN
    rows, columns, along = row + tl.arange(0, BM), column + tl.arange(0, BN), tl.arange(0, RUN)
    high, wide = rows < height, columns < width
    plane = tl.cast(width, tl.int64) * RUN
    w_at = WORDS + column.to(tl.int64) * RUN
    w_tile = tl.arange(0, BN)[:, None] * RUN + along[None, :]
    x_at = X + row.to(tl.int64) * x_stride
    x_tile = tl.arange(0, BM)[:, None] * x_stride + along[None, :]
    sums = tl.zeros([BN, BM], tl.int32)
    for block in range(start, stop):
        at = tl.multiple_of(w_at + block * plane, 16) + w_tile
        words = tl.load(at, mask=wide[:, None], other=0)
        for field in tl.static_range(8):
            k = (block * 8 + field) * RUN
            inside = high[:, None] & (k + along < length)[None, :]
            x = tl.load(tl.multiple_of(x_at + k, ALIGN) + x_tile, mask=inside, other=0)
            w = (((words >> (2 * field)) & 3) - 1).to(tl.int8)
            sums = tl.dot(w, x.T, sums, out_dtype=tl.int32)
    scale = tl.load(SCALE + columns, mask=wide, other=0.0).to(tl.float32)
    of_rows = tl.load(X_SCALE + rows, mask=high, other=0.0).to(tl.float32)
    return sums.to(tl.float32) * scale[:, None] * of_rows[None, :]


@triton.jit
def linear_ternary_kernel(
    X,
    X_SCALE,
    WORDS,
    SCALE,
    OUT,
    height,
    width,
    length,
    x_stride,
    blocks,
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
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TILES: tl.constexpr,
):
    row, column = linear_tile(tl.program_id(0), tl.cdiv(height, BM), tl.cdiv(width, BN), TILES)
    sums = linear_ternary_sums(
        X, X_SCALE, WORDS, SCALE, row * BM, column * BN, height, width, length, x_stride, 0, blocks,
        RUN, ALIGN, BM, BN,
    )  # fmt: skip
    linear_store_tile(
        OUT, sums.T, row * BM, column * BN, height, width, E0, E0_row, E0_col, E1, E1_row, E1_col,
        E2, E2_row, E2_col, E3, E3_row, E3_col, ACTIVATION, FINISH, BM, BN,
    )  # fmt: skip


@triton.jit
def linear_ternary_split_kernel(
    X,
    X_SCALE,
    WORDS,
    SCALE,
    PARTS,
    height,
    width,
    length,
    x_stride,
    blocks,
    run,
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums over `run` blocks for each split: PARTS [splits, M, N], M up to BM."""
    column, split = tl.program_id(0) * BN, tl.program_id(1)
    sums = linear_ternary_sums(
        X, X_SCALE, WORDS, SCALE, split * 0, column, height, width, length, x_stride, split * run,
        tl.minimum(split * run + run, blocks), RUN, ALIGN, BM, BN,
    )  # fmt: skip
    rows, columns = tl.arange(0, BM), column + tl.arange(0, BN)
    at = (split * height + rows).to(tl.int64)[None, :] * width + columns[:, None]
    inside = (rows < height)[None, :] & (columns < width)[:, None]
    tl.store(PARTS + at, sums, mask=inside)
