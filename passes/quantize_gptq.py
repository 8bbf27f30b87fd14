"""Quantize weights by GPTQ: each rounding error is made up for by the weights not yet rounded.

Before: `%w` is f32[out, in]. After: `%w` is stored in a number format, with the values that change
the layer's outputs on the calibration batches the least that the method finds; the graph stays.
Why: the outputs' squared error of D = rounded - w is tr(D H D^T), H the second moments of the
input; the best answer to an error in one column is a change of the others that H gives in closed
form. Layers are calibrated in order, each on inputs that the rounded ones before it make.
Sources: GPTQ, Frantar et al. 2023; the correction for upstream error after GPTAQ, Li et al. 2025;
the sweeps afterwards after QuantEase, Behdin et al. 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.formats import AffineInt, Format
from ..ir.table_format import TableFormat
from .calibrated_weights import CalibratedQuantizer, Problem, Solution
from .descend_columns import descend
from .gptq_columns import gptq
from .group_grids import GroupGrids


@dataclass(frozen=True)
class QuantizeGptq(CalibratedQuantizer):
    """Round weights by GPTQ on calibration batches.

    For the shared options see `WeightQuantizer` and `CalibratedQuantizer`. act_order: columns of
    large inputs first; the stored order does not change. static_groups: choose every group's grid
    before anything is rounded; without it, act_order keeps the columns of a group together.
    sweeps: how often to go over the rounded columns again, scales included. keep_zeros: what is
    zero in a pruned weight (a fifth of it or more) stays zero, in formats that have a zero.
    """

    bits: int = 4
    group_size: int | None = 64
    act_order: bool = True
    static_groups: bool = True
    sweeps: int = 2
    keep_zeros: bool = True

    def solve(self, problem: Problem) -> Solution:
        width = problem.weight.shape[1]
        grids = GroupGrids(problem.format, width, problem.dtype, problem.where)
        zeros = problem.zeros if self.keep_zeros and _has_zero(problem.format) else None
        values = gptq(
            problem.weight,
            problem.hessian,
            grids,
            act_order=self.act_order,
            static_groups=self.static_groups,
            zeros=zeros,
        )
        if self.sweeps > 0:
            values = descend(problem.weight, values, problem.hessian, grids, self.sweeps, zeros)
        return Solution(values, grids.grid())


def _has_zero(fmt: Format) -> bool:
    """Whether zero lies on every grid of a format."""
    return isinstance(fmt, AffineInt) or (isinstance(fmt, TableFormat) and 0.0 in fmt.entries)
