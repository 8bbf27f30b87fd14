"""Prune weights by Wanda: the smallest |weight| times the norm of its input become zero.

Before: `%w` is f32[out, in]. After: the same, with zeros in a pattern; the graph stays, and the
values that stay are untouched. A large input makes a small weight count: compared within each
output, |w_ij| |x_j| is how far the output moves when the weight goes.
Source: Wanda, Sun et al. 2024, eq. 1 (scores) and sec. 3 (compared by output).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.sparsity_patterns import Sparsity
from .calibrated_pruning import CalibratedPruner, Squares, Statistics


@dataclass(frozen=True)
class PruneWanda(CalibratedPruner):
    """Set values of small |weight| times input norm to zero; for the options see `WeightPruner`."""

    def statistics(self, width: int) -> Statistics:
        return Squares(width)

    def prepared(self, found: Statistics) -> tuple[Tensor, str]:
        norms = found.mean().sqrt()
        dead = int((norms == 0).sum())
        return norms, f"{dead} dead input channels" if dead else ""

    def prune(self, rows: Tensor, inputs: Tensor, pattern: Sparsity) -> Tensor:
        # In float64 a tiny weight times a tiny norm does not vanish.
        return torch.where(pattern.mask(rows.abs() * inputs, self.scope), rows, 0)
