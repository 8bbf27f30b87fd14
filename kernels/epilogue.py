"""What a matmul kernel does with its sums before it stores them: a function given to the kernel.

A kernel calls FINISH(sums, rows, columns, inside, E0, ..., E3_col, ACTIVATION) on its float32 tile.
`standard` is activation(sums + bias) * gate + residual; code generation writes others of the same
form. Of up to four operands an element is at base + row * row stride + column * column stride.
"""
# pyright: reportMissingParameterType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .activation import activate

OPERANDS = 4


@triton.jit
def operand(E, row_stride, col_stride, rows, columns, inside):
    """A tile [rows, columns] of an operand in float32."""
    at = rows.to(tl.int64)[:, None] * row_stride + columns[None, :] * col_stride
    return tl.load(E + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def standard(
    sums,
    rows,
    columns,
    inside,
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
):
    """E0: bias; E1: gate, multiplied after the activation; E2: residual, added last."""
    if E0 is not None:
        sums += operand(E0, E0_row, E0_col, rows, columns, inside)
    sums = activate(sums, ACTIVATION)
    if E1 is not None:
        sums *= operand(E1, E1_row, E1_col, rows, columns, inside)
    if E2 is not None:
        sums += operand(E2, E2_row, E2_col, rows, columns, inside)
    return sums


def finish_arguments(
    operands: Sequence[Tensor | None], function: Any = standard, activation: str = "none"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run-time and compile-time arguments of an epilogue, for `Launch`.

    operands: up to four, [columns] or [rows, columns] (strides of size-one axes count as zero).
    """
    args: dict[str, Any] = {}
    for place in range(OPERANDS):
        tensor = operands[place] if place < len(operands) else None
        row, column = (0, 0) if tensor is None else _strides(tensor)
        args |= {f"E{place}": tensor, f"E{place}_row": row, f"E{place}_col": column}
    return args, {"FINISH": function, "ACTIVATION": activation}


def _strides(tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() == 1:
        return 0, tensor.stride(0) if tensor.shape[0] > 1 else 0
    assert tensor.dim() == 2, "an epilogue reads vectors and matrices"
    row, column = (s if n > 1 else 0 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return row, column
