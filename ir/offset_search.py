"""Scale and offset of each group by weighted least squares.

Given codes, the best line through (code, value) is a regression; given a line, the best codes are
the nearest. Both are repeated from several ranges a little narrower than the group's, and the
best found is kept, so the error never grows (as llama.cpp does for its k-quants).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .weight_blocks import row_slices

FACTORS = tuple(step / 20 for step in range(13, 22))


class _Bits(Protocol):
    @property
    def bits(self) -> int: ...
    @property
    def k(self) -> bool: ...
    @property
    def scale_dtype(self) -> torch.dtype: ...


def least_squares(
    form: _Bits, groups: Tensor, importance: Tensor, scale: Tensor, low: Tensor
) -> tuple[Tensor, Tensor]:
    """Better scale and offset [rows, groups] than those of the range, by importance [groups, group]
    * error^2 of groups [rows, groups, group].
    """
    slices = list(row_slices(groups.shape[0], 4 * max(1, groups[0].numel())))
    found = [_best(form, groups[at], importance, scale[at], low[at]) for at in slices]
    return torch.cat([s for s, _ in found]), torch.cat([o for _, o in found])


def _best(
    form: _Bits, groups: Tensor, importance: Tensor, scale: Tensor, low: Tensor
) -> tuple[Tensor, Tensor]:
    weights = importance.to(groups.dtype).expand_as(groups)
    scale, low = _as_kept(form, scale, low)
    best, offset = scale, low
    least = _error(form, groups, weights, scale, low)[0]
    middle = low + scale * ((1 << form.bits) - 1) / 2
    for factor in FACTORS:
        step, start = scale * factor, middle + (low - middle) * factor
        if form.k:
            start = start.clamp(max=0)
        for _ in range(2):
            codes = _error(form, groups, weights, step, start)[1]
            step, start = _as_kept(form, *_line(form, groups, weights, codes, step, start))
        error = _error(form, groups, weights, step, start)[0]
        better = error < least
        least = torch.where(better, error, least)
        best, offset = torch.where(better, step, best), torch.where(better, start, offset)
    return best, offset


def _as_kept(form: _Bits, step: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded to the dtype they are stored in, so that the error seen is the one that stays."""
    if form.k:
        return step, start
    return step.to(form.scale_dtype).to(step.dtype), start.to(form.scale_dtype).to(start.dtype)


def _error(
    form: _Bits, groups: Tensor, weights: Tensor, step: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted squared error [rows, groups] and the codes."""
    safe = torch.where(step == 0, torch.ones_like(step), step).unsqueeze(-1)
    moved = groups - start.unsqueeze(-1)
    codes = (moved / safe).round_().clamp_(0, (1 << form.bits) - 1)
    error = (codes * step.unsqueeze(-1) - moved).square_().mul_(weights).sum(-1)
    return error, codes


def _line(
    form: _Bits, groups: Tensor, weights: Tensor, codes: Tensor, step: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """The regression of the values on their codes; the given line where that has no slope."""
    total = weights.sum(-1)
    mean_code = (weights * codes).sum(-1) / total
    mean_value = (weights * groups).sum(-1) / total
    spread = (weights * (codes - mean_code.unsqueeze(-1)).square()).sum(-1)
    both = weights * (codes - mean_code.unsqueeze(-1)) * (groups - mean_value.unsqueeze(-1))
    slope = both.sum(-1) / spread
    offset = mean_value - slope * mean_code
    if form.k:
        through_zero = (weights * codes * groups).sum(-1) / (weights * codes.square()).sum(-1)
        slope, offset = torch.where(offset > 0, through_zero, slope), offset.clamp(max=0)
    usable = (slope > 0) & slope.isfinite() & offset.isfinite()
    return torch.where(usable, slope, step), torch.where(usable, offset, start)


__all__ = ["FACTORS", "least_squares"]
