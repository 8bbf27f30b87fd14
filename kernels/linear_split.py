"""Matmuls with few rows, split along the summed axis: the second launch adds the partial sums.

No atomics: the sums of the splits are added in their order, so that a call repeats bit for bit.
"""
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .linear_problem import LinearProblem
from .linear_tiles import linear_store

FILL = 256
"""Programs that a split launch aims at: about two on each multiprocessor of a large GPU."""

_ROWS, _COLUMNS = 4, 128


@triton.jit
def linear_reduce_kernel(
    PARTS,
    OUT,
    height,
    width,
    splits,
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
    """PARTS [splits, M, N] to OUT [M, N] through the epilogue."""
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    sums = tl.zeros([BM, BN], tl.float32)
    step = tl.cast(height, tl.int64) * width
    for split in range(0, splits):
        sums += tl.load(PARTS + split * step + at, mask=inside, other=0.0)
    linear_store(
        OUT, sums, rows, columns, height, width, E0, E0_row, E0_col, E1, E1_row, E1_col,
        E2, E2_row, E2_col, E3, E3_row, E3_col, ACTIVATION, FINISH,
    )  # fmt: skip


def reduce_launch(problem: LinearProblem, parts: Tensor) -> Launch:
    """Add the partial sums [splits, M, N] and finish them."""
    return Launch(
        linear_reduce_kernel,
        (triton.cdiv(problem.width, _COLUMNS), triton.cdiv(problem.height, _ROWS)),
        {
            "PARTS": parts,
            "OUT": problem.out,
            "height": problem.height,
            "width": problem.width,
            "splits": parts.shape[0],
            **problem.epilogue,
        },
        {**problem.finish, "BM": _ROWS, "BN": _COLUMNS},
        num_stages=1,
    )


def split_count(tiles: int, blocks: int) -> int:
    """How many runs of `blocks` steps to make so that `tiles` columns of tiles fill a GPU."""
    wanted = max(1, min(FILL // max(tiles, 1), blocks))
    return triton.cdiv(blocks, triton.cdiv(blocks, wanted))
