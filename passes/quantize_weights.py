"""Quantize weights: round to nearest on an affine integer grid.

Before: `%w` is f32[out, in]. After: `%w` is stored as integer codes with a scale (and zero point)
for each channel or group; the graph does not change, and every reader sees the rounded values.
Lossy within half a step of each weight (with `search`, within a step or more for the largest, and
less on the whole). Axis of the groups: the one that the reading matmul sums
over, found in the graph (last for `linear`, first for `addmm`).
Source: uniform affine quantization, Jacob et al. 2018, sec. 2.1; groups as in Dettmers et al. 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..ir.formats import AffineInt, Format
from ..ir.least_squares_grid import encode_least_squares
from ..ir.program import Program
from ..ir.resident import expect
from ..ir.weight_roles import Role
from .contract import Context
from .weight_plan import WeightQuantizer


@dataclass(frozen=True)
class QuantizeWeights(WeightQuantizer):
    """Round weights to nearest, in integers of `bits` bits or any other format.

    For the options see `WeightQuantizer`. search: of affine formats, try grids beside the one of
    each group's range, and keep the one of least squared error.
    """

    search: bool = False

    def run(self, program: Program, context: Context) -> None:
        chosen = self.planned(program, context.journal)
        for done, (role, fmt) in enumerate(chosen):
            context.progress(done, len(chosen), role.name)
            for following, _ in chosen[done + 1 : done + 2]:
                expect(program.weights.entry(following.name))
            if context.journal.offers():
                assert role.axis is not None
                encode = self._encoder(role, fmt)
                weight = program.weights[role.name]
                program.weights[role.name] = encode(weight, role.axis, where=role.name)
                context.journal.changed_weight(self.pass_name(), role.name, fmt.name)

    def _encoder(self, role: Role, fmt: Format):
        if self.search and isinstance(fmt, AffineInt) and not role.tables:
            return partial(encode_least_squares, fmt)
        return fmt.encode
