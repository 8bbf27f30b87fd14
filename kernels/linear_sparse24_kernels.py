"""Matmul kernels on 2:4 sparse weights, which are expanded in registers to dense tiles."""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .linear_tiles import linear_store_tile, linear_tile


@triton.jit
def linear_sparse24_expanded(first, second, codes, RUN: tl.constexpr, BN: tl.constexpr):
    """Two values [BN, RUN] of each group of four and their places to a dense tile [BN, 4 RUN]."""
    low, high = codes & 3, codes >> 2
    nothing = tl.zeros_like(first)
    zero = tl.where(low == 0, first, nothing)
    one = tl.where(low == 1, first, tl.where(high == 1, second, nothing))
    two = tl.where(low == 2, first, tl.where(high == 2, second, nothing))
    three = tl.where(high == 3, second, nothing)
    return tl.join(tl.join(zero, two), tl.join(one, three)).reshape(BN, 4 * RUN)


@triton.jit
def linear_sparse24_sums(
    X,
    VALUES,
    PLACES,
    row,
    column,
    height,
    width,
    length,
    x_stride,
    start,
    stop,
    RUN: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums [BN, BM] of W times X.T over the blocks of places start to stop."""
    length, x_stride = length * ALIGN, x_stride * ALIGN
    rows, columns, along = row + tl.arange(0, BM), column + tl.arange(0, BN), tl.arange(0, RUN)
    quads = tl.arange(0, 4 * RUN)
    high, wide = (rows < height)[:, None], (columns < width)[:, None]
    plane = tl.cast(width, tl.int64) * RUN
    tile = tl.arange(0, BN)[:, None] * RUN + along[None, :]
    p_at, v_at = PLACES + column.to(tl.int64) * RUN, VALUES + column.to(tl.int64) * RUN
    x_at = X + row.to(tl.int64) * x_stride
    x_tile = tl.arange(0, BM)[:, None] * x_stride + quads[None, :]
    sums = tl.zeros([BN, BM], tl.float32)
    for block in range(start, stop):
        words = tl.load(tl.multiple_of(p_at + block * plane, 16) + tile, mask=wide, other=0)
        for field in tl.static_range(4):
            at = tl.multiple_of(v_at + (block * 4 + field) * 2 * plane, 16) + tile
            first = tl.load(at, mask=wide, other=0.0)
            second = tl.load(at + plane, mask=wide, other=0.0)
            w = linear_sparse24_expanded(first, second, (words >> (4 * field)) & 15, RUN, BN)
            k = (block * 4 + field) * (4 * RUN)
            inside = high & (k + quads < length)[None, :]
            x = tl.load(tl.multiple_of(x_at + k, 2 * ALIGN) + x_tile, mask=inside, other=0.0)
            sums = tl.dot(w, x.T, sums, input_precision=PRECISION)
    return sums


@triton.jit
def linear_sparse24_kernel(
    X,
    VALUES,
    PLACES,
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
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TILES: tl.constexpr,
):
    row, column = linear_tile(tl.program_id(0), tl.cdiv(height, BM), tl.cdiv(width, BN), TILES)
    sums = linear_sparse24_sums(
        X, VALUES, PLACES, row * BM, column * BN, height, width, length, x_stride, 0, blocks, RUN,
        PRECISION, ALIGN, BM, BN,
    )  # fmt: skip
    linear_store_tile(
        OUT, sums.T, row * BM, column * BN, height, width, E0, E0_row, E0_col, E1, E1_row, E1_col,
        E2, E2_row, E2_col, E3, E3_row, E3_col, ACTIVATION, FINISH, BM, BN,
    )  # fmt: skip


@triton.jit
def linear_sparse24_split_kernel(
    X,
    VALUES,
    PLACES,
    PARTS,
    height,
    width,
    length,
    x_stride,
    blocks,
    run,
    RUN: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums over `run` blocks for each split: PARTS [splits, M, N], M up to BM."""
    column, split = tl.program_id(0) * BN, tl.program_id(1)
    sums = linear_sparse24_sums(
        X, VALUES, PLACES, split * 0, column, height, width, length, x_stride, split * run,
        tl.minimum(split * run + run, blocks), RUN, PRECISION, ALIGN, BM, BN,
    )  # fmt: skip
    rows, columns = tl.arange(0, BM), column + tl.arange(0, BN)
    at = (split * height + rows).to(tl.int64)[None, :] * width + columns[:, None]
    inside = (rows < height)[None, :] & (columns < width)[:, None]
    tl.store(PARTS + at, sums, mask=inside)
