"""The affine grid of each group that rounds its values with the least squared error.

The range of a group fixes a grid that reaches its extremes; one that is a little narrower or wider,
or whose zero lies a step beside, often fits the rest better. Each group tries them all, that of its
range among them, so the error never grows. A search of clipping as in AWQ (Lin et al. 2023, sec.
3.2), but for the error of the weights alone, or of the weights times what an input matters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .affine import AffineGrid, affine_parameters
from .weight_blocks import row_slices

FACTORS = tuple(step / 40 for step in range(34, 47))
SHIFTS = (-1, 0, 1)


def best_parameters(
    form: AffineGrid, groups: Tensor, importance: Tensor, scale_dtype: torch.dtype, where: str = ""
) -> tuple[Tensor, Tensor | None]:
    """Scale and (unless symmetric) zero point [rows, groups] of the least sum of
    importance * error^2. groups [rows, groups, group]; importance [groups, group], not negative.
    """
    count = groups.shape[0]
    slices = row_slices(count, 4 * max(1, groups[0].numel()))
    found = [_best(form, groups[at], importance, scale_dtype, where) for at in slices]
    scale = torch.cat([scale for scale, _ in found])
    return scale, None if form.symmetric else torch.cat([zero for _, zero in found])


def _best(
    form: AffineGrid, groups: Tensor, importance: Tensor, dtype: torch.dtype, where: str
) -> tuple[Tensor, Tensor]:
    first, zero = affine_parameters(form, groups, dtype, where)
    groups = groups.float()
    importance = importance.to(groups.dtype)
    top = (1 << form.bits) - 1
    middle = torch.full_like(first, 1 << (form.bits - 1), dtype=torch.float32)
    start = middle if zero is None else zero.float()
    lowest = 1 if form.code_range == "narrow" else 0
    least = torch.full_like(start, torch.inf)
    scale, chosen = first.clone(), start.clone()
    for shift in SHIFTS if zero is not None else (0,):
        moved = (start + shift).clamp(0, top)
        for factor in FACTORS:
            tried = (first.float() * factor).to(dtype)
            step = torch.where(tried == 0, torch.ones_like(tried), tried).float().unsqueeze(-1)
            place = moved.unsqueeze(-1)
            codes = (groups / step + place).round_().clamp_(lowest, top)
            error = codes.sub_(place).mul_(step).sub_(groups).square_().mul_(importance).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            scale = torch.where(better, tried, scale)
            chosen = torch.where(better, moved, chosen)
    return scale, chosen


__all__ = ["FACTORS", "SHIFTS", "best_parameters"]
