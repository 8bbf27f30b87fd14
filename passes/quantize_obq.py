"""Quantize small layers by Optimal Brain Quantization: the cheapest weight of each row next.

Before: `%w` is f32[out, in]. After: `%w` is stored in a number format; the graph stays. What GPTQ
does, with every row in its own order and without its shortcuts: slower by the width, so meant for
layers of a few hundred inputs, and for comparison: GPTQ's order, large inputs first, is mostly
better than the greedy one.
Source: OBQ, Frantar & Alistarh 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ir.hessian import inverse_factor
from .calibrated_weights import CalibratedQuantizer, Problem, Solution
from .group_grids import GroupGrids
from .obq_columns import obq


@dataclass(frozen=True)
class QuantizeObq(CalibratedQuantizer):
    """Round weights by OBQ on calibration batches.

    For the options see `WeightQuantizer` and `CalibratedQuantizer`. greedy: each row rounds next
    what costs it the least; without it, all rows go from the first column to the last.
    """

    bits: int = 4
    group_size: int | None = 64
    greedy: bool = True

    def solve(self, problem: Problem) -> Solution:
        width = problem.weight.shape[1]
        grids = GroupGrids(problem.format, width, problem.dtype, problem.where)
        cost = inverse_factor(problem.hessian).diagonal() ** -2
        grids.fix_all(problem.weight, cost)
        order = None if self.greedy else torch.arange(width)
        return Solution(obq(problem.weight, problem.hessian, grids, order).float(), grids.grid())
