"""The values of a pruned matrix that keep its outputs best, once it is decided which may stay.

Of W pruned to Z, with zeros outside a mask, the outputs' mean squared error is tr(D H D^T),
D = Z - W. It is a quadratic of the values that stay; conjugate gradients with its diagonal as
preconditioner (Hestenes & Stiefel 1952), all rows at once, need one product with H a step, where
the exact solution would factor another part of H for every row.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ELEMENTS = 1 << 22  # of all rows' equations at once


def masked_least_squares(
    target: Tensor, mask: Tensor, hessian: Tensor, start: Tensor, steps: int
) -> Tensor:
    """[rows, in], zero outside `mask`, no further from `target` in outputs than `start` is.

    hessian: positive definite [in, in]. start: zero outside the mask. In the dtype of `target`.
    """
    hessian = hessian.to(target.dtype)
    value = start.to(target.dtype).clone()
    scale = hessian.diagonal().reciprocal()
    residual = ((target - value) @ hessian).mul_(mask)
    ahead = residual * scale
    direction = ahead.clone()
    power = (residual * ahead).sum(1, keepdim=True)
    for _ in range(steps):
        bent = (direction @ hessian).mul_(mask)
        curvature = (direction * bent).sum(1, keepdim=True)
        length = torch.where(curvature > 0, power / curvature, 0)
        value.addcmul_(direction, length)
        residual.addcmul_(bent, length, value=-1)
        ahead = residual * scale
        before, power = power, (residual * ahead).sum(1, keepdim=True)
        direction = direction.mul_(torch.where(before > 0, power / before, 0)).add_(ahead)
    return value


def solved_exactly(target: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """The least squares of `masked_least_squares` itself, float64: cubic in the width, by rows.

    What is outside the mask leaves the equations of its row: a one on the diagonal, a zero beside.
    """
    hessian, width = hessian.double(), target.shape[1]
    wanted = (target.double() @ hessian) * mask
    found = torch.empty_like(wanted)
    count = max(1, _ELEMENTS // width**2)
    for start in range(0, len(target), count):
        at = slice(start, start + count)
        kept = mask[at].double()
        equations = hessian * kept.unsqueeze(1) * kept.unsqueeze(2)
        equations.diagonal(dim1=1, dim2=2).add_(1 - kept)
        found[at] = torch.linalg.solve(equations, wanted[at].unsqueeze(2)).squeeze(2)
    return torch.where(mask, found, 0)


__all__ = ["masked_least_squares", "solved_exactly"]
