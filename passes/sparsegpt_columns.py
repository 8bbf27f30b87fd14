"""SparseGPT on one matrix: column by column, what is set to zero is made up for by later columns.

Source: SparseGPT, Frantar & Alistarh 2023, algorithm 1 and sec. 3.4 (masks chosen block by block
among the values as they are then, by w^2 / U_ii^2; N:M chosen when a group's turn has come).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.hessian import inverse_factor
from ..ir.sparsity_patterns import Sparsity

_BLOCK = 128


def sparsegpt(weight: Tensor, hessian: Tensor, pattern: Sparsity, scope: str) -> Tensor:
    """The pruned matrix [rows, in], float32; hessian: positive definite [in, in].

    scope: see `Sparsity.mask`; of a share, in every block of columns.
    """
    factor = inverse_factor(hessian).float()
    left = weight.float().t().contiguous()  # [in, rows]: a column is contiguous
    step = max(1, _BLOCK // pattern.of) * pattern.of if pattern.structured else _BLOCK
    for start in range(0, len(left), step):
        at = slice(start, start + step)
        errors = _prune_block(left[at], factor[at, at], pattern, scope)
        left[at.stop :].addmm_(factor[at, at.stop :].t(), errors, alpha=-1)
    return left.t().contiguous()


def _prune_block(left: Tensor, factor: Tensor, pattern: Sparsity, scope: str) -> Tensor:
    """Prune the columns left [columns, rows] in place; returns their errors over U_ii."""
    errors = torch.empty_like(left)
    diagonal = factor.diagonal()
    run = pattern.of or len(left)
    keep = torch.empty_like(left, dtype=torch.bool)
    for column, pivot in enumerate(diagonal.tolist()):
        if column % run == 0:
            at = slice(column, column + run)
            scores = (left[at] / diagonal[at, None]).square_()
            keep[at] = pattern.mask(scores.t().contiguous(), scope).t()
        dropped = torch.where(keep[column], 0, left[column])
        errors[column] = dropped / pivot
        left[column] -= dropped
        if column + 1 < len(left):
            left[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
    return errors


__all__ = ["sparsegpt"]
