"""Linear layers on int8 weights with int8 activations: int32 sums on the integer tensor cores.

Activations come as codes, or are quantized by a launch of their own: by token from their own
range, or by a static scale. Weights are [N, K] with K side by side, as every integer tensor core
reads them, so no byte is permuted on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .epilogue import standard
from .launch import Config, Launch, Plan
from .linear_bytes import by_token, choose, matmul_launches, result_dtype, scale_arguments
from .linear_problem import (
    EPILOGUE_SCHEMA,
    FLOATS,
    finished,
    linear_cost,
    linear_problem,
    nbytes,
    why_not_linear,
)
from .linear_w8a8_cases import CASES, CONFIGS, FORMS
from .operator import define
from .quantized_rows import asymmetric_twin, quantized_twin
from .rows_to_codes import codes_launch
from .spec import Cost
from .triton_spec import TritonSpec

LONGEST = 2**16
"""Columns up to which sums of products of codes stay within 32 bits, with any zero point."""


def linear_w8a8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    weight_sums: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """activation(s_x s_w (codes - zero) @ weight.T + bias) * gate + residual.

    weight: int8 [N, K]; weight_scale: one, or one a channel [N]. x: [..., K], floating: quantized
    by token, or by a static x_scale of one element; or int8 codes, with an x_scale of one element
    or one a token. weight_sums: int32 [N], sums of the weight's codes over K; with it activations
    are asymmetric, and what has an x_scale has an x_zero (int32) of its shape. dtype: of the
    result; x's where that is floating, else the weight scale's.
    """
    if x.dtype == torch.int8:
        assert x_scale is not None, "codes come with their scale"
        codes, scale, zero = x, x_scale, x_zero
    elif weight_sums is not None:
        codes, scale, zero = asymmetric_twin(x, x_scale, x_zero)
    else:
        (codes, scale), zero = quantized_twin(x, x_scale, "int8"), None
    exact = codes.double() @ weight.double().t()
    if weight_sums is not None:
        assert zero is not None, "asymmetric codes come with their zero point"
        exact = exact - by_token(zero, x).double() * weight_sums
    work = torch.promote_types(scale.dtype, torch.float32)
    sums = exact.to(work) * by_token(scale, x).to(work) * weight_scale.reshape(-1).to(work)
    return finished(sums, bias, gate, residual, activation).to(result_dtype(x, weight_scale, dtype))


def plan(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    weight_sums: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype | None = None,
    *,
    config: Config | None = None,
    arch: str = "sm_80",
    finish: Any = standard,
    operands: Sequence[Tensor | None] | None = None,
) -> Plan:
    """x [..., K], weight [N, K] with K side by side; the result is contiguous."""
    width = weight.shape[0]
    problem = linear_problem(x, width, (bias, gate, residual), activation, finish, operands)
    made = torch.empty(
        (*x.shape[:-1], width), dtype=result_dtype(x, weight_scale, dtype), device=x.device
    )
    problem = replace(problem, out=made)
    before: tuple[Launch, ...] = ()
    scale, zero = x_scale, x_zero
    if x.dtype != torch.int8:
        asymmetric = weight_sums is not None
        codes, scale, zero, launch = codes_launch(problem.rows, x_scale, x_zero, asymmetric, "int8")
        problem, before = replace(problem, rows=codes), (launch,)
    assert scale is not None, "codes come with their scale"
    scales = scale_arguments(scale, zero, weight_scale, weight_sums)
    chosen = config or choose(CONFIGS, problem.height, width, arch)
    matmul = matmul_launches(problem, weight, scales, chosen)
    return Plan((problem.out,), (*before, *matmul))


def why_not(
    arch: str,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    weight_sums: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype | None = None,
) -> str | None:
    if weight.dim() != 2 or weight.dtype != torch.int8:
        return f"its weight is {weight.dtype} {list(weight.shape)}"
    if weight.stride(1) != 1:
        return "the columns of its weight do not lie side by side"
    if weight.shape[1] > LONGEST:
        return f"its sums over {weight.shape[1]} products may not fit in 32 bits"
    if result_dtype(x, weight_scale, dtype) not in FLOATS:
        return f"its result is {result_dtype(x, weight_scale, dtype)}"
    kinds = (*FLOATS, torch.int8)
    width, length = weight.shape
    return _why_not_scales(x, weight, weight_scale, x_scale, x_zero, weight_sums) or (
        why_not_linear(x, width, length, (bias, gate, residual), activation, kinds)
    )


def _why_not_scales(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    weight_sums: Tensor | None,
) -> str | None:
    width, tokens = weight.shape[0], x.numel() // max(x.shape[-1], 1)
    if weight_scale.numel() not in (1, width) or not weight_scale.is_contiguous():
        return f"its weight has {weight_scale.numel()} scales for {width} channels"
    if x.dtype == torch.int8 and x_scale is None:
        return "its codes come without a scale"
    for values in (x_scale, x_zero):
        if values is None:
            continue
        if values.numel() not in ((1, tokens) if x.dtype == torch.int8 else (1,)):
            return f"it has {values.numel()} scales or zero points for {tokens} tokens"
        if not values.is_contiguous():
            return "its scales or zero points do not lie side by side"
    if weight_sums is not None and weight_sums.shape != (width,):
        return f"it has {list(weight_sums.shape)} sums of weights for {width} channels"
    if (x_zero is not None) != (weight_sums is not None and x_scale is not None):
        return "its zero points, scales and sums of weights do not go together"
    if any(t is not None and t.dtype != torch.int32 for t in (x_zero, weight_sums)):
        return "its zero points or sums of weights are not int32"
    return None


def cost(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    weight_sums: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype | None = None,
) -> Cost:
    """As a linear layer of int8 weights; codes written and read once where x is not codes."""
    width = weight.shape[0]
    parameters = nbytes(weight, weight_scale, weight_sums, x_scale, x_zero)
    whole = linear_cost(x, width, parameters, (bias, gate, residual))
    tokens = x.numel() // max(x.shape[-1], 1)
    wider = result_dtype(x, weight_scale, dtype).itemsize - x.element_size()
    extra = tokens * width * wider + (0 if x.dtype == torch.int8 else 2 * x.numel())
    return Cost(whole.nbytes + extra, whole.flops)


SPEC = TritonSpec(
    name="linear_w8a8",
    schema="planish::linear_w8a8(Tensor x, Tensor weight, Tensor weight_scale, "
    "Tensor? x_scale=None, Tensor? x_zero=None, Tensor? weight_sums=None, "
    + EPILOGUE_SCHEMA
    + ", ScalarType? dtype=None) -> Tensor",
    serves="linear layers on int8 weights with int8 activations",
    twin=linear_w8a8,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=CASES,
    forms=FORMS,
)

define(SPEC)
