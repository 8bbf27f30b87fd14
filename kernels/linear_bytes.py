"""Plans of the matmuls of bytes: their launches, tiled or split, from codes, weight and scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from .launch import Config, Launch
from .linear_bytes_tiles import (
    linear_bytes_kernel,
    linear_bytes_reduce_kernel,
    linear_bytes_split_kernel,
)
from .linear_problem import LinearProblem
from .linear_split import split_count

FEW = 16
"""Rows up to which the summed axis is split."""


def by_token(values: Tensor, x: Tensor) -> Tensor:
    """One value, or one for each token of x [..., K], as a column beside x."""
    return values.reshape(1) if values.numel() == 1 else values.reshape(*x.shape[:-1], 1)


def result_dtype(x: Tensor, weight_scale: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype asked for; else x's where that is no code, else the weight scale's."""
    return dtype or (x.dtype if x.dtype.itemsize > 1 else weight_scale.dtype)


def choose(configs: Sequence[Config], height: int, width: int, arch: str) -> Config:
    """Split for few rows; else the largest tiles of which there are enough to fill a GPU."""
    serving = [config for config in configs if config.serves(arch)]
    split = [config for config in serving if "GROUP" not in config.constants]
    tiled = [config for config in serving if "GROUP" in config.constants]
    if height <= FEW:
        return split[0]

    def tiles(config: Config) -> int:
        tile = config.constants
        return triton.cdiv(height, tile["BM"]) * triton.cdiv(width, tile["BN"])

    return next((config for config in tiled[:-1] if tiles(config) >= 108), tiled[-1])


def scale_arguments(
    x_scale: Tensor, x_zero: Tensor | None, weight_scale: Tensor, weight_sums: Tensor | None
) -> dict[str, Any]:
    """Scales of one element are read at a step of zero."""
    return {
        "X_SCALE": x_scale,
        "X_ZERO": None if weight_sums is None else x_zero,
        "W_SCALE": weight_scale,
        "W_SUMS": weight_sums,
        "x_scale_step": int(x_scale.numel() != 1),
        "x_zero_step": 0 if x_zero is None else int(x_zero.numel() != 1),
        "w_scale_step": int(weight_scale.numel() != 1),
    }


def matmul_launches(
    problem: LinearProblem, weight: Tensor, scales: dict[str, Any], config: Config
) -> tuple[Launch, ...]:
    """problem.rows: codes [M, K] of the weight's dtype; scales: of `scale_arguments`."""
    matrices, fixed = byte_matrices(problem.rows, weight)
    config = shorter(config, fixed["ALIGN"])
    tiled = "GROUP" in config.constants
    return (_tiled if tiled else _split)(problem, matrices, fixed, scales, config)


def byte_matrices(rows: Tensor, weight: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants of matrices of bytes [M, K], [N, K].

    Sizes and strides are passed in units of ALIGN, so that a kernel knows that rows which start on
    16 bytes do, and loads 16 at once.
    """
    length, strides = rows.shape[1], (rows.stride(0), weight.stride(0))
    starts = [0 if t.is_meta else t.data_ptr() for t in (rows, weight)]
    align = 1 if any(n % 16 for n in (length, *strides, *starts)) else 16
    args = {
        "X": rows,
        "W": weight,
        "height": rows.shape[0],
        "width": weight.shape[0],
        "length": length // align,
        "x_stride": strides[0] // align,
        "w_stride": strides[1] // align,
    }
    return args, {"ALIGN": align}


def shorter(config: Config, align: int) -> Config:
    """Bytes that are loaded one by one take a register each: a step takes fewer columns then."""
    tile = config.constants
    if align > 1:
        return config
    return replace(config, constants={**tile, "BK": max(32, tile["BK"] // 4)})


def _tiled(
    problem: LinearProblem,
    matrices: dict[str, Any],
    fixed: dict[str, Any],
    scales: dict[str, Any],
    config: Config,
) -> tuple[Launch, ...]:
    tile = config.constants
    count = triton.cdiv(problem.height, tile["BM"]) * triton.cdiv(problem.width, tile["BN"])
    args = {**matrices, "OUT": problem.out, **scales, **problem.epilogue}
    launch = Launch(linear_bytes_kernel, (count,), args, {**problem.finish, **fixed})
    return (launch.with_config(config),)


def _split(
    problem: LinearProblem,
    matrices: dict[str, Any],
    fixed: dict[str, Any],
    scales: dict[str, Any],
    config: Config,
) -> tuple[Launch, ...]:
    tile = config.constants
    columns = triton.cdiv(problem.width, tile["BN"])
    blocks = triton.cdiv(problem.length, tile["BK"])
    splits = split_count(columns, blocks)
    height, width = problem.height, problem.width
    kind = torch.int32 if problem.rows.dtype == torch.int8 else torch.float32
    parts = torch.empty(splits, height, width, dtype=kind, device=problem.rows.device)
    launch = Launch(
        linear_bytes_split_kernel,
        (columns, splits if height else 0),
        {**matrices, "PARTS": parts, "run": triton.cdiv(blocks, splits)},
        fixed,
    )
    sizes = {"height": height, "width": width, "splits": splits}
    reduce = Launch(
        linear_bytes_reduce_kernel,
        (triton.cdiv(width, 128), triton.cdiv(height, 4)),
        {"PARTS": parts, "OUT": problem.out, **sizes, **scales, **problem.epilogue},
        {**problem.finish, "BM": 4, "BN": 128},
        num_stages=1,
    )
    return launch.with_config(config), reduce
