"""Quantize weights by half-quadratic zero points: robust to outliers, without calibration.

Before: `%w` is f32[out, in]. After: `%w` is stored as integer codes with a scale and a real offset
for each group; the graph stays. The offsets are those of the least p-norm of the rounding
error, p below 1, so that a few large errors cost less than many small ones: alternately the error
is shrunk towards few large entries (eq. 4) and the offset set to the mean that fits what is left
(eq. 5). Lossy; needs no data.
Source: HQQ, Badri & Shaji 2023 (mobiusml.github.io/hqq_blog).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.affine import grouped
from ..ir.encoded import Encoded, Format
from ..ir.errors import WrongOption
from ..ir.format_offset import AffineOffset
from ..ir.grid import Grid
from ..ir.program import Program
from ..ir.weight_blocks import row_blocks
from .contract import Context
from .weight_plan import SCALES, WeightQuantizer


@dataclass(frozen=True)
class QuantizeHqq(WeightQuantizer):
    """Round weights with half-quadratic offsets.

    For the shared options see `WeightQuantizer`; formats without a real offset are rounded to
    nearest. p: of the norm. beta, kappa: how strongly the error is kept at the start,
    and the factor of that in each of at most `steps` steps.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    scale_dtype: str = "float16"
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise WrongOption(
                "option quantize_hqq.p is out of range",
                expected="above 0, at most 1",
                found=f"{self.p:g}",
                fix="leave it at 0.7",
            )

    def run(self, program: Program, context: Context) -> None:
        chosen = self.planned(program, context.journal)
        for done, (role, fmt) in enumerate(chosen):
            context.progress(done, len(chosen), role.name)
            if context.journal.offers():
                assert role.axis is not None
                weight = program.weights[role.name]
                program.weights[role.name] = self._encode(fmt, weight, role.axis, role.name)
                context.journal.changed_weight(self.pass_name(), role.name, fmt.name)

    @property
    def linear_format(self) -> Format:
        """Real zero points need an offset for each group beside the scale."""
        if self.format or self.symmetric:
            return super().linear_format
        kept = SCALES[self.scale_dtype] or torch.float32
        return AffineOffset(self.bits, self.group_size, kept)

    def _encode(self, fmt: Format, weight: Tensor, axis: int, where: str) -> Encoded:
        if not isinstance(fmt, AffineOffset) or fmt.k:
            return fmt.encode(weight, axis, where=where)
        rows = weight.detach().movedim(axis, -1)
        length = rows.shape[-1]
        found: list[Grid] = []
        for _, block in row_blocks(rows):
            groups = grouped(block.float(), fmt.grouping(length))
            found.append(self._fitted(fmt.grid(groups, dtype=weight.dtype, where=where), groups))
        names = found[0].parameters
        parts = {name: torch.cat([grid.parameters[name] for grid in found]) for name in names}
        return fmt.encode_on(weight, Grid(fmt, parts, weight.dtype), axis)

    def _fitted(self, grid: Grid, groups: Tensor) -> Grid:
        """The grid of values [rows, groups, group] with the offsets of the least p-norm met."""
        step = grid.parameters["scale"].unsqueeze(-1)
        best = offset = grid.parameters["offset"].unsqueeze(-1)
        least = torch.full_like(offset, torch.inf)
        top, beta = (1 << self._bits(grid)) - 1, self.beta
        for number in range(self.steps + 1):
            whole = ((groups - offset) / step).round_().clamp_(0, top).mul_(step)
            error = groups - whole - offset
            size = error.abs().clamp_(min=1e-8)
            threshold = size.pow(self.p - 1)
            cost = (size * threshold).sum(-1, keepdim=True)
            best, least = torch.where(cost < least, offset, best), torch.minimum(cost, least)
            if number < self.steps:
                # The generalized soft threshold: about argmin |e|^p + beta/2 (e - error)^2.
                kept = size.sub_(threshold.div_(beta)).clamp_(min=0).mul_(error.sign_())
                offset = (groups - kept).sub_(whole).mean(-1, keepdim=True)
                beta *= self.kappa
        parameters = {**grid.parameters, "offset": best.squeeze(-1)}
        return Grid(grid.format, parameters, grid.dtype)

    @staticmethod
    def _bits(grid: Grid) -> int:
        assert isinstance(grid.format, AffineOffset)
        return grid.format.bits
