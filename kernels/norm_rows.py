"""The two norm kernels: rows held in registers, several to a program, or wide rows in passes.

Both serve root mean square and layer normalization, with or without a residual added first and
with or without quantization of the result.
"""
# pyright: reportMissingParameterType=false

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, Launch
from .rounding import rounded_e4m3, rounded_int8

_NARROW = ("sm_", "gfx1")
CONFIGS = (
    Config({"SPAN": 2048, "TILE": 1024}, num_warps=4, archs=_NARROW),
    Config({"SPAN": 8192, "TILE": 2048}, num_warps=8, archs=_NARROW),
    Config({"SPAN": 16384, "TILE": 4096}, num_warps=16, archs=_NARROW),
    Config({"SPAN": 2048, "TILE": 1024}, num_warps=2, archs=("gfx9",)),
    Config({"SPAN": 8192, "TILE": 2048}, num_warps=4, archs=("gfx9",)),
    Config({"SPAN": 16384, "TILE": 4096}, num_warps=8, archs=("gfx9",)),
)
"""SPAN: the longest row that is held in registers. TILE: values of a program of short rows,
and of a pass over a longer one: 8 for every lane, which loads them at once."""


@triton.jit
def norm_load(X, RESIDUAL, x_at, residual_at, inside):
    """x (+ residual, rounded to the dtype of x) in float32."""
    x = tl.load(X + x_at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL is not None:
        x += tl.load(RESIDUAL + residual_at, mask=inside, other=0.0).to(tl.float32)
        x = x.to(X.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def norm_finish(
    x, mean, rstd, X, WEIGHT, BIAS, at, inside, CENTER: tl.constexpr, OFFSET: tl.constexpr
):
    """The normalized row with weight and bias, not yet rounded to the result's dtype."""
    y = (x - mean) * rstd
    if WEIGHT is not None:
        weight = tl.load(WEIGHT + at, mask=inside, other=0.0).to(tl.float32)
        if CENTER:
            y *= weight
        elif OFFSET == 0:
            y = y.to(X.dtype.element_ty).to(tl.float32) * weight
        else:
            y *= weight + OFFSET
    if BIAS is not None:
        y += tl.load(BIAS + at, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def norm_rounded(y, X, WEIGHT, CENTER: tl.constexpr, OFFSET: tl.constexpr):
    """y as the dtype of an unquantized result would hold it, in float32."""
    if WEIGHT is not None and not CENTER and OFFSET == 0:
        y = y.to(WEIGHT.dtype.element_ty)
    else:
        y = y.to(X.dtype.element_ty)
    return y.to(tl.float32)


@triton.jit
def norm_codes(y, step, QUANT: tl.constexpr):
    return rounded_int8(y, step) if QUANT == "int8" else rounded_e4m3(y, step)


@triton.jit
def norm_step(most, QUANT: tl.constexpr):
    """The scale that puts the value of largest magnitude on the largest code."""
    return tl.div_rn(most, 127.0 if QUANT == "int8" else 448.0)


@triton.jit
def norm_rows_kernel(
    X,
    RESIDUAL,
    WEIGHT,
    BIAS,
    STATIC,
    OUT,
    SUM,
    SCALE,
    rows,
    columns,
    x_stride,
    residual_stride,
    eps,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    QUANT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < columns)
    x = norm_load(X, RESIDUAL, row * x_stride + at, row * residual_stride + at, inside)
    if SUM is not None:
        tl.store(SUM + row * columns + at, x.to(SUM.dtype.element_ty), mask=inside)
    mean = tl.zeros([ROWS, 1], tl.float32)
    if CENTER:
        mean = tl.sum(x, 1, keep_dims=True) / columns
    apart = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(apart * apart, 1, keep_dims=True) / columns + eps)
    y = norm_finish(x, mean, rstd, X, WEIGHT, BIAS, at, at < columns, CENTER, OFFSET)
    if QUANT == "none":
        tl.store(OUT + row * columns + at, y.to(OUT.dtype.element_ty), mask=inside)
    else:
        y = tl.where(inside, norm_rounded(y, X, WEIGHT, CENTER, OFFSET), 0.0)
        if STATIC is not None:
            step = tl.load(STATIC).to(tl.float32)
        else:
            step = norm_step(tl.max(tl.abs(y), 1, keep_dims=True), QUANT)
            tl.store(SCALE + row, step, mask=row < rows)
        tl.store(OUT + row * columns + at, norm_codes(y, step, QUANT), mask=inside)


@triton.jit
def norm_statistics(X, RESIDUAL, SUM, columns, eps, CENTER: tl.constexpr, BLOCK: tl.constexpr):
    """Mean (zero unless CENTER) and reciprocal deviation of a row that X points to.

    Blocks are joined by their own means (Chan, Golub & LeVeque 1979), so a mean that is large
    beside the deviation does no harm.
    """
    mean, apart = 0.0, 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        x = norm_load(X, RESIDUAL, at, at, inside)
        if SUM is not None:
            tl.store(SUM + at, x.to(SUM.dtype.element_ty), mask=inside)
        between = 0.0
        if CENTER:
            count = tl.minimum(columns - start, BLOCK).to(tl.float32)
            own = tl.sum(x, 0) / count
            x = tl.where(inside, x - own, 0.0)
            delta = own - mean
            share = count / (start + count)
            between = delta * delta * (start * share)
            mean += delta * share
        apart += tl.sum(x * x, 0) + between  # pyright: ignore[reportOperatorIssue]
    return mean, tl.rsqrt(apart / columns + eps)


@triton.jit
def norm_wide_kernel(
    X,
    RESIDUAL,
    WEIGHT,
    BIAS,
    STATIC,
    OUT,
    SUM,
    SCALE,
    rows,
    columns,
    x_stride,
    residual_stride,
    eps,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    QUANT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_from, out_from = X + row * x_stride, OUT + row * columns
    residual_from, sum_to = RESIDUAL, SUM
    if RESIDUAL is not None:
        residual_from = RESIDUAL + row * residual_stride
        sum_to = SUM + row * columns
    mean, rstd = norm_statistics(x_from, residual_from, sum_to, columns, eps, CENTER, BLOCK)
    step = 1.0
    if STATIC is not None:
        step = tl.load(STATIC).to(tl.float32)
    elif QUANT != "none":
        most = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < columns
            x = norm_load(x_from, residual_from, at, at, inside)
            y = norm_finish(x, mean, rstd, X, WEIGHT, BIAS, at, inside, CENTER, OFFSET)
            y = tl.where(inside, norm_rounded(y, X, WEIGHT, CENTER, OFFSET), 0.0)
            most = tl.maximum(most, tl.abs(y))
        step = norm_step(tl.max(most, 0), QUANT)
        tl.store(SCALE + row, step)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        x = norm_load(x_from, residual_from, at, at, inside)
        y = norm_finish(x, mean, rstd, X, WEIGHT, BIAS, at, inside, CENTER, OFFSET)
        if QUANT == "none":
            tl.store(out_from + at, y.to(OUT.dtype.element_ty), mask=inside)
        else:
            codes = norm_codes(norm_rounded(y, X, WEIGHT, CENTER, OFFSET), step, QUANT)
            tl.store(out_from + at, codes, mask=inside)


def norm_launch(
    tensors: Mapping[str, Tensor | None],
    eps: float,
    offset: float,
    center: bool,
    config: Config | None,
    arch: str,
    quant: str = "none",
) -> Launch:
    """The launch for X [rows, columns] and the kernels' other pointers by name; absent ones None.

    quant: "none", "int8" or "fp8"; a step for each row is computed unless STATIC is given.
    """
    x, residual = tensors["X"], tensors.get("RESIDUAL")
    assert x is not None
    rows, columns = x.shape
    known = [known for known in CONFIGS if known.serves(arch)]
    chosen = config or next((c for c in known if columns <= c.constants["SPAN"]), known[-1])
    span, tile = chosen.constants["SPAN"], chosen.constants["TILE"]
    names = ("X", "RESIDUAL", "WEIGHT", "BIAS", "STATIC", "OUT", "SUM", "SCALE")
    args: dict[str, Any] = {name: tensors.get(name) for name in names} | {
        "rows": rows,
        "columns": columns,
        "x_stride": x.stride(0),
        "residual_stride": residual.stride(0) if residual is not None else 0,
        "eps": eps,
    }
    constants: dict[str, Any] = {"CENTER": center, "OFFSET": float(offset), "QUANT": quant}
    block = triton.next_power_of_2(max(columns, 1))
    if block <= span:
        several = max(1, tile // block)
        constants |= {"ROWS": several, "BLOCK": block}
        kernel, grid = norm_rows_kernel, triton.cdiv(rows, several)
    else:
        constants["BLOCK"] = min(tile, span)
        kernel, grid = norm_wide_kernel, rows
    return Launch(kernel, (grid,), args, constants, num_warps=chosen.num_warps)


def norm_why_not(x: Tensor, *others: Tensor | None) -> str | None:
    """What no norm kernel takes; others: the weight and the bias."""
    floats = (torch.float16, torch.bfloat16, torch.float32)
    if x.dtype not in floats:
        return f"its values are {x.dtype}"
    for other in others:
        if other is not None and other.dtype not in (x.dtype, torch.float32):
            return f"its weight or bias is {other.dtype} beside values of {x.dtype}"
        if other is not None and (other.dim() != 1 or other.stride(0) != 1):
            return "its weight or bias is not a plain vector"
    if not even_rows(x):
        return "its rows are not evenly spaced or its columns do not lie side by side"
    return None


def even_rows(x: Tensor) -> bool:
    """Whether x [..., columns] is a matrix of rows at one stride, columns side by side."""
    if x.dim() == 0 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return False
    if x.numel() == 0:
        return True
    axes = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    return all(outer == n * stride for (_, outer), (n, stride) in pairwise(axes))


def as_rows(x: Tensor) -> Tensor:
    """x [..., columns] as [rows, columns] without a copy, for an x of `even_rows`."""
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
