"""A format for most of a weight, and some of its values beside it in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .affine import half_spacing, non_finite, scale_overflow
from .encoded import Encoded, Format


def base_of(encoded: Encoded, fmt: Format, beside: frozenset[str]) -> Encoded:
    """The part of a composite weight that is kept in `fmt`."""
    kept = {name: part for name, part in encoded.parts.items() if name not in beside}
    return Encoded(fmt, encoded.shape, encoded.dtype, encoded.axis, kept)


def half_dtype(dtype: torch.dtype) -> torch.dtype:
    """How values beside the base are kept: float16, or bfloat16 for such a weight."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def halves(values: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """`values` in 16 bits; raises ScaleOverflow for values past float16's range."""
    kept = values.to(half_dtype(dtype))
    if bool(kept.isinf().any()):
        raise scale_overflow(values, kept.dtype, where)
    return kept


def rounding_of(values: Tensor) -> Tensor:
    """How far 16-bit values may lie from what they were rounded from, float64."""
    return half_spacing(values.double().abs(), values.dtype)


def counted(fraction: float, count: int) -> int:
    """How many of `count` values a fraction keeps, at least one."""
    return min(count, max(1, round(fraction * count)))


def check_finite(rows: Tensor, where: str) -> None:
    """Raise NonFiniteWeight unless all of `rows` [rows, length] is finite."""
    if not bool(rows.isfinite().all()):
        raise non_finite(rows.unsqueeze(1), where)


def rows_of(weight: Tensor, axis: int) -> Tensor:
    """[..., length] with the grouped axis last, as a matrix [rows, length] of its own."""
    rows = weight.detach().movedim(axis, -1)
    return rows.reshape(-1, rows.shape[-1]).clone(memory_format=torch.contiguous_format)


def back(rows: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """The inverse of `rows_of`: in the weight's own shape."""
    lead = list(shape)
    length = lead.pop(axis)
    return rows.reshape(*lead, length).movedim(-1, axis).contiguous()


def percent(fraction: float) -> str:
    """0.005 as 0.5%."""
    return f"{fraction * 100:g}%"


__all__ = ["back", "base_of", "check_finite", "counted", "half_dtype", "halves", "percent",
           "rounding_of", "rows_of"]  # fmt: skip
