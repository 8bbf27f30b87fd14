"""The launches of a linear layer on a weight coded in bit fields, and their configurations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from .launch import Config, Launch, Plan
from .linear_field_kernels import linear_field_kernel, linear_field_split_kernel
from .linear_problem import LinearProblem
from .linear_split import reduce_launch, split_count

FEW = 16
"""Rows up to which the summed axis is split."""

FIELD_CONFIGS = (
    Config({"BM": 128, "BN": 128, "TILES": 8}, 8, 3, ("sm_",)),
    Config({"BM": 64, "BN": 64, "TILES": 8}, 4, 3, ("sm_",)),
    Config({"BM": 64, "BN": 128, "TILES": 8}, 8, 2, ("gfx9",)),
    Config({"BM": 32, "BN": 64, "TILES": 8}, 4, 2, ("gfx",)),
    Config({"BM": 8, "BN": 64}, 4, 4, ("sm_",)),
    Config({"BM": 16, "BN": 64}, 4, 4, ("sm_",)),
    Config({"BM": 16, "BN": 64}, 4, 2, ("gfx",)),
)
"""BM: rows of x, BN: of the weight. A step is one block of the weight's layout."""


def choose(height: int, width: int, arch: str) -> Config:
    """Split for few rows; else the largest tiles of which there are enough to fill a GPU."""
    split = [c for c in FIELD_CONFIGS if c.serves(arch) and "TILES" not in c.constants]
    if height <= FEW:
        return next(c for c in split if height <= c.constants["BM"])
    tiled = [c for c in FIELD_CONFIGS if c.serves(arch) and "TILES" in c.constants]
    return next((c for c in tiled[:-1] if _tiles(c.constants, height, width) >= 108), tiled[-1])


def _tiles(tile: Mapping[str, Any], height: int, width: int) -> int:
    return triton.cdiv(height, tile["BM"]) * triton.cdiv(width, tile["BN"])


def field_plan(
    problem: LinearProblem,
    coded: Mapping[str, Any],
    bits: int,
    group: int,
    centre: int,
    precision: str,
    config: Config | None,
    arch: str,
) -> Plan:
    """coded: WORDS [blocks, planes, N, run], SCALE, ZERO [groups, N], BOOK, book_group."""
    words: Tensor = coded["WORDS"]
    blocks, _, _, run = words.shape
    groups = coded["SCALE"].numel() // problem.width
    fields = 16 if bits == 3 else 16 // bits
    runs = 0 if groups == 1 else group // run
    align = _aligned(problem.rows)
    together = math.gcd(runs, fields)
    chosen = config or choose(problem.height, problem.width, arch)
    chosen = _smaller(chosen, problem.rows.dtype, fields, together)
    args = {
        "X": problem.rows,
        **coded,
        "height": problem.height,
        "width": problem.width,
        "length": problem.length // align,
        "x_stride": problem.rows.stride(0) // align,
        "groups": groups,
        "blocks": blocks,
    }
    fixed = {
        "BITS": bits,
        "RUN": run,
        "FIELDS": fields,
        "TOGETHER": together,
        "GROUP": runs,
        "CENTRE": centre,
        "PRECISION": precision,
        "ALIGN": align,
    }
    if "TILES" in chosen.constants:
        return _tiled(problem, args, fixed, chosen)
    return _split(problem, args, fixed, chosen)


def _tiled(
    problem: LinearProblem, args: dict[str, Any], fixed: dict[str, Any], config: Config
) -> Plan:
    launch = Launch(
        linear_field_kernel,
        (_tiles(config.constants, problem.height, problem.width),),
        {**args, "OUT": problem.out, **problem.epilogue},
        {**problem.finish, **fixed},
    )
    return Plan((problem.out,), (launch.with_config(config),))


def _split(
    problem: LinearProblem, args: dict[str, Any], fixed: dict[str, Any], config: Config
) -> Plan:
    columns = triton.cdiv(problem.width, config.constants["BN"])
    splits = split_count(columns, args["blocks"])
    parts = problem.scratch(splits)
    launch = Launch(
        linear_field_split_kernel,
        (columns, splits if problem.height else 0),
        {**args, "PARTS": parts, "run": triton.cdiv(args["blocks"], splits)},
        fixed,
    )
    return Plan((problem.out,), (launch.with_config(config), reduce_launch(problem, parts)))


def _smaller(config: Config, dtype: torch.dtype, fields: int, together: int) -> Config:
    """Fewer rows where a step holds more at once: fields of x, float32, or unscaled sums."""
    tile, stages = dict(config.constants), config.num_stages
    if dtype == torch.float32 or fields > 4 or together < fields:
        tile["BM"] = min(tile["BM"], 64)
    if dtype == torch.float32 or fields > 4:
        stages = 2
    if dtype == torch.float32 or fields > 8:
        tile["BM"] = min(tile["BM"], 32)
    return replace(config, constants=tile, num_stages=stages)


def _aligned(rows: Tensor) -> int:
    """8 if rows start on 16 bytes and end on 8 elements, so that loads are wide; else 1."""
    start = 0 if rows.is_meta else rows.data_ptr()
    return 1 if rows.shape[1] % 8 or rows.stride(0) % 8 or start % 16 else 8
