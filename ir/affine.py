"""Arithmetic of the affine integer grid on groups of values: parameters and error bounds.

Everything here works on [rows, groups, group]; what is done once a group is done in float64.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .errors import NonFiniteWeight, ScaleOverflow


class AffineGrid(Protocol):
    """What the arithmetic must know of a format."""

    @property
    def bits(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def code_range(self) -> str | None: ...


def grouped(rows: Tensor, group_size: int | None) -> Tensor:
    """[rows, length] as [rows, groups, group], always a copy that may be written to.

    A short last group is filled with its last value, which changes neither its range nor codes.
    """
    count, length = rows.shape
    size = group_size or length
    missing = -length % size
    if missing == 0:
        return rows.clone(memory_format=torch.contiguous_format).view(count, -1, size)
    return torch.cat([rows, rows[:, -1:].expand(-1, missing)], dim=1).view(count, -1, size)


def ungrouped(groups: Tensor, length: int) -> Tensor:
    """The inverse of `grouped`: [rows, length]."""
    return groups.flatten(1)[:, :length]


def affine_parameters(
    grid: AffineGrid, groups: Tensor, scale_dtype: torch.dtype, where: str
) -> tuple[Tensor, Tensor | None]:
    """The scale [rows, groups] and, unless symmetric, the zero point as a code.

    Raises NonFiniteWeight for NaN or infinity, ScaleOverflow where `scale_dtype` is too small.
    """
    # amin and amax are vectorized along the last axis; aminmax takes twelve times as long.
    low, high = groups.amin(-1).double(), groups.amax(-1).double()
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise non_finite(groups, where)
    exact = _exact_scale(grid, low, high)
    scale = exact.to(scale_dtype)
    if bool(torch.isinf(scale).any()):
        raise scale_overflow(exact, scale_dtype, where)
    # A scale that would vanish takes the smallest number there is, so that its group keeps bits.
    least = smallest(scale_dtype)
    scale = torch.where(
        (scale == 0) & (exact != 0), (torch.sign(exact) * least).to(scale_dtype), scale
    )
    # A constant group is one step away from zero, hence exact, where the scale can hold it.
    constant = (low == high) & (low.to(scale_dtype).double() == low)
    scale = torch.where(constant, low.abs().to(scale_dtype), scale)
    if grid.symmetric:
        return scale, None
    step = torch.where(scale == 0, torch.ones_like(scale), scale).double()
    zero = torch.round(-low.clamp(max=0) / step).clamp_(0, (1 << grid.bits) - 1)
    return scale, torch.where(constant, torch.ones_like(zero), zero)


def _exact_scale(grid: AffineGrid, low: Tensor, high: Tensor) -> Tensor:
    """The scale in float64, before it is rounded to the format's scale dtype."""
    half = 1 << (grid.bits - 1)
    if not grid.symmetric:
        return (high.clamp(min=0) - low.clamp(max=0)) / (2 * half - 1)
    if grid.code_range == "narrow":
        return torch.maximum(low.abs(), high.abs()) / (half - 1)
    return torch.where(low.abs() >= high.abs(), low, high) / -half


def affine_bound(
    grid: AffineGrid, steps: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Upper bound of |weight - decoded|, float64 [rows, groups, group].

    steps: code - zero point, float64; scale [rows, groups, 1] in the scale dtype; zero: None if
    symmetric; dtype: of the weight and of the decoded values.

    A value inside the grid lies within half a step. The grid's ends reach less far than the
    group's range where its scale was rounded down, by that rounding once for every step to the
    end; in the full symmetric range the grid is one step shorter on the side without the largest
    value. The last term is the rounding of quotient, product and result.
    """
    half = 1 << (grid.bits - 1)
    size = scale.double().abs()
    cut = half_spacing(size, scale.dtype)
    codes = steps + (half if zero is None else zero)
    if not grid.symmetric:
        at_low = at_high = size / 2 + (2 * half - 1) * cut
        lowest = 0
    elif grid.code_range == "narrow":
        at_low = at_high = torch.maximum(size / 2, (half - 1) * cut)
        lowest = 1
    else:
        at_low, at_high, lowest = torch.maximum(size / 2, half * cut), size + half * cut, 0
    bound = torch.where(codes == lowest, at_low, size / 2)
    bound = torch.where(codes == 2 * half - 1, at_high, bound)
    value = steps.abs() * size
    compute = torch.float64 if torch.float64 in (dtype, scale.dtype) else torch.float32
    rounding = 4 * half_spacing(value + size, compute) + half_spacing(value, dtype)
    return torch.where(size == 0, torch.zeros_like(bound), bound + rounding)


def half_spacing(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Upper bound of the error of rounding `value` >= 0 (float64) to `dtype`."""
    return (value * (torch.finfo(dtype).eps / 2)).clamp(min=smallest(dtype) / 2)


def smallest(dtype: torch.dtype) -> float:
    """The smallest positive (subnormal) number."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def non_finite(groups: Tensor, where: str) -> NonFiniteWeight:
    """The error that names the first NaN or infinity of groups [rows, groups, group]."""
    _, group, place = (~torch.isfinite(groups)).nonzero()[0].tolist()
    return NonFiniteWeight(
        "a weight holds NaN or infinity",
        where=where,
        expected="finite values",
        found=f"{groups[~torch.isfinite(groups)][0].item()} at position "
        f"{group * groups.shape[-1] + place} of a row",
        fix="load the weights again or repair the checkpoint; the model itself is broken",
    )


def scale_overflow(exact: Tensor, dtype: torch.dtype, where: str) -> ScaleOverflow:
    """The error that names the largest scale."""
    return ScaleOverflow(
        "a group's scale is too large for the format's scale dtype",
        where=where,
        expected=f"at most {torch.finfo(dtype).max:.6g} ({dtype})",
        found=f"{exact.abs().max().item():.6g}",
        fix="use scale_dtype=torch.float32",
    )
