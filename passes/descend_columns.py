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
    target: Tensor, rounded: Tensor, hessian: Tensor, grids: GroupGrids, sweeps: int
) -> Tensor:
    """A matrix [rows, in] on `grids` (whose scales change) no further from `target` than `rounded`.

    The distance is tr(D H D^T), D = result - target; hessian: [in, in], positive diagonal.
    """
    hessian = hessian.float()
    values = rounded.t().contiguous()  # [in, rows]: a column is contiguous
    slope = hessian @ (rounded - target.float()).t()  # half the gradient
    for _ in range(sweeps):
        for group in range(grids.count):
            at = grids.span(group)
            before = values[at].clone()
            _descend_group(values[at], slope[at].clone(), hessian[at, at], grids, group)
            slope.addmm_(hessian[:, at], values[at] - before)
    return values.t().contiguous()


def _descend_group(
    values: Tensor, slope: Tensor, hessian: Tensor, grids: GroupGrids, group: int
) -> None:
    """One group's columns [group, rows], changed in place; slope is used up."""
    moved = _best_scale(values, slope, hessian, grids, group)
    if moved is not None:
        slope.addmm_(hessian, moved - values)
        values.copy_(moved)
    for column, curvature in enumerate(hessian.diagonal().tolist()):
        wanted = torch.sub(values[column], slope[column], alpha=1 / curvature)
        change = grids.nearest(group, wanted).sub_(values[column])
        values[column] += change
        slope.addr_(hessian[column], change)


def _best_scale(
    values: Tensor, slope: Tensor, hessian: Tensor, grids: GroupGrids, group: int
) -> Tensor | None:
    """The values on the scale of least squares for their codes; None for a format without scale."""
    curvature = (values * (hessian @ values)).sum(0)
    gain = (values * slope).sum(0)
    factor = torch.where(curvature > 0, 1 - gain / curvature, torch.ones_like(gain))
    # A scale that turned its sign or vanished would be no better grid for the next rounding.
    factor = torch.where((factor > 0.5) & (factor < 2), factor, torch.ones_like(factor))
    used = grids.rescale(group, factor)
    return None if used is None else values * used
