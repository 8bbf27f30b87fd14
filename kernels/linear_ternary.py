"""Linear layers on ternary weights, -scale, 0 or scale, on a GPU (Ma et al. 2024, BitNet b1.58).

Two bits a weight. Activations are floats, and the float32 sums are scaled once a row of the
weight; or int8 with a scale for each token (Ma et al. 2024, sec. 2), and sums are int32, exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from ..ir.gpu_layouts import FieldWords
from .epilogue import standard
from .launch import Config, Launch, Plan
from .linear_field_plan import FIELD_CONFIGS, CodedWeight, choose, field_plan
from .linear_problem import (
    EPILOGUE_SCHEMA,
    FLOATS,
    PRECISIONS,
    LinearProblem,
    finished,
    linear_cost,
    linear_problem,
    linear_twin,
    nbytes,
    off_16_bytes,
    why_not_linear,
)
from .linear_split import reduce_launch, split_count
from .linear_ternary_cases import CASES, FORMS
from .linear_ternary_kernels import linear_ternary_kernel, linear_ternary_split_kernel
from .operator import define
from .spec import Cost
from .triton_spec import TritonSpec

RUN = 32
"""Columns of a field: the least that int8 matrix units sum over."""


@dataclass(frozen=True)
class PackedTernary:
    """A weight [N, K]: words int16 [blocks, 1, N, 32] of `FieldWords(2)`, scale [1, N]."""

    words: Tensor
    scale: Tensor


def pack(weight: Tensor, scale: Tensor) -> PackedTernary:
    """weight: -1, 0 and 1 of any dtype [N, K]; scale: one for all, or [N]."""
    codes = (weight + 1).to(torch.uint8)
    of_rows = scale.reshape(1, -1).expand(1, weight.shape[0]).contiguous()
    return PackedTernary(FieldWords(2, RUN).pack(codes), of_rows)


def unpack(words: Tensor, length: int) -> Tensor:
    """The inverse of `pack`: int8 [N, length] of -1, 0 and 1."""
    return FieldWords(2, words.shape[-1]).unpack(words, length).to(torch.int8) - 1


def linear_ternary(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
) -> Tensor:
    """The twin. With x_scale x is int8, and the result has the dtype of `scale`."""
    signs = unpack(words, x.shape[-1])
    if x_scale is None:
        work = torch.promote_types(x.dtype, torch.float32)
        weight = signs.to(work) * scale.t().to(work)
        return linear_twin(x, weight, bias, gate, residual, activation)
    work = torch.promote_types(scale.dtype, torch.float32)
    sums = (x.double() @ signs.double().t()).to(work)  # integers, exact
    sums = sums * scale.to(work) * x_scale.to(work).unsqueeze(-1)
    return finished(sums, bias, gate, residual, activation).to(scale.dtype)


def plan(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    x_scale: Tensor | None = None,
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
    """x [..., K], words and scale of `PackedTernary`, x_scale [...]; the result is contiguous."""
    problem = linear_problem(
        x, words.shape[2], (bias, gate, residual), activation, finish, operands
    )
    if x_scale is None:
        weight = CodedWeight(words, scale, bits=2, group=problem.length, centre=1)
        return field_plan(problem, weight, precision, config, arch)
    out = torch.empty(problem.out.shape, dtype=scale.dtype, device=x.device)
    chosen = config or choose(problem.height, problem.width, arch)
    tokens = x_scale.reshape(problem.height).contiguous()
    return _int8_plan(replace(problem, out=out), words, scale, tokens, chosen)


def _int8_plan(
    problem: LinearProblem, words: Tensor, scale: Tensor, tokens: Tensor, config: Config
) -> Plan:
    blocks = words.shape[0]
    start = 0 if problem.rows.is_meta else problem.rows.data_ptr()
    sizes = (start, problem.length, problem.rows.stride(0))
    align = 1 if any(n % 16 for n in sizes) else 16
    tile = {**config.constants, "BM": min(config.constants["BM"], 64)}
    config = replace(config, constants=tile)
    args = {
        "X": problem.rows,
        "X_SCALE": tokens,
        "WORDS": words,
        "SCALE": scale,
        "height": problem.height,
        "width": problem.width,
        "length": problem.length // align,
        "x_stride": problem.rows.stride(0) // align,
        "blocks": blocks,
    }
    fixed = {"RUN": RUN, "ALIGN": align}
    columns = triton.cdiv(problem.width, tile["BN"])
    if "TILES" in tile:
        launch = Launch(
            linear_ternary_kernel,
            (columns * triton.cdiv(problem.height, tile["BM"]),),
            {**args, "OUT": problem.out, **problem.epilogue},
            {**problem.finish, **fixed},
        )
        return Plan((problem.out,), (launch.with_config(config),))
    splits = split_count(columns, blocks)
    parts = problem.scratch(splits)
    launch = Launch(
        linear_ternary_split_kernel,
        (columns, splits if problem.height else 0),
        {**args, "PARTS": parts, "run": triton.cdiv(blocks, splits)},
        fixed,
    )
    return Plan((problem.out,), (launch.with_config(config), reduce_launch(problem, parts)))


def why_not(
    arch: str,
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
) -> str | None:
    length, width = x.shape[-1], words.shape[2]
    shape = (FieldWords(2, RUN).blocks(length), 1, width, RUN)
    if words.dtype != torch.int16 or words.shape != shape or not words.is_contiguous():
        return f"its words are {words.dtype} {list(words.shape)} for {length} columns"
    if scale.shape != (1, width) or scale.dtype not in FLOATS:
        return f"its scales are {scale.dtype} {list(scale.shape)}"
    if (x_scale is None) == (x.dtype == torch.int8):
        return f"its activations are {x.dtype} " + (
            "without scales" if x_scale is None else "with scales"
        )
    if x_scale is not None and x_scale.shape != x.shape[:-1]:
        return f"the scales of its tokens have the shape {list(x_scale.shape)}"
    if x_scale is not None and length * 127 >= 1 << 31:
        return "its sums would pass the largest 32-bit integer"
    if off_16_bytes(words):
        return "its words do not start on 16 bytes"
    if precision not in PRECISIONS:
        return f"there is no precision {precision}"
    dtypes = FLOATS if x_scale is None else (torch.int8,)
    return why_not_linear(x, width, length, (bias, gate, residual), activation, dtypes)


def cost(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
) -> Cost:
    found = linear_cost(x, words.shape[2], nbytes(words, scale, x_scale), (bias, gate, residual))
    wider = scale.element_size() - x.element_size() if x_scale is not None else 0
    rows = math.prod(x.shape[:-1])
    return replace(found, nbytes=found.nbytes + wider * rows * words.shape[2])


SPEC = TritonSpec(
    name="linear_ternary",
    schema="planish::linear_ternary(Tensor x, Tensor words, Tensor scale, Tensor? x_scale=None, "
    f"{EPILOGUE_SCHEMA}, str precision='ieee') -> Tensor",
    serves="linear layers on ternary weights",
    twin=linear_ternary,
    plan=plan,
    configs=FIELD_CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=CASES,
    forms=FORMS,
)

define(SPEC)
