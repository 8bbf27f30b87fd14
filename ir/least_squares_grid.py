"""The affine grid of each group that rounds its values with the least squared error.

The range of a group fixes a grid that reaches its extremes; one that is a little narrower or wider,
or whose zero lies a step beside, often fits the rest better. Each group tries them all, that of its
range among them, so the error never grows. A search of clipping as in AWQ (Lin et al. 2023, sec.
3.2), but for the error of the weights alone, so without calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .affine import affine_parameters, grouped
from .encoded import Encoded
from .formats import AffineInt

FACTORS = tuple(step / 40 for step in range(34, 47))
SHIFTS = (-1, 0, 1)
_CHUNK = 1 << 20


def encode_least_squares(
    form: AffineInt, weight: Tensor, axis: int = -1, *, where: str = ""
) -> Encoded:
    """Encode `weight` [..., out, in] on the best of the grids tried for each group along `axis`.

    Works through blocks of rows, so temporary memory does not grow with the weight. Raises what
    `AffineInt.encode` raises.
    """
    rows = weight.detach().movedim(axis, -1)
    *lead, length = rows.shape
    flat = rows.reshape(-1, length)
    step = max(1, _CHUNK // length)
    dtype = form.scale_dtype or weight.dtype
    found = [_best(form, block.float(), dtype, where) for block in flat.split(step)]
    scale = torch.cat([scale for scale, _ in found]).reshape(*lead, -1)
    if form.symmetric:
        return form.encode_with(weight, scale, axis=axis)
    zero = torch.cat([zero for _, zero in found]).reshape(*lead, -1)
    return form.encode_with(weight, scale, zero, axis=axis)


def _best(form: AffineInt, rows: Tensor, dtype: torch.dtype, where: str) -> tuple[Tensor, Tensor]:
    """Scale and zero point [rows, groups] of the least squared error."""
    groups = grouped(rows, form.group_size)
    real = grouped(torch.ones_like(rows[:1]), form.group_size)
    real.view(-1)[rows.shape[1] :] = 0  # what fills up a short group is no value of the weight
    first, zero = affine_parameters(form, groups, dtype, where)
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
            error = codes.sub_(place).mul_(step).sub_(groups).square_().mul_(real).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            scale = torch.where(better, tried, scale)
            chosen = torch.where(better, moved, chosen)
    return scale, chosen
