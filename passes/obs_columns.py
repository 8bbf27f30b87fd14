"""Which values of a matrix Optimal Brain Surgeon takes out, one by one and row by row.

Each step takes the value whose loss costs the outputs least after all that are left have made up
for it, w^2 / [H^-1]_ii; then its column leaves the inverse Hessian, which is every row's own.
Cubic in the width for each row: for small layers, and as the reference of SparseGPT.
Source: ExactOBS, Frantar & Alistarh 2022, algorithm 1 (a row), algorithm 2 (rows compared by what
each next value costs), sec. 4 (N:M: a group that has lost its share loses no more).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.sparsity_patterns import Sparsity, largest

_ELEMENTS = 1 << 22  # of all rows' inverse Hessians at once


def obs_mask(weight: Tensor, hessian: Tensor, pattern: Sparsity, scope: str) -> Tensor:
    """bool [rows, in]: what stays; hessian: positive definite [in, in]; scope: of a share."""
    inverse = torch.linalg.inv(hessian.double())
    width = weight.shape[1]
    free = _losses_allowed(width, pattern)
    wanted = int(free.sum()) if pattern.structured else pattern.zeros(width)
    steps = width if scope == "matrix" and not pattern.structured else wanted
    count = max(1, _ELEMENTS // inverse.numel())
    found = [
        _taken(weight[start : start + count].double(), inverse, free, pattern.of or width, steps)
        for start in range(0, len(weight), count)
    ]
    order, cost = torch.cat([o for o, _ in found]), torch.cat([c for _, c in found])
    taken = torch.ones_like(order, dtype=torch.bool)
    if steps > wanted:
        # A row's next value is compared by the most that this and the ones before it cost.
        most = cost.cummax(1).values
        taken = largest(-most.reshape(1, -1), pattern.zeros(weight.numel())).view(order.shape)
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, order, ~taken)


def _losses_allowed(width: int, pattern: Sparsity) -> Tensor:
    """int64 [groups, 1]: how many values each group of a row may lose."""
    if not pattern.structured:
        return torch.tensor([[width]])
    sizes = torch.tensor([min(pattern.of, width - at) for at in range(0, width, pattern.of)])
    return (sizes - pattern.keep).clamp_min(0).unsqueeze(1)


def _taken(
    left: Tensor, start: Tensor, allowed: Tensor, size: int, steps: int
) -> tuple[Tensor, Tensor]:
    """The columns that rows [rows, in] lose, in order, and what each costs: [rows, steps].

    start: the inverse Hessian of all columns; allowed: losses of each group of `size` columns.
    """
    count, width = left.shape
    every = torch.arange(count)
    inverse = start.expand(count, -1, -1).clone()
    group_of = torch.arange(width) // size
    budget = allowed.squeeze(1).expand(count, -1).clone()
    free = torch.ones(count, width, dtype=torch.bool)
    order = torch.empty(count, steps, dtype=torch.int64)
    costs = torch.empty(count, steps, dtype=torch.float64)
    for step in range(steps):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        open_ = free & (budget[:, group_of] > 0)
        cost = torch.where(open_, left.square() / diagonal, torch.inf)
        costs[:, step], chosen = cost.min(1)
        order[:, step] = chosen
        column = inverse[every, :, chosen]
        pivot = diagonal[every, chosen].unsqueeze(1).clone()
        left = left - left.gather(1, chosen.unsqueeze(1)) / pivot * column
        free[every, chosen] = False
        left = torch.where(free, left, 0)
        budget[every, group_of[chosen]] -= 1
        inverse -= column.unsqueeze(2) * column.unsqueeze(1) / pivot.unsqueeze(2)
    return order, costs


__all__ = ["obs_mask"]
