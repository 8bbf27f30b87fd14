"""Activation-aware weight quantization: channels that carry much get finer steps.

Before: `%x = rms_norm(%h, %g); %y = linear(%x, %W)`. After: the same graph with `%g` divided by s
and the columns of `%W` multiplied by s, so that rounding `%W` (which a later pass does) hurts the
channels that matter less. The same along every other scale edge; nothing is left at run time.
Lin et al. 2023 (AWQ), eq. 4 and 5: s = mean|X|^r, r of a grid of 20 points by the squared error of
the products' outputs after rounding. That error is exact here: a weight error D costs
tr(D H D^T), H the second moments of the input, so one pass over the batches serves all points.
r = 0 is among them, so an edge never gets worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..ir.encoded import Format
from ..ir.errors import WrongOption
from ..ir.hessian import Hessian, output_error
from ..ir.program import Program
from ..ir.rewrite import Journal
from ..ir.scale_edges import EdgeEnd, ScaleEdge
from .calibrate import Activations
from .contract import Context, contract
from .edge_sites import EdgeSite, Seen, by_factor, choose_factors, fold, free_edges, wanted_kinds
from .weight_plan import WeightQuantizer

_POINTS = 20


@dataclass(frozen=True)
class _Statistics:
    """magnitude: mean|X_j| [width]; hessian: mean of x x^T, float32 [width, width]."""

    magnitude: Tensor
    hessian: Tensor


@dataclass(frozen=True)
class Awq(WeightQuantizer):
    """Scale channels for a quantization to come (BOUNDED: the same function).

    Give it the options of the pass that quantizes afterwards; for them see `WeightQuantizer`.
    points: of the grid. divide_by_weights: try s = mean|X|^r / mean|W|^(1-r) as well. kinds: of
    edges, comma-separated (norm->linear, v->o, up->down, fc1->fc2, linear->linear); all if empty.
    """

    bits: int = 4
    points: int = _POINTS
    divide_by_weights: bool = False
    kinds: str = ""

    contract = contract(
        "bounded",
        requires=["functional", "dense_weights"],
        needs=["calibration"],
        rounds_weights=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted_kinds(self.kinds, self.pass_name())
        if self.points < 2:
            raise WrongOption(
                f"option awq.points cannot be {self.points}",
                expected="at least 2, of which one is to leave all as it is",
                found=str(self.points),
            )

    def run(self, program: Program, context: Context) -> None:
        kinds = wanted_kinds(self.kinds, self.pass_name())
        formats = {role.name: fmt for role, fmt in self.planned(program, Journal(program))}
        edges: list[ScaleEdge] = []
        for edge in free_edges(program, context, self.pass_name(), kinds):
            if any(end.weight in formats for end in edge.consumers):
                edges.append(edge)
            else:
                reason = "nothing that reads these channels will be quantized"
                context.journal.declined(self.pass_name(), edge.name, reason)
        search = _Search(self, program, formats)
        chosen = choose_factors(program, context, edges, search.keep, search.decide)
        fold(program, context, self.pass_name(), chosen)


class _Search:
    def __init__(self, options: Awq, program: Program, formats: dict[str, Format]) -> None:
        self.options, self.program, self.formats = options, program, formats

    def keep(self, edge: ScaleEdge, site: EdgeSite, activations: Activations) -> _Statistics:
        hessian = Hessian(len(site.channel))
        magnitude = torch.zeros(len(site.channel), dtype=torch.float64)
        for rows in activations:
            hessian.add(rows)
            magnitude += rows.abs().sum(0, dtype=torch.float64)
        return _Statistics((magnitude / max(hessian.tokens, 1)).float(), hessian.mean())

    def decide(self, seen: Seen) -> tuple[Tensor, str] | None:
        errors = [(self._error(seen, factors), label) for factors, label in self._candidates(seen)]
        plain = self._error(seen, torch.ones(seen.edge.factors))
        best = min(range(len(errors)), key=lambda place: errors[place][0])
        if not errors[best][0] < plain:
            return None
        factors, label = self._candidates(seen)[best]
        return factors, f"{label}; output error {errors[best][0] / plain:.3g} of that without"

    def _candidates(self, seen: Seen) -> list[tuple[Tensor, str]]:
        """The points of the grid but r = 0, which is to leave all as it is."""
        points = self.options.points
        data = self._magnitude(seen)
        found = [(factors_of(data, r / points), f"r {r / points:g}") for r in range(1, points)]
        if self.options.divide_by_weights:
            weight = self._weight_magnitude(seen)
            for r in range(1, points):
                ratio = r / points
                found.append(
                    (factors_of(data, ratio, weight), f"r {ratio:g} divided by the weights")
                )
        return found

    def _magnitude(self, seen: Seen) -> Tensor:
        parts = [
            by_factor(
                cast(_Statistics, seen.kept[site.value]).magnitude,
                site.channel,
                seen.edge.factors,
                "mean",
            )
            for site in seen.sites
        ]
        return torch.stack(parts).mean(0)

    def _weight_magnitude(self, seen: Seen) -> Tensor:
        parts: list[Tensor] = []
        for end in seen.edge.consumers:
            matrix = self._matrix(end).abs()
            matrix = matrix / matrix.amax(-1, keepdim=True).clamp_min(1e-12)
            parts.append(by_factor(matrix.mean(0), end.channel, seen.edge.factors, "mean"))
        return torch.stack(parts).mean(0)

    def _matrix(self, end: EdgeEnd) -> Tensor:
        return self.program.weights[end.weight].movedim(end.axis, -1).flatten(0, -2).float()

    def _error(self, seen: Seen, factors: Tensor) -> float:
        total = 0.0
        for site in seen.sites:
            hessian = cast(_Statistics, seen.kept[site.value]).hessian
            for end in site.ends:
                fmt = self.formats.get(end.weight)
                if fmt is not None:
                    total += scaled_error(self._matrix(end), end.spread(factors), fmt, hessian)
        return total


def factors_of(data: Tensor, ratio: float, weight: Tensor | None = None) -> Tensor:
    """mean|X|^r (over mean|W|^(1-r)), float64, with its extremes evened out around 1.

    Channels that are never used get 1.
    """
    wide = data.double()
    live = wide > 0
    factors = wide.clamp_min(1e-12).pow(ratio)
    if weight is not None:
        factors = factors / weight.double().clamp_min(1e-6).pow(1 - ratio)
    if bool(live.any()):
        factors = factors / (factors[live].amax() * factors[live].amin()).sqrt()
    return torch.where(live & factors.isfinite() & (factors > 0), factors, 1.0)


def scaled_error(weight: Tensor, factors: Tensor, fmt: Format, hessian: Tensor) -> float:
    """tr(D H D^T) of D = Q(W s) / s - W, summed over the outputs.

    weight: float32 [out, in]; factors: [in]; hessian: float32 [in, in].
    """
    factors = factors.to(weight.dtype)
    error = fmt.encode(weight * factors).decode().div_(factors).sub_(weight)
    return float(output_error(error, hessian).sum(dtype=torch.float64))
