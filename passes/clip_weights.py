"""Clip weights group by group, where a smaller range rounds the rest better.

Before: `%w` f32[out, in]. After: the same, each group's values cut to r times its largest
magnitude, r of 20 points from 1 down to a half, by the squared error that rounding then leaves in
the outputs. A group's error e costs e^T H e, H the second moments of the inputs of that group
alone, so one pass over the batches serves all points. The quantization itself follows.
Lin et al. 2023 (AWQ), sec. 5 and its published code: the clipping that follows the scales. LOSSY:
the clipped values are gone; r = 1 is among the points, so no group's error grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ir.encoded import Format
from ..ir.errors import WrongOption
from ..ir.program import Program
from .calibrate import Activations, Site, product_sites, sweep
from .contract import Context, contract
from .weight_plan import WeightQuantizer

_ROWS = 2048


@dataclass(frozen=True)
class ClipWeights(WeightQuantizer):
    """Cut off the largest weights of each group for a quantization to come.

    Give it the options of the pass that quantizes afterwards; for them see `WeightQuantizer`.
    points: of the grid. least: the smallest part of a range that is tried.
    """

    bits: int = 4
    points: int = 20
    least: float = 0.5

    contract = contract("lossy", requires=["functional", "dense_weights"], needs=["calibration"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.points < 2 or not 0 < self.least < 1:
            raise WrongOption(
                "options clip_weights.points and least leave nothing to try",
                expected="at least 2 points, least between 0 and 1",
                found=f"points={self.points}, least={self.least:g}",
            )

    @property
    def ratios(self) -> list[float]:
        """From 1 down to `least`."""
        step = (1 - self.least) / (self.points - 1)
        return [1 - step * place for place in range(self.points)]

    def run(self, program: Program, context: Context) -> None:
        planned = {role.name: fmt for role, fmt in self.planned(program, context.journal)}
        done: set[str] = set()

        def visit(site: Site, activations: Activations) -> None:
            moments: dict[int, Tensor] = {}
            for product in site.products:
                name, fmt = product.weight, planned.get(product.weight)
                if fmt is None or name in done or not context.journal.offers():
                    continue
                done.add(name)
                size = fmt.grouping(site.width)
                if size not in moments:
                    moments[size] = group_moments(activations, site.width, size)
                kept, note = self._clipped(program, name, product.axis, fmt, moments[size])
                program.weights[name] = kept
                context.journal.changed_weight(self.pass_name(), name, note)

        sites = [s for s in product_sites(program) if any(p.weight in planned for p in s.products)]
        if sites:
            sweep(program, context.calibration, visit, sites=sites, progress=context.progress)
        for name in planned:
            if name not in done:
                context.journal.declined(self.pass_name(), name, "no single input is known")

    def _clipped(
        self, program: Program, name: str, axis: int, fmt: Format, moments: Tensor
    ) -> tuple[Tensor, str]:
        weight = program.weights[name]
        rows = weight.movedim(axis, -1).float()
        parts = [
            clip_groups(block, moments, self.ratios, lambda w: fmt.encode(w).decode())
            for block in rows.split(_ROWS if fmt.rows_apart else len(rows))
        ]
        kept = torch.cat(parts)
        cut = float((kept != rows).float().mean())
        return kept.to(weight.dtype).movedim(-1, axis).contiguous(), f"{cut:.2%} of it clipped"


def group_moments(activations: Activations, width: int, size: int) -> Tensor:
    """The mean of x x^T within each group of inputs, float32 [groups, size, size]."""
    groups = -(-width // size)
    total = torch.zeros(groups, size, size)
    for rows in activations:
        parts = pad(rows.float(), (0, groups * size - width)).reshape(-1, groups, size)
        parts = parts.transpose(0, 1)
        total.baddbmm_(parts.transpose(1, 2), parts)
    return total.div_(max(activations.tokens, 1))


def clip_groups(
    weight: Tensor, moments: Tensor, ratios: list[float], round_: Callable[[Tensor], Tensor]
) -> Tensor:
    """The weight [rows, in] with each group cut at the best ratio of its largest magnitude.

    moments: [groups, size, size]; round_: what the format makes of a weight.
    """
    width, (groups, size) = weight.shape[1], moments.shape[:2]

    def grouped(values: Tensor) -> Tensor:
        return pad(values, (0, groups * size - width)).reshape(len(values), groups, size)

    def flat(values: Tensor) -> Tensor:
        return values.expand(-1, -1, size).reshape(len(values), -1)[:, :width]

    most = grouped(weight).abs().amax(-1, keepdim=True)
    best = torch.full_like(most, torch.inf)
    kept = torch.ones_like(most)
    for ratio in ratios:
        limit = flat(most * ratio)
        error = grouped(round_(weight.clamp(-limit, limit)) - weight).transpose(0, 1)
        cost = torch.bmm(error, moments).mul_(error).sum(-1).t().unsqueeze(-1)
        better = cost < best
        best, kept = torch.where(better, cost, best), torch.where(better, ratio, kept)
    limit = flat(most * kept)
    return weight.clamp(-limit, limit)
