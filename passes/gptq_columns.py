"""GPTQ on one matrix: round column by column, and let the columns to come make up for each error.

Source: GPTQ, Frantar et al. 2023, sec. 3.3 and algorithm 1 (Cholesky factor of the inverse Hessian,
lazy batches of columns); ordering by importance and static groups follow its authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.hessian import inverse_factor
from .group_grids import GroupGrids

_BLOCK = 128


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grids: GroupGrids,
    *,
    act_order: bool = True,
    static_groups: bool = True,
    zeros: Tensor | None = None,
) -> Tensor:
    """The matrix [rows, in] rounded to `grids`, which this fixes, float32.

    hessian: positive definite [in, in]. act_order: columns of large inputs first, when the most
    columns are left to make up for their errors. static_groups: every group's grid is fixed for the
    weights as they are; otherwise for the group's weights with the earlier errors in them, when its
    first column's turn has come, and then act_order orders the groups and the columns within each.
    zeros: bool [rows, in], what stays zero (which must lie on the grids); the columns to come make
    up for that as for a rounding. Weighs errors in the choice of a grid by 1 / U_ii^2: what one
    costs after the later columns have made up for it.
    """
    static_groups = static_groups or not grids.format.groups_apart
    order = _order(hessian.diagonal(), grids, act_order, static_groups)
    factor = inverse_factor(hessian[order][:, order]).float()
    cost = torch.empty(grids.width)
    cost[order] = factor.diagonal() ** -2
    if static_groups:
        grids.fix_all(weight, cost)
    left = weight.float()[:, order].t().contiguous()  # [in, rows]: a column is contiguous
    held = None if zeros is None else zeros[:, order].t().contiguous()
    step = max(1, _BLOCK // grids.size) * grids.size  # whole groups
    result = torch.empty_like(weight, dtype=torch.float32)
    for start in range(0, grids.width, step):
        at = slice(start, start + step)
        chosen = None if static_groups else cost[order[at]]
        groups, here = order[at] // grids.size, None if held is None else held[at]
        errors = _round_block(left[at], factor[at, at], groups, grids, chosen, here)
        left[at.stop :].addmm_(factor[at, at.stop :].t(), errors, alpha=-1)
    result[:, order] = left.t()
    return result


def _round_block(
    left: Tensor,
    factor: Tensor,
    groups: Tensor,
    grids: GroupGrids,
    cost: Tensor | None,
    zeros: Tensor | None,
) -> Tensor:
    """Round the columns left [columns, rows] in place; returns their errors over U_ii.

    cost: to fix each group's grid with when its first column's turn has come; None: all are fixed.
    zeros: bool [columns, rows], what stays zero.
    """
    errors = torch.empty_like(left)
    diagonal, group_of = factor.diagonal().tolist(), groups.tolist()
    for column, group in enumerate(group_of):
        if cost is not None and (column == 0 or group != group_of[column - 1]):
            span = grids.span(group)
            at = slice(column, column + span.stop - span.start)
            grids.fix(group, left[at].t(), cost[at])
        rounded = grids.nearest(group, left[column])
        if zeros is not None:
            rounded.masked_fill_(zeros[column], 0)
        error = torch.sub(left[column], rounded, out=errors[column]).div_(diagonal[column])
        left[column] = rounded
        if column + 1 < len(group_of):
            left[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
    return errors


def _order(diagonal: Tensor, grids: GroupGrids, act_order: bool, static_groups: bool) -> Tensor:
    """The columns in the order in which they are rounded."""
    if not act_order:
        return torch.arange(grids.width)
    if static_groups:
        return diagonal.argsort(descending=True, stable=True)
    spans = [grids.span(group) for group in range(grids.count)]
    largest = torch.stack([diagonal[span].amax() for span in spans])
    inside = [diagonal[span].argsort(descending=True, stable=True) + span.start for span in spans]
    return torch.cat([inside[g] for g in largest.argsort(descending=True, stable=True).tolist()])
