"""Quantization of rows in a launch of its own: the activations of an integer or fp8 matmul."""
# pyright: reportMissingParameterType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .quantized_rows import code_dtype
from .rounding import round_half_even, rounded_e4m3, rounded_int8


@triton.jit
def codes_load(X, REGULAR, at, columns):
    """Values in float32; zero outside of the row and, with REGULAR, in columns where it is 0."""
    inside = at < columns
    if REGULAR is not None:
        inside = inside & (tl.load(REGULAR + at, mask=inside, other=0) != 0)
    return tl.load(X + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def codes_bounds(X, REGULAR, columns, BLOCK: tl.constexpr):
    """The smallest and the largest value of a row that X points to, and zero."""
    low, high = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = codes_load(X, REGULAR, at, columns)
        low, high = tl.minimum(low, x), tl.maximum(high, x)
    return tl.min(low, 0), tl.max(high, 0)


@triton.jit
def codes_zero(low, high):
    """(zero, step) that put low on code -128 and high on 127."""
    step = tl.div_rn(high - low, 255.0)
    zero = -128.0 - tl.div_rn(low, tl.where(step == 0, 1.0, step))
    return round_half_even(zero, -128.0, 127.0), step


@triton.jit
def rows_to_codes_kernel(
    X,
    CODES,
    SCALE,
    ZERO,
    REGULAR,
    columns,
    x_stride,
    codes_stride,
    QUANT: tl.constexpr,
    DYNAMIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row for each program. SCALE (and ZERO, if given) are written if DYNAMIC, else read."""
    row = tl.program_id(0).to(tl.int64)
    x_from, codes_to = X + row * x_stride, CODES + row * codes_stride
    zero = 0.0
    if DYNAMIC:
        low, high = codes_bounds(x_from, REGULAR, columns, BLOCK)
        if ZERO is not None:
            zero, step = codes_zero(low, high)
            tl.store(ZERO + row, zero.to(tl.int32))
        else:
            step = tl.div_rn(tl.maximum(tl.abs(low), high), 127.0 if QUANT == "int8" else 448.0)
        tl.store(SCALE + row, step)
    else:
        step = tl.load(SCALE).to(tl.float32)
        if ZERO is not None:
            zero = tl.load(ZERO).to(tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = codes_load(x_from, REGULAR, at, columns)
        if QUANT == "fp8":
            codes = rounded_e4m3(x, step)
        elif ZERO is not None:
            x = tl.div_rn(x, tl.where(step == 0, 1.0, step))
            codes = round_half_even(x, -128.0 - zero, 127.0 - zero) + zero
            codes = codes.to(tl.int8)
        else:
            codes = rounded_int8(x, step)
        tl.store(codes_to + at, codes, mask=at < columns)


def codes_launch(
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    asymmetric: bool,
    codes: str,
    regular: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Launch]:
    """(codes, scale, zero, launch) for rows x [M, K].

    scale, zero: of one element, static; without a scale each row gets its own, and its own zero if
    asymmetric. regular: uint8 [K], 0 for columns that count as zeros. The codes' rows start on 16
    bytes, whatever K is.
    """
    rows, columns = x.shape
    padded = torch.empty(
        rows, triton.cdiv(columns, 16) * 16, dtype=code_dtype(codes), device=x.device
    )
    made = scale
    if made is None:
        made = torch.empty(rows, dtype=torch.float32, device=x.device)
        zero = torch.empty(rows, dtype=torch.int32, device=x.device) if asymmetric else None
    block = min(4096, triton.next_power_of_2(columns))
    launch = Launch(
        rows_to_codes_kernel,
        (rows,),
        {
            "X": x,
            "CODES": padded,
            "SCALE": made,
            "ZERO": zero,
            "REGULAR": regular,
            "columns": columns,
            "x_stride": x.stride(0),
            "codes_stride": padded.stride(0),
        },
        {"QUANT": codes, "DYNAMIC": scale is None, "BLOCK": block},
        num_warps=8 if block > 1024 else 4,
    )
    return padded[:, :columns], made, zero, launch
