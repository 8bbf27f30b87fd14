"""Linear layers on microscaling weights, with activations in 16 bit: mxfp4, mxfp8, nvfp4.

Weights are decoded in registers, exactly: a product of a small float and its scale has few digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .epilogue import standard
from .launch import Config, Launch, Plan
from .linear_bytes import byte_matrices, choose, shorter
from .linear_mx_cases import CASES, CONFIGS, FORMS
from .linear_mx_tiles import linear_mx_kernel, linear_mx_split_kernel
from .linear_problem import (
    EPILOGUE_SCHEMA,
    LinearProblem,
    finished,
    linear_cost,
    linear_problem,
    nbytes,
    why_not_linear,
)
from .linear_split import reduce_launch, split_count
from .microscaling import BLOCKS, blocks_decoded
from .operator import define
from .spec import Cost
from .triton_spec import TritonSpec


def linear_mx(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    whole: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    format: str = "mxfp4",
) -> Tensor:
    """activation(x @ (decoded weight * whole).T + bias) * gate + residual.

    x: [..., K] in 16 bit; weight, scales: as `blocks_decoded` takes them; whole: float32 of one
    element, the second scale of nvfp4. Beside a float16 x the weight's values should lie in
    float16's range: those above it are infinite, those far below lose digits.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    sums = x.to(work) @ blocks_decoded(weight, scales, format, work).t()
    sums = sums if whole is None else sums * whole.to(work)
    return finished(sums, bias, gate, residual, activation).to(x.dtype)


def plan(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    whole: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    format: str = "mxfp4",
    *,
    config: Config | None = None,
    arch: str = "sm_80",
    finish: Any = standard,
    operands: Sequence[Tensor | None] | None = None,
) -> Plan:
    """x [..., K], weight [N, bytes] with bytes side by side; the result is contiguous."""
    width = weight.shape[0]
    problem = linear_problem(x, width, (bias, gate, residual), activation, finish, operands)
    matrices, fixed = byte_matrices(problem.rows, weight.view(torch.uint8))
    chosen = shorter(config or choose(CONFIGS, problem.height, width, arch), fixed["ALIGN"])
    args = {
        **matrices,
        "SCALES": scales.view(torch.uint8),
        "WHOLE": whole,
        "scales_stride": scales.stride(0),
    }
    tiled = "GROUP" in chosen.constants
    return (_tiled if tiled else _split)(problem, args, {**fixed, "FORMAT": format}, chosen)


def _tiled(
    problem: LinearProblem, args: dict[str, Any], fixed: dict[str, Any], config: Config
) -> Plan:
    tile = config.constants
    count = triton.cdiv(problem.height, tile["BM"]) * triton.cdiv(problem.width, tile["BN"])
    launch = Launch(
        linear_mx_kernel,
        (count,),
        {**args, "OUT": problem.out, **problem.epilogue},
        {**problem.finish, **fixed},
    )
    return Plan((problem.out,), (launch.with_config(config),))


def _split(
    problem: LinearProblem, args: dict[str, Any], fixed: dict[str, Any], config: Config
) -> Plan:
    tile = config.constants
    columns = triton.cdiv(problem.width, tile["BN"])
    blocks = triton.cdiv(problem.length, tile["BK"])
    splits = split_count(columns, blocks)
    parts = problem.scratch(splits)
    launch = Launch(
        linear_mx_split_kernel,
        (columns, splits if problem.height else 0),
        {**args, "PARTS": parts, "run": triton.cdiv(blocks, splits)},
        fixed,
    )
    return Plan((problem.out,), (launch.with_config(config), reduce_launch(problem, parts)))


def why_not(
    arch: str,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    whole: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    format: str = "mxfp4",
) -> str | None:
    if format not in BLOCKS:
        return f"there is no microscaling format {format}"
    bytes_of = torch.float8_e4m3fn if format == "mxfp8" else torch.uint8
    if weight.dim() != 2 or weight.dtype != bytes_of or weight.stride(1) != 1:
        return f"its {format} weight is {weight.dtype} {list(weight.shape)}"
    width, length = weight.shape[0], weight.shape[1] * (1 if format == "mxfp8" else 2)
    kind = torch.float8_e4m3fn if format == "nvfp4" else torch.uint8
    if scales.dtype != kind or scales.shape != (width, -(-length // BLOCKS[format])):
        return f"its {format} scales are {scales.dtype} {list(scales.shape)}"
    if scales.stride(1) != 1 and scales.shape[1] > 1:
        return "its scales do not lie side by side"
    if whole is not None and (whole.numel() != 1 or whole.dtype != torch.float32):
        return "the scale of its whole weight is not one float32 number"
    halves = (torch.float16, torch.bfloat16)
    return why_not_linear(x, width, length, (bias, gate, residual), activation, halves)


def cost(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    whole: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    format: str = "mxfp4",
) -> Cost:
    """Activations, codes, scales and result once; two operations a product."""
    return linear_cost(x, weight.shape[0], nbytes(weight, scales, whole), (bias, gate, residual))


SPEC = TritonSpec(
    name="linear_mx",
    schema="planish::linear_mx(Tensor x, Tensor weight, Tensor scales, Tensor? whole=None, "
    + EPILOGUE_SCHEMA
    + ", str format='mxfp4') -> Tensor",
    serves="linear layers on microscaling weights",
    twin=linear_mx,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=CASES,
    forms=FORMS,
)

define(SPEC)
