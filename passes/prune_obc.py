"""Prune small layers by Optimal Brain Compression: one value at a time, the cheapest next.

Before: `%w` is f32[out, in]. After: the same, with zeros in a pattern and the values that stay at
the least squares of the layer's outputs on the calibration batches; the graph stays. What SparseGPT
does, with every row in its own order and without its shortcuts: slower by the width, so meant for
layers of a few hundred inputs, and for comparison.
Source: Optimal Brain Compression, Frantar & Alistarh 2022, sec. 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ir.sparsity_patterns import Sparsity
from .calibrated_pruning import HessianPruner
from .masked_least_squares import solved_exactly
from .obs_columns import obs_mask


@dataclass(frozen=True)
class PruneObc(HessianPruner):
    """Prune by OBC on calibration batches; for the options see its bases."""

    scope: str = "matrix"

    def prune(self, rows: Tensor, inputs: Tensor, pattern: Sparsity) -> Tensor:
        mask = obs_mask(rows, inputs, pattern, self.scope)
        return solved_exactly(rows, mask, inputs)
