"""Prune weights by magnitude: the smallest values of each weight become zero.

Before: `%w` is f32[out, in]. After: the same, with zeros in a pattern; the graph stays. Nothing is
known of the inputs, so this is the baseline of the other methods.
Source: magnitude pruning, Han et al. 2015, sec. 3; 2:4 by magnitude, Mishra et al. 2021, sec. 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ir.composite_format import back
from ..ir.program import Program
from ..ir.resident import expect
from ..ir.sparsity_patterns import Sparsity
from .contract import Context
from .prune_plan import WeightPruner, note, rows_apart


@dataclass(frozen=True)
class PruneMagnitude(WeightPruner):
    """Set the smallest magnitudes to zero; for the options see `WeightPruner`."""

    scope: str = "matrix"

    def run(self, program: Program, context: Context) -> None:
        planned = self.planned(program, context.journal)
        shares: dict[str, tuple[Sparsity, int, int]] = {}
        for done, (role, pattern) in enumerate(planned):
            context.progress(done, len(planned), role.name)
            for following, _ in planned[done + 1 : done + 2]:
                expect(program.weights.entry(following.name))
            if not context.journal.offers():
                continue
            assert role.axis is not None
            weight = program.weights[role.name]
            rows = rows_apart(weight, role.axis, role.name)
            mask = pattern.mask(rows.abs(), self.scope)
            pruned = torch.where(mask, rows, 0).to(weight.dtype)
            program.weights[role.name] = back(pruned, weight.shape, role.axis)
            zeros = int((pruned == 0).sum())
            shares[role.name] = pattern, zeros, rows.numel()
            said = note(pattern, zeros, rows.numel())
            context.journal.changed_weight(self.pass_name(), role.name, said)
        self.report(context.journal, shares)
