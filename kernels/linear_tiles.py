"""Pieces of the matmul kernels: the order of the tiles, and a tile's way through its epilogue."""
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def linear_tile(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile, in an order that keeps GROUP rows of tiles together for the L2."""
    in_group = GROUP * tiles_n
    first = program // in_group * GROUP
    high = tl.minimum(tiles_m - first, GROUP)
    return first + program % in_group % high, program % in_group // high


@triton.jit
def linear_store(
    OUT,
    sums,
    rows,
    columns,
    height,
    width,
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
):
    """The epilogue of float32 sums [rows, columns], rounded into OUT [height, width]."""
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    sums = FINISH(
        sums, rows, columns, inside, E0, E0_row, E0_col, E1, E1_row, E1_col,
        E2, E2_row, E2_col, E3, E3_row, E3_col, ACTIVATION,
    )  # fmt: skip
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(OUT + at, sums.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def linear_store_halves(
    OUT,
    sums,
    row,
    column,
    height,
    width,
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
    """A tile, half of its columns at a time."""
    HALF: tl.constexpr = BN // 2
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, HALF)
    left, right = sums.reshape(BM, 2, HALF).permute(0, 2, 1).split()
    linear_store(
        OUT, left, rows, columns, height, width, E0, E0_row, E0_col, E1, E1_row, E1_col,
        E2, E2_row, E2_col, E3, E3_row, E3_col, ACTIVATION, FINISH,
    )  # fmt: skip
    linear_store(
        OUT, right, rows, columns + HALF, height, width, E0, E0_row, E0_col, E1, E1_row, E1_col,
        E2, E2_row, E2_col, E3, E3_row, E3_col, ACTIVATION, FINISH,
    )  # fmt: skip


@triton.jit
def linear_store_tile(
    OUT,
    sums,
    row,
    column,
    height,
    width,
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
    """The tile that starts at (row, column), some columns at a time: fewer registers."""
    if BN < 128:
        linear_store_halves(
            OUT, sums, row, column, height, width, E0, E0_row, E0_col, E1, E1_row, E1_col,
        E2, E2_row, E2_col, E3, E3_row, E3_col, ACTIVATION, FINISH, BM, BN,
        )  # fmt: skip
    else:
        HALF: tl.constexpr = BN // 2
        left, right = sums.reshape(BM, 2, HALF).permute(0, 2, 1).split()
        linear_store_halves(
            OUT, left, row, column, height, width, E0, E0_row, E0_col, E1, E1_row, E1_col,
        E2, E2_row, E2_col, E3, E3_row, E3_col, ACTIVATION, FINISH, BM, HALF,
        )  # fmt: skip
        linear_store_halves(
            OUT, right, row, column + HALF, height, width, E0, E0_row, E0_col, E1, E1_row, E1_col,
        E2, E2_row, E2_col, E3, E3_row, E3_col, ACTIVATION, FINISH, BM, HALF,
        )  # fmt: skip
