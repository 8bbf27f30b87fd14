"""Linear layers on dense weights with their epilogue in the same launch, on a GPU.

Many rows: tiles of the result, in an order that reuses the L2 (Tillet et al. 2019, sec. 4). Few
rows: the weight is the left operand, whose tile is tall, and the summed axis is split over
programs (`linear_split`), since one row of tiles would leave most of a GPU idle.
"""
# pyright: reportMissingParameterType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import standard
from .launch import Config, Launch, Plan
from .linear_dense_cases import CASES, FORMS
from .linear_problem import (
    EPILOGUE_SCHEMA,
    PRECISIONS,
    LinearProblem,
    linear_cost,
    linear_problem,
    linear_twin,
    nbytes,
    why_not_linear,
)
from .linear_split import reduce_launch, split_count
from .linear_tiles import linear_store_tile, linear_tile
from .operator import define
from .prologue import Prologue, prologue_applied, prologue_arguments, prologue_launches
from .spec import Cost
from .triton_spec import TritonSpec

FEW = 16
"""Rows up to which the summed axis is split."""


@triton.jit
def linear_dense_kernel(
    X,
    W,
    OUT,
    height,
    width,
    length,
    x_stride,
    w_stride,
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
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """X [M, K], W [N, K] to OUT [M, N], a tile for each program."""
    length, x_stride, w_stride = length * ALIGN, x_stride * ALIGN, w_stride * ALIGN
    row, column = linear_tile(tl.program_id(0), tl.cdiv(height, BM), tl.cdiv(width, BN), GROUP)
    rows, columns = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    along = tl.arange(0, BK)
    x_at = tl.multiple_of(X + (row * BM).to(tl.int64) * x_stride, 2 * ALIGN)
    w_at = tl.multiple_of(W + (column * BN).to(tl.int64) * w_stride, 2 * ALIGN)
    x_tile = tl.arange(0, BM)[:, None] * x_stride + along[None, :]
    w_tile = tl.arange(0, BN)[:, None] * w_stride + along[None, :]
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(0, length, BK):
        here = (start + along < length)[None, :]
        x = tl.load(x_at + start + x_tile, mask=(rows < height)[:, None] & here, other=0.0)
        w = tl.load(w_at + start + w_tile, mask=(columns < width)[:, None] & here, other=0.0)
        sums = tl.dot(x, w.T, sums, input_precision=PRECISION)
    linear_store_tile(
        OUT, sums, row * BM, column * BN, height, width, E0, E0_row, E0_col, E1, E1_row, E1_col,
        E2, E2_row, E2_col, E3, E3_row, E3_col, ACTIVATION, FINISH, BM, BN,
    )  # fmt: skip


@triton.jit
def linear_dense_split_kernel(
    X,
    W,
    PARTS,
    height,
    width,
    length,
    x_stride,
    w_stride,
    run,
    P1,
    P1_row,
    P2,
    P2_row,
    PREPARE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Sums over `run` columns of X [M, K] for each split: PARTS [splits, M, N], M up to BM."""
    length, x_stride, w_stride = length * ALIGN, x_stride * ALIGN, w_stride * ALIGN
    run *= BK
    rows = tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    along = tl.arange(0, BK)
    x_at = tl.multiple_of(X + (split * run).to(tl.int64), 2 * ALIGN)
    w_at = W + (tl.program_id(0) * BN).to(tl.int64) * w_stride + split * run
    w_at = tl.multiple_of(w_at, 2 * ALIGN)
    x_tile = rows[:, None] * x_stride + along[None, :]
    w_tile = tl.arange(0, BN)[:, None] * w_stride + along[None, :]
    sums = tl.zeros([BN, BM], tl.float32)
    left = tl.minimum(length - split * run, run)
    for start in range(0, left, BK):
        here = (start + along < left)[None, :]
        inside = (rows < height)[:, None] & here
        x = tl.load(x_at + start + x_tile, mask=inside, other=0.0)
        at = split * run + start + along
        x = prologue_applied(x, rows, at, inside, P1, P1_row, P2, P2_row, PREPARE)
        w = tl.load(w_at + start + w_tile, mask=(columns < width)[:, None] & here, other=0.0)
        sums = tl.dot(w, x.T, sums, input_precision=PRECISION)
    at = (split * height + rows).to(tl.int64)[None, :] * width + columns[:, None]
    inside = (rows[None, :] < height) & (columns[:, None] < width)
    tl.store(PARTS + at, sums, mask=inside)


CONFIGS = (
    Config({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, 8, 3, ("sm_80", "sm_9", "sm_10")),
    Config({"BM": 128, "BN": 128, "BK": 32, "GROUP": 8}, 8, 4, ("sm_89", "sm_12")),
    Config({"BM": 64, "BN": 64, "BK": 32, "GROUP": 8}, 4, 4, ("sm_8", "sm_9", "sm_12")),
    Config({"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, 4, 3, ("sm_10",)),
    Config({"BM": 128, "BN": 128, "BK": 32, "GROUP": 8}, 8, 2, ("gfx9",)),
    Config({"BM": 64, "BN": 64, "BK": 32, "GROUP": 8}, 4, 2, ("gfx",)),
    Config({"BM": 16, "BN": 64, "BK": 64}, 4, 4, ("sm_",)),
    Config({"BM": 16, "BN": 64, "BK": 64}, 4, 2, ("gfx",)),
)
"""BK counts elements of two bytes; of float32 a step takes half as many."""


def choose(height: int, width: int, arch: str) -> Config:
    """Split for few rows; else the largest tiles of which there are enough to fill a GPU."""
    split, tiled = [], []
    for config in CONFIGS:
        if config.serves(arch):
            (tiled if "GROUP" in config.constants else split).append(config)
    if height <= FEW:
        return split[0]

    def tiles(config: Config) -> int:
        tile = config.constants
        return triton.cdiv(height, tile["BM"]) * triton.cdiv(width, tile["BN"])

    return next((config for config in tiled[:-1] if tiles(config) >= 108), tiled[-1])


def linear_dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
) -> Tensor:
    """The twin; `precision` says what a GPU may do with float32 and changes nothing here."""
    return linear_twin(x, weight, bias, gate, residual, activation)


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
    *,
    config: Config | None = None,
    arch: str = "sm_80",
    finish: Any = standard,
    operands: Sequence[Tensor | None] | None = None,
    prologue: Prologue | None = None,
) -> Plan:
    """x [..., K], weight [N, K] with columns side by side; the result is contiguous.

    prologue: what becomes of x before the product.
    """
    problem = linear_problem(
        x, weight.shape[0], (bias, gate, residual), activation, finish, operands
    )
    chosen = config or choose(problem.height, problem.width, arch)
    split = "GROUP" not in chosen.constants
    problem, prologue, before = prologue_launches(problem, prologue, split)
    align = _aligned(problem.rows, weight)
    short = _shorter(x.dtype, precision, align)
    short *= 2 if align == 1 and arch.startswith("sm_10") else 1  # single loads spill there
    tile = {**chosen.constants, "BK": max(16, chosen.constants["BK"] // short)}
    args = {
        "X": problem.rows,
        "W": weight,
        "height": problem.height,
        "width": problem.width,
        "length": problem.length // align,
        "x_stride": problem.rows.stride(0) // align,
        "w_stride": weight.stride(0) // align,
    }
    fixed = {"PRECISION": precision, "ALIGN": align}
    chosen = replace(chosen, constants=tile)
    if split:
        return _split(problem, args, fixed, chosen, prologue)
    made = _tiled(problem, args, fixed, chosen)
    return Plan(made.outputs, (*before, *made.launches))


def _shorter(dtype: torch.dtype, precision: str, align: int) -> int:
    """Steps take fewer columns where elements are wide or are loaded one by one.

    And where no matrix unit multiplies: a step is unrolled then, and holds its operands at once.
    """
    wide = 2 if dtype == torch.float32 else 1
    return wide * (4 if wide == 2 and precision == "ieee" else 1) * (1 if align > 1 else 2)


def _aligned(rows: Tensor, weight: Tensor) -> int:
    """8 if rows of both start on 16 bytes and end on 8 elements, so that loads are wide; else 1."""
    sizes = (rows.shape[1], rows.stride(0), weight.stride(0))
    starts = [0 if t.is_meta else t.data_ptr() for t in (rows, weight)]
    return 1 if any(n % 8 for n in sizes) or any(n % 16 for n in starts) else 8


def _tiled(
    problem: LinearProblem, args: dict[str, Any], fixed: dict[str, Any], config: Config
) -> Plan:
    tile = config.constants
    count = triton.cdiv(problem.height, tile["BM"]) * triton.cdiv(problem.width, tile["BN"])
    launch = Launch(
        linear_dense_kernel,
        (count,),
        {**args, "OUT": problem.out, **problem.epilogue},
        {**problem.finish, **fixed},
    )
    return Plan((problem.out,), (launch.with_config(config),))


def _split(
    problem: LinearProblem,
    args: dict[str, Any],
    fixed: dict[str, Any],
    config: Config,
    prologue: Prologue | None,
) -> Plan:
    tile = config.constants
    columns = triton.cdiv(problem.width, tile["BN"])
    blocks = triton.cdiv(problem.length, tile["BK"])
    splits = split_count(columns, blocks)
    parts = problem.scratch(splits)
    sources, prepare = prologue_arguments(prologue)
    launch = Launch(
        linear_dense_split_kernel,
        (columns, splits if problem.height else 0),
        {**args, **sources, "PARTS": parts, "run": triton.cdiv(blocks, splits)},
        {**fixed, **prepare},
    )
    return Plan((problem.out,), (launch.with_config(config), reduce_launch(problem, parts)))


def why_not(
    arch: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
) -> str | None:
    if weight.dim() != 2 or weight.dtype != x.dtype:
        return f"its weight is {weight.dtype} {list(weight.shape)}"
    if weight.stride(1) != 1:
        return "the columns of its weight do not lie side by side"
    if precision not in PRECISIONS:
        return f"there is no precision {precision}"
    width, length = weight.shape
    return why_not_linear(x, width, length, (bias, gate, residual), activation)


def cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
) -> Cost:
    return linear_cost(x, weight.shape[0], nbytes(weight), (bias, gate, residual))


SPEC = TritonSpec(
    name="linear_dense",
    schema="planish::linear_dense(Tensor x, Tensor weight, "
    + EPILOGUE_SCHEMA
    + ", str precision='ieee') -> Tensor",
    serves="linear layers on dense weights",
    twin=linear_dense,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=CASES,
    forms=FORMS,
)

define(SPEC)
