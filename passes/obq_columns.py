"""Optimal Brain Quantization: the slow original, row by row, that GPTQ makes fast.

Each row rounds one weight at a time and moves all that are left by the best answer to its error;
then that column leaves the inverse Hessian, which is every row's own. Cubic in the width for each
row: for small layers, and as the reference that GPTQ is tested against.
Source: OBQ, Frantar & Alistarh 2022, algorithm 3 and eqs. 2 to 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.affine import grouped, ungrouped
from ..ir.grid import Grid
from .group_grids import GroupGrids

_ELEMENTS = 1 << 22  # of all rows' inverse Hessians at once


def obq(weight: Tensor, hessian: Tensor, grids: GroupGrids, order: Tensor | None = None) -> Tensor:
    """The matrix [rows, in] rounded to `grids`, which must be fixed; float64.

    hessian: positive definite [in, in]. order: of the columns; None: every row takes next the
    weight whose rounding costs the least.
    """
    inverse = torch.linalg.inv(hessian.double())
    count = max(1, _ELEMENTS // inverse.numel())
    found: list[Tensor] = []
    for start in range(0, len(weight), count):
        at = slice(start, start + count)
        whole = grids.grid()
        parts = {name: part[at] for name, part in whole.parameters.items()}
        part = Grid(whole.format, parts, whole.dtype)
        found.append(_rows(weight[at].double(), inverse, part, grids.size, order))
    return torch.cat(found)


def _rows(left: Tensor, start: Tensor, grid: Grid, size: int, order: Tensor | None) -> Tensor:
    """Some rows [rows, in]; start: the inverse Hessian of all columns."""
    count, width = left.shape
    every = torch.arange(count)
    inverse = start.expand(count, -1, -1).clone()
    free = torch.ones(count, width, dtype=torch.bool)
    for step in range(width):
        rounded = ungrouped(grid.nearest(grouped(left, size)), width)
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        if order is None:
            cost = torch.where(free, (rounded - left).square() / diagonal, torch.inf)
            chosen = cost.argmin(1)
        else:
            chosen = order[step].expand(count)
        column = inverse[every, :, chosen]
        pivot = diagonal[every, chosen].unsqueeze(1).clone()
        error = (left - rounded).gather(1, chosen.unsqueeze(1))
        moved = left - error / pivot * column
        value = rounded.gather(1, chosen.unsqueeze(1))
        left = torch.where(free, moved, left).scatter(1, chosen.unsqueeze(1), value)
        free[every, chosen] = False
        inverse -= column.unsqueeze(2) * column.unsqueeze(1) / pivot.unsqueeze(2)
    return left
