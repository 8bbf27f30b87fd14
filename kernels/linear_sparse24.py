"""Linear layers on 2:4 sparse weights, on a GPU, to save bytes and nothing else.

Half of the values and two bits for each are read, and a tile is expanded in registers to a dense
one, which a dense product multiplies: Triton's language has no product of a sparse matrix, so the
sparse units of a GPU (Mishra et al. 2021) are not used and no multiplication is saved. Worth it
where the weight's bytes bound the layer: for few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from ..ir.gpu_layouts import TwoOfFour
from .epilogue import standard
from .launch import Config, Launch, Plan
from .linear_problem import (
    EPILOGUE_SCHEMA,
    PRECISIONS,
    linear_cost,
    linear_problem,
    linear_twin,
    nbytes,
    off_16_bytes,
    why_not_linear,
)
from .linear_sparse24_cases import CASES, FORMS
from .linear_sparse24_kernels import linear_sparse24_kernel, linear_sparse24_split_kernel
from .linear_split import reduce_launch, split_count
from .operator import define
from .spec import Cost
from .triton_spec import TritonSpec

FEW = 16
"""Rows up to which the summed axis is split."""


CONFIGS = (
    Config({"BM": 64, "BN": 64, "TILES": 8}, 4, 2, ("sm_9", "sm_10", "gfx9")),
    Config({"BM": 32, "BN": 64, "TILES": 8}, 4, 2, ("sm_8", "sm_12", "gfx1")),
    Config({"BM": 16, "BN": 64}, 4, 3, ("sm_",)),
    Config({"BM": 16, "BN": 64}, 4, 2, ("gfx",)),
)


@dataclass(frozen=True)
class PackedSparse24:
    """A weight [N, K] as `TwoOfFour` lays it out; the fields are the operator's arguments."""

    values: Tensor
    places: Tensor


def pack(weight: Tensor) -> PackedSparse24:
    """weight [N, K] with at most two nonzeros in every four columns; raises UnsupportedShape."""
    return PackedSparse24(*TwoOfFour().pack(weight))


def linear_sparse24(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
) -> Tensor:
    """The twin; `precision` says what a GPU may do with float32 and changes nothing here."""
    weight = TwoOfFour(values.shape[-1]).unpack(values, places, x.shape[-1])
    return linear_twin(x, weight, bias, gate, residual, activation)


def plan(
    x: Tensor,
    values: Tensor,
    places: Tensor,
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
) -> Plan:
    """x [..., K] and the fields of `PackedSparse24`; the result is contiguous."""
    width, blocks = values.shape[2], places.shape[0]
    problem = linear_problem(x, width, (bias, gate, residual), activation, finish, operands)
    few = problem.height <= FEW
    chosen = config or next(
        c for c in CONFIGS if c.serves(arch) and ("TILES" in c.constants) != few
    )
    if x.dtype == torch.float32:
        tile = {**chosen.constants, "BM": min(chosen.constants["BM"], 32)}
        chosen = replace(chosen, constants=tile)
    rows = problem.rows
    start = 0 if rows.is_meta else rows.data_ptr()
    align = 1 if rows.shape[1] % 8 or rows.stride(0) % 8 or start % 16 else 8
    args = {
        "X": rows,
        "VALUES": values,
        "PLACES": places,
        "height": problem.height,
        "width": width,
        "length": problem.length // align,
        "x_stride": rows.stride(0) // align,
        "blocks": blocks,
    }
    fixed = {"RUN": values.shape[-1], "PRECISION": precision, "ALIGN": align}
    columns = triton.cdiv(width, chosen.constants["BN"])
    if "TILES" in chosen.constants:
        launch = Launch(
            linear_sparse24_kernel,
            (columns * triton.cdiv(problem.height, chosen.constants["BM"]),),
            {**args, "OUT": problem.out, **problem.epilogue},
            {**problem.finish, **fixed},
        )
        return Plan((problem.out,), (launch.with_config(chosen),))
    splits = split_count(columns, blocks)
    parts = problem.scratch(splits)
    launch = Launch(
        linear_sparse24_split_kernel,
        (columns, splits if problem.height else 0),
        {**args, "PARTS": parts, "run": triton.cdiv(blocks, splits)},
        fixed,
    )
    return Plan((problem.out,), (launch.with_config(chosen), reduce_launch(problem, parts)))


def why_not(
    arch: str,
    x: Tensor,
    values: Tensor,
    places: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
) -> str | None:
    length, (width, run) = x.shape[-1], values.shape[2:]
    tiles = TwoOfFour(run).tiles(length)
    if values.dtype != x.dtype or values.shape[:2] != (tiles, 2) or not values.is_contiguous():
        return f"its values are {values.dtype} {list(values.shape)} for {length} columns"
    if places.dtype != torch.int16 or places.shape != (tiles // 4, 1, width, run):
        return f"its places are {places.dtype} {list(places.shape)}"
    if off_16_bytes(values, places):
        return "its values or places do not start on 16 bytes"
    if precision not in PRECISIONS:
        return f"there is no precision {precision}"
    return why_not_linear(x, width, length, (bias, gate, residual), activation)


def cost(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
) -> Cost:
    """The products with zeros count: they are computed."""
    return linear_cost(x, values.shape[2], nbytes(values, places), (bias, gate, residual))


SPEC = TritonSpec(
    name="linear_sparse24",
    schema="planish::linear_sparse24(Tensor x, Tensor values, Tensor places, "
    f"{EPILOGUE_SCHEMA}, str precision='ieee') -> Tensor",
    serves="linear layers on 2:4 sparse weights, stored in half and multiplied as dense",
    twin=linear_sparse24,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=CASES,
    forms=FORMS,
)

define(SPEC)
