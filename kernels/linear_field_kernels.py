"""Matmul kernels on weights coded in bit fields: one launch for many rows, a split for few.

They compute (W x.T).T: the decoded weight is the left operand, which stays in registers, also on
architectures whose matrix units read the right one from shared memory alone.
"""
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from .linear_fields import linear_field_sums
from .linear_tiles import linear_store_tile, linear_tile


@triton.jit
def linear_field_kernel(
    X,
    WORDS,
    SCALE,
    ZERO,
    BOOK,
    SCALE_BOOK,
    SECOND,
    OFFSET,
    OUT,
    height,
    width,
    length,
    x_stride,
    groups,
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
    TILES: tl.constexpr,
):
    """X [M, K], WORDS [blocks, planes, N, RUN] to OUT [M, N]; see `linear_field_sums`."""
    row, column = linear_tile(tl.program_id(0), tl.cdiv(height, BM), tl.cdiv(width, BN), TILES)
    sums = linear_field_sums(
        X, WORDS, SCALE, ZERO, BOOK, SCALE_BOOK, SECOND, OFFSET, row * BM, column * BN, height,
        width, length, x_stride, groups, 0, blocks, None, 0, None, 0, None, BITS, RUN, FIELDS,
        TOGETHER, GROUP, CENTRE, BOOKS, EVERY, PRECISION, ALIGN, BM, BN,
    )  # fmt: skip
    linear_store_tile(
        OUT, sums.T, row * BM, column * BN, height, width, E0, E0_row, E0_col, E1, E1_row, E1_col,
        E2, E2_row, E2_col, E3, E3_row, E3_col, ACTIVATION, FINISH, BM, BN,
    )  # fmt: skip


@triton.jit
def linear_field_split_kernel(
    X,
    WORDS,
    SCALE,
    ZERO,
    BOOK,
    SCALE_BOOK,
    SECOND,
    OFFSET,
    PARTS,
    height,
    width,
    length,
    x_stride,
    groups,
    blocks,
    run,
    P1,
    P1_row,
    P2,
    P2_row,
    PREPARE: tl.constexpr,
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
    """Sums over `run` blocks for each split: PARTS [splits, M, N], M up to BM."""
    column, split = tl.program_id(0) * BN, tl.program_id(1)
    sums = linear_field_sums(
        X, WORDS, SCALE, ZERO, BOOK, SCALE_BOOK, SECOND, OFFSET, split * 0, column, height, width,
        length, x_stride, groups, split * run, tl.minimum(split * run + run, blocks), P1, P1_row,
        P2, P2_row, PREPARE, BITS, RUN, FIELDS, TOGETHER, GROUP, CENTRE, BOOKS, EVERY, PRECISION,
        ALIGN, BM, BN,
    )  # fmt: skip
    rows, columns = tl.arange(0, BM), column + tl.arange(0, BN)
    at = (split * height + rows).to(tl.int64)[None, :] * width + columns[:, None]
    inside = (rows < height)[None, :] & (columns < width)[:, None]
    tl.store(PARTS + at, sums, mask=inside)
