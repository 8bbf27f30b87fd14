"""The launches of a linear layer on a weight coded in bit fields, and their configurations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from .launch import Config, Launch, Plan
from .linear_field_kernels import linear_field_kernel, linear_field_split_kernel
from .linear_problem import LinearProblem
from .linear_split import reduce_launch, split_count
from .prologue import Prologue, prologue_arguments, prologue_launches

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


@dataclass(frozen=True)
class CodedWeight:
    """A weight [N, K] in bit fields, as `linear_field_sums` reads it.

    words: int16 [blocks, planes, N, run]. scale: [groups, N]. zero: uint8 [groups, N], or None
    where it is `centre`. group: columns that share a scale. book: [2^bits] or [groups, N, 2^bits].
    scale_book [256], second and offset [1]: float32, of scales that are uint8 codes; `every`
    scales share an element of second.
    """

    words: Tensor
    scale: Tensor
    bits: int
    group: int
    zero: Tensor | None = None
    centre: int = 0
    book: Tensor | None = None
    scale_book: Tensor | None = None
    second: Tensor | None = None
    offset: Tensor | None = None
    every: int = 1


def field_plan(
    problem: LinearProblem,
    weight: CodedWeight,
    precision: str,
    config: Config | None,
    arch: str,
    prologue: Prologue | None = None,
) -> Plan:
    """A product with a coded weight; prologue: what becomes of x before."""
    bits = weight.bits
    blocks, _, _, run = weight.words.shape
    groups = weight.scale.shape[0]
    fields = 16 if bits == 3 else 16 // bits
    runs = 0 if groups == 1 else weight.group // run
    together = math.gcd(runs, fields)
    chosen = config or choose(problem.height, problem.width, arch)
    split = "TILES" not in chosen.constants
    problem, prologue, before = prologue_launches(problem, prologue, split)
    align = _aligned(problem.rows)
    chosen = _smaller(chosen, problem.rows.dtype, fields, together, weight.book is not None)
    if not split and weight.scale_book is not None:
        chosen = replace(chosen, constants={**chosen.constants, "BM": 16, "BN": 64})
    elif not split and arch.startswith(("sm_12", "sm_89")):
        rows = min(chosen.constants["BM"], 16 if bits == 3 else 32 if arch == "sm_89" else 64)
        chosen = replace(chosen, constants={**chosen.constants, "BM": rows})
    elif not split and bits == 3 and arch.startswith(("gfx9", "sm_10")):
        chosen = replace(chosen, constants={**chosen.constants, "BM": 32, "BN": 64})
    args = {
        "X": problem.rows,
        "WORDS": weight.words,
        "SCALE": weight.scale,
        "ZERO": weight.zero,
        "BOOK": weight.book,
        "SCALE_BOOK": weight.scale_book,
        "SECOND": weight.second,
        "OFFSET": weight.offset,
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
        "CENTRE": weight.centre,
        "BOOKS": weight.book is not None and weight.book.dim() > 1,
        "EVERY": weight.every,
        "PRECISION": precision,
        "ALIGN": align,
    }
    if split:
        return _split(problem, args, fixed, chosen, prologue)
    made = _tiled(problem, args, fixed, chosen)
    return Plan(made.outputs, (*before, *made.launches))


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
    problem: LinearProblem,
    args: dict[str, Any],
    fixed: dict[str, Any],
    config: Config,
    prologue: Prologue | None,
) -> Plan:
    columns = triton.cdiv(problem.width, config.constants["BN"])
    splits = split_count(columns, args["blocks"])
    parts = problem.scratch(splits)
    sources, prepare = prologue_arguments(prologue)
    launch = Launch(
        linear_field_split_kernel,
        (columns, splits if problem.height else 0),
        {**args, **sources, "PARTS": parts, "run": triton.cdiv(args["blocks"], splits)},
        {**fixed, **prepare},
    )
    return Plan((problem.out,), (launch.with_config(config), reduce_launch(problem, parts)))


def _smaller(
    config: Config, dtype: torch.dtype, fields: int, together: int, gathers: bool
) -> Config:
    """Fewer rows where a step holds more at once: fields of x, float32, unscaled sums, entries."""
    tile, stages = dict(config.constants), config.num_stages
    if together < fields:
        tile["BM"] = min(tile["BM"], 64)
    if dtype == torch.float32 or fields > 4:
        tile["BM"], stages = min(tile["BM"], 32), 2
    if gathers:
        tile["BM"] = min(tile["BM"], 32)
    return replace(config, constants=tile, num_stages=stages)


def _aligned(rows: Tensor) -> int:
    """8 if rows start on 16 bytes and end on 8 elements, so that loads are wide; else 1."""
    start = 0 if rows.is_meta else rows.data_ptr()
    return 1 if rows.shape[1] % 8 or rows.stride(0) % 8 or start % 16 else 8
