"""Int8 linear layers whose outlier columns stay in 16 bit, in one matmul (Dettmers et al. 2022).

LLM.int8(): the few columns of x that hold outliers are multiplied in 16 bit, all others as int8
codes by row and channel (sec. 3). Here a program sums its codes first, scales the sums, and goes
on adding the outliers' products to the same float32 tile.
"""
# pyright: reportMissingParameterType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import standard
from .launch import Config, Launch, Plan
from .linear_bytes import byte_matrices, shorter
from .linear_bytes_tiles import linear_bytes_dot, linear_bytes_scaled, linear_bytes_zeros
from .linear_llm_int8_cases import CASES, CONFIGS, FORMS
from .linear_problem import (
    EPILOGUE_SCHEMA,
    finished,
    linear_cost,
    linear_problem,
    nbytes,
    why_not_linear,
)
from .linear_tiles import linear_store_tile, linear_tile
from .linear_w8a8 import LONGEST
from .operator import define
from .quantized_rows import quantized_twin
from .rows_to_codes import codes_launch
from .spec import Cost
from .triton_spec import TritonSpec


@triton.jit
def linear_outlier_sums(
    sums,
    X,
    COLUMNS,
    WIDE,
    rows,
    columns,
    height,
    width,
    outliers,
    x_stride,
    wide_stride,
):
    """sums + X[:, COLUMNS] @ WIDE.T, as many columns at a time as a matrix instruction takes."""
    STEP: tl.constexpr = tl.constexpr(16)
    for start in range(0, outliers, STEP):
        at = start + tl.arange(0, STEP)
        here = (at < outliers)[None, :]
        column = tl.load(COLUMNS + at, mask=at < outliers, other=0)
        x_at = rows.to(tl.int64)[:, None] * x_stride + column[None, :]
        w_at = columns.to(tl.int64)[:, None] * wide_stride + at[None, :]
        x = tl.load(X + x_at, mask=(rows < height)[:, None] & here, other=0.0)
        w = tl.load(WIDE + w_at, mask=(columns < width)[:, None] & here, other=0.0)
        sums = tl.dot(x, w.T, sums)
    return sums


@triton.jit
def linear_llm_int8_kernel(
    X,
    W,
    VALUES,
    COLUMNS,
    WIDE,
    OUT,
    X_SCALE,
    W_SCALE,
    height,
    width,
    length,
    outliers,
    x_stride,
    w_stride,
    values_stride,
    wide_stride,
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
    """X int8 [M, K], W int8 [N, K]; VALUES [M, K], of which COLUMNS meet WIDE [N, outliers]."""
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
        sums, rows, columns, height, width, X_SCALE, 1, None, 0, W_SCALE, 1, None
    )
    scaled = linear_outlier_sums(
        scaled, VALUES, COLUMNS, WIDE, rows, columns, height, width, outliers, values_stride,
        wide_stride,
    )  # fmt: skip
    linear_store_tile(
        OUT, scaled, row * BM, column * BN, height, width, E0, E0_row, E0_col, E1, E1_row, E1_col,
        E2, E2_row, E2_col, E3, E3_row, E3_col, ACTIVATION, FINISH, BM, BN,
    )  # fmt: skip


def linear_llm_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    outliers: Tensor,
    outlier_weight: Tensor,
    regular: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(int8 part + x[..., outliers] @ outlier_weight.T + bias) * gate + residual.

    x: [..., K] in 16 bit; weight: int8 [N, K]; weight_scale: [N]; outliers: int32 columns of x;
    outlier_weight: their weights [N, outliers] in x's dtype; regular: uint8 [K], 1 for a column of
    the int8 part, whose other columns count as zeros, also for the scale of a row of x.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    codes, scale = quantized_twin(x.to(work) * regular, None, "int8")
    sums = (codes.double() @ weight.double().t()).to(work) * scale * weight_scale.to(work)
    sums = sums + x[..., outliers.long()].to(work) @ outlier_weight.to(work).t()
    return finished(sums, bias, gate, residual, activation).to(x.dtype)


def choose(height: int, width: int, arch: str) -> Config:
    """The largest tiles of which there are enough to fill a GPU."""
    serving = [config for config in CONFIGS if config.serves(arch)]
    if height <= 16:
        return serving[-1]

    def tiles(config: Config) -> int:
        tile = config.constants
        return triton.cdiv(height, tile["BM"]) * triton.cdiv(width, tile["BN"])

    return next((config for config in serving[:-2] if tiles(config) >= 108), serving[-2])


def plan(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    outliers: Tensor,
    outlier_weight: Tensor,
    regular: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    *,
    config: Config | None = None,
    arch: str = "sm_80",
    finish: Any = standard,
    operands: Sequence[Tensor | None] | None = None,
) -> Plan:
    """x [..., K], weight [N, K] with K side by side; the result is contiguous."""
    width = weight.shape[0]
    problem = linear_problem(x, width, (bias, gate, residual), activation, finish, operands)
    codes, scale, _, first = codes_launch(problem.rows, None, None, False, "int8", regular)
    matrices, fixed = byte_matrices(codes, weight)
    chosen = shorter(config or choose(problem.height, width, arch), fixed["ALIGN"])
    tile = chosen.constants
    count = triton.cdiv(problem.height, tile["BM"]) * triton.cdiv(width, tile["BN"])
    args = {
        **matrices,
        "VALUES": problem.rows,
        "COLUMNS": outliers,
        "WIDE": outlier_weight,
        "OUT": problem.out,
        "X_SCALE": scale,
        "W_SCALE": weight_scale,
        "outliers": outliers.shape[0],
        "values_stride": problem.rows.stride(0),
        "wide_stride": outlier_weight.stride(0),
        **problem.epilogue,
    }
    matmul = Launch(linear_llm_int8_kernel, (count,), args, {**problem.finish, **fixed})
    return Plan((problem.out,), (first, matmul.with_config(chosen)))


def why_not(
    arch: str,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    outliers: Tensor,
    outlier_weight: Tensor,
    regular: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> str | None:
    if weight.dim() != 2 or weight.dtype != torch.int8:
        return f"its weight is {weight.dtype} {list(weight.shape)}"
    width, length = weight.shape
    if weight.stride(1) != 1 or (outlier_weight.stride(-1) != 1 and outliers.numel() > 1):
        return "the columns of its weights do not lie side by side"
    if length > LONGEST:
        return f"its sums over {length} products may not fit in 32 bits"
    if weight_scale.shape != (width,) or not weight_scale.is_contiguous():
        return f"its weight has scales {list(weight_scale.shape)} for {width} channels"
    if outliers.dtype != torch.int32 or outliers.dim() != 1 or not outliers.is_contiguous():
        return f"its list of outlier columns is {outliers.dtype} {list(outliers.shape)}"
    if outlier_weight.shape != (width, outliers.shape[0]) or outlier_weight.dtype != x.dtype:
        return f"its outliers' weights are {outlier_weight.dtype} {list(outlier_weight.shape)}"
    if regular.dtype != torch.uint8 or regular.shape != (length,) or not regular.is_contiguous():
        return f"its mark of regular columns is {regular.dtype} {list(regular.shape)}"
    halves = (torch.float16, torch.bfloat16)
    return why_not_linear(x, width, length, (bias, gate, residual), activation, halves)


def cost(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    outliers: Tensor,
    outlier_weight: Tensor,
    regular: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Cost:
    """As a linear layer of int8 weights, with codes written and read, and the outliers' product."""
    parameters = nbytes(weight, weight_scale, outliers, outlier_weight, regular)
    width, tokens = weight.shape[0], x.numel() // max(x.shape[-1], 1)
    whole = linear_cost(x, width, parameters, (bias, gate, residual))
    extra = 2 * tokens * width * outliers.shape[0]
    return Cost(whole.nbytes + 2 * x.numel(), whole.flops + extra)


SPEC = TritonSpec(
    name="linear_llm_int8",
    schema="planish::linear_llm_int8(Tensor x, Tensor weight, Tensor weight_scale, "
    "Tensor outliers, Tensor outlier_weight, Tensor regular, " + EPILOGUE_SCHEMA + ") -> Tensor",
    serves="int8 linear layers with outlier columns in 16 bit",
    twin=linear_llm_int8,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=CASES,
    forms=FORMS,
)

define(SPEC)
