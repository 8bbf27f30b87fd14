"""Quantize weights with learned rounding: up or down by what the layer's outputs lose.

Before: `%w` is f32[out, in]. After: `%w` is stored as integer codes; the graph stays. An offset for
each weight and a factor for each scale are learned by the signs of the gradient of the layer's
squared error on the calibration inputs, in a few hundred steps; the best step counts.
Source: SignRound / AutoRound, Cheng et al. 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ir.affine import grouped, ungrouped
from ..ir.format_affine import AffineInt
from ..ir.grid import Grid
from ..ir.weight_blocks import row_slices
from .calibrated_weights import CalibratedQuantizer, Problem, Solution
from .group_grids import GroupGrids
from .learn_rounding import learn_rounding


@dataclass(frozen=True)
class QuantizeRounding(CalibratedQuantizer):
    """Round weights by learned offsets on calibration batches.

    For the shared options see `WeightQuantizer` and `CalibratedQuantizer`; formats that are not
    affine are rounded to nearest. steps: of the sign gradient. rate: of the first step, falling to
    zero; 0: one over the number of steps, so that an offset can move by half a step in all.
    """

    bits: int = 4
    group_size: int | None = 64
    steps: int = 200
    rate: float = 0.0

    def solve(self, problem: Problem) -> Solution:
        width = problem.weight.shape[1]
        grids = GroupGrids(problem.format, width, problem.dtype, problem.where)
        grids.fix_all(problem.weight, problem.hessian.diagonal())
        grid = grids.grid()
        fmt = problem.format
        groups = grouped(problem.weight, grids.size)
        if not isinstance(fmt, AffineInt):
            return Solution(ungrouped(grid.nearest(groups), width), grid)
        top, lowest = (1 << fmt.bits) - 1, int(fmt.code_range == "narrow")
        kept = grid.parameters["scale"]
        scale = torch.where(kept == 0, torch.ones_like(kept), kept).float().unsqueeze(-1)
        zero = grid.parameters.get("zero_point")
        centre = torch.full_like(scale, float(1 << (fmt.bits - 1)))
        centre = centre if zero is None else zero.float().unsqueeze(-1)
        hessian, rate = problem.hessian.float(), self.rate or 1 / self.steps
        bounds = lowest - centre, top - centre
        found = [
            learn_rounding(
                groups[at], hessian, scale[at], bounds[0][at], bounds[1][at], self.steps, rate
            )
            for at in row_slices(len(groups), 4 * width)  # so that all temporaries stay in cache
        ]
        values, used = (torch.cat(parts) for parts in zip(*found, strict=True))
        stored = used.squeeze(-1).to(kept.dtype)
        codes = (values / used).round_()
        values = codes * stored.float().unsqueeze(-1)
        parts = {**grid.parameters, "scale": stored}
        return Solution(ungrouped(values, width), Grid(fmt, parts, grid.dtype))
