"""Improve a rounded matrix: column by column, the grid value that is best given all the others.

GPTQ decides each column once, before the later ones are known. Cyclic coordinate descent on the
same squared error goes over the columns again (QuantEase, Behdin et al. 2023, alg. 1), and before
a group's columns gives its scale the value of least squares for its codes. The error never grows,
but for the rounding of scales to their dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .group_grids import GroupGrids


def descend(
    target: Tensor,
    rounded: Tensor,
    hessian: Tensor,
    grids: GroupGrids,
    sweeps: int,
    zeros: Tensor | None = None,
) -> Tensor:
    """A matrix [rows, in] on `grids` (whose scales change) no further from `target` than `rounded`.

    The distance is tr(D H D^T), D = result - target; hessian: [in, in], positive diagonal.
    zeros: bool [rows, in], what stays zero as it is in `rounded`.
    """
    hessian = hessian.float()
    values = rounded.t().contiguous()  # [in, rows]: a column is contiguous
    held = None if zeros is None else zeros.t().contiguous()
    slope = hessian @ (rounded - target.float()).t()  # half the gradient
    for _ in range(sweeps):
        for group in range(grids.count):
            at = grids.span(group)
            before = values[at].clone()
            here = None if held is None else held[at]
            _descend_group(values[at], slope[at].clone(), hessian[at, at], grids, group, here)
            slope.addmm_(hessian[:, at], values[at] - before)
    return values.t().contiguous()


def _descend_group(
    values: Tensor,
    slope: Tensor,
    hessian: Tensor,
    grids: GroupGrids,
    group: int,
    zeros: Tensor | None,
) -> None:
    """One group's columns [group, rows], changed in place; slope is used up."""
    _fit_line(values, slope, hessian, grids, group)
    for column, curvature in enumerate(hessian.diagonal().tolist()):
        wanted = torch.sub(values[column], slope[column], alpha=1 / curvature)
        change = grids.nearest(group, wanted).sub_(values[column])
        if zeros is not None:
            change.masked_fill_(zeros[column], 0)
        values[column] += change
        slope.addr_(hessian[column], change)


def _fit_line(
    values: Tensor, slope: Tensor, hessian: Tensor, grids: GroupGrids, group: int
) -> None:
    """Scale, then offset, of least squares for a group's codes; values and slope follow."""
    line = grids.line(group)
    if line is None:
        return
    steps = values if line.offset is None else values - line.offset
    factor = 1 - _newton(steps, slope, hessian @ steps)
    # A scale that turned its sign or vanished would be no better grid for the next rounding.
    factor = torch.where((factor > 0.5) & (factor < 2), factor, torch.ones_like(factor))
    shift = None
    if line.offset is not None:
        ones = torch.ones_like(steps)
        slope_then = slope + hessian @ (steps * (factor - 1))
        shift = -_newton(ones, slope_then, hessian.sum(1, keepdim=True).expand_as(steps))
    grids.move_line(group, factor, shift)
    new = grids.line(group)
    assert new is not None
    moved = steps * (new.scale / line.scale)
    moved = moved if new.offset is None else moved + new.offset
    slope.addmm_(hessian, moved - values)
    values.copy_(moved)


def _newton(direction: Tensor, slope: Tensor, curved: Tensor) -> Tensor:
    """How far against `direction` [group, rows] the squared error is least; curved: H direction."""
    curvature, gain = (direction * curved).sum(0), (direction * slope).sum(0)
    return torch.where(curvature > 0, gain / curvature, torch.zeros_like(gain))
