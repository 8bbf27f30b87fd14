"""Smooth activations: move part of their outliers into the weights that read them.

Before: `%x = rms_norm(%h, %g); %y = linear(%x, %W)`. After: the same graph, `%g` divided by s and
the columns of `%W` multiplied by s, one factor for each channel. Likewise along every other scale
edge: values to the output projection (query heads of a group share their factors), the up
projection through the gate, fc1 to fc2 through ReLU. Equal because the factors cancel; nothing is
multiplied at run time.
Xiao et al. 2023 (SmoothQuant), eq. 4: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha). The search also
tries s_j = max(1, max|X_j| / t), which touches none but the channels beyond a threshold t
(Wei et al. 2023, Outlier Suppression+, eq. 7): it wins where one token holds a huge value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..ir.errors import WrongOption
from ..ir.program import Program
from ..ir.scale_edges import EdgeEnd, ScaleEdge
from .calibrate import Activations
from .contract import Context, Pass, contract
from .edge_sites import EdgeSite, Seen, by_factor, choose_factors, fold, free_edges, wanted_kinds
from .int8_error import int8_error

_SAMPLE = 256
_GRID = 20


@dataclass(frozen=True)
class _Statistics:
    """largest: max|X_j| [width]; rows: random tokens, and the one of the largest value of each
    batch, float32 [some, width]."""

    largest: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Smooth(Pass):
    """Move activation outliers into weights (BOUNDED: the same function).

    alpha: 0 evens out the weights, 1 the activations. search: choose for every edge alpha, or a
    threshold, of 20 points each, or to leave it alone, by the squared output error of its products
    in int8 (weights by row).
    activations: how that error rounds them, "tensor" (static) or "token". kinds: of edges,
    comma-separated (norm->linear, v->o, up->down, fc1->fc2, linear->linear); all if empty.
    """

    alpha: float = 0.5
    search: bool = False
    activations: str = "tensor"
    kinds: str = ""

    contract = contract(
        "bounded",
        requires=["functional", "dense_weights"],
        needs=["calibration"],
        rounds_weights=True,
    )

    def __post_init__(self) -> None:
        wanted_kinds(self.kinds, self.pass_name())
        if not 0 <= self.alpha <= 1:
            raise WrongOption(
                f"option smooth.alpha cannot be {self.alpha:g}",
                expected="0 to 1",
                found=f"{self.alpha:g}",
                fix="use 0.5, or search=true",
            )
        if self.activations not in ("tensor", "token"):
            raise WrongOption(
                f"option smooth.activations cannot be {self.activations!r}",
                expected="tensor or token",
                found=repr(self.activations),
            )

    def run(self, program: Program, context: Context) -> None:
        kinds = wanted_kinds(self.kinds, self.pass_name())
        edges = free_edges(program, context, self.pass_name(), kinds)

        def decide(seen: Seen) -> tuple[Tensor, str] | None:
            return self._decide(program, seen)

        fold(
            program,
            context,
            self.pass_name(),
            choose_factors(program, context, edges, self._keep, decide),
        )

    def _keep(self, edge: ScaleEdge, site: EdgeSite, activations: Activations) -> _Statistics:
        largest: Tensor | None = None
        taken: list[Tensor] = []
        share = _SAMPLE / max(activations.tokens, 1) if self.search else 0.0
        generator = torch.Generator().manual_seed(0)
        for rows in activations:
            most = rows.abs().amax(0).float()
            largest = most if largest is None else torch.maximum(largest, most)
            if share:
                chosen = torch.rand(len(rows), generator=generator) < share
                chosen[rows.abs().amax(-1).argmax()] = True
                taken.append(rows[chosen].float())
        assert largest is not None
        return _Statistics(largest, torch.cat(taken) if taken else largest[:0])

    def _decide(self, program: Program, seen: Seen) -> tuple[Tensor, str] | None:
        count = seen.edge.factors
        data, weight = torch.zeros(count), torch.zeros(count)
        for site in seen.sites:
            kept = cast(_Statistics, seen.kept[site.value])
            data = torch.maximum(data, by_factor(kept.largest, site.channel, count, "amax"))
        for end in seen.edge.consumers:
            most = _largest_columns(program.weights[end.weight], end)
            weight = torch.maximum(weight, by_factor(most, end.channel, count, "amax"))
        if not self.search:
            return smoothing(data, weight, self.alpha), f"alpha {self.alpha:g}"
        plain = self._error(program, seen, torch.ones(count))
        tried = [(self._error(program, seen, f), f, note) for f, note in _candidates(data, weight)]
        error, factors, note = min(tried, key=lambda one: one[0])
        if not error < plain:
            return None
        return factors, f"{note}; int8 error {error / plain:.3g} of that without"

    def _error(self, program: Program, seen: Seen, factors: Tensor) -> float:
        total = 0.0
        for site in seen.sites:
            kept = cast(_Statistics, seen.kept[site.value])
            for end in site.ends:
                spread = end.spread(factors)
                matrix = program.weights[end.weight].movedim(end.axis, -1).flatten(0, -2).float()
                total += int8_error(
                    kept.rows, matrix, spread, kept.largest, self.activations == "token"
                )
        return total


def _candidates(data: Tensor, weight: Tensor) -> list[tuple[Tensor, str]]:
    """Factors by 20 exponents, and by 20 thresholds between the median channel and the largest."""
    found = [
        (smoothing(data, weight, step / _GRID), f"alpha {step / _GRID:g}")
        for step in range(1, _GRID + 1)
    ]
    live = data[data > 0].double()
    if len(live):
        low, high = float(live.median()), float(live.amax())
        for step in range(_GRID):
            threshold = low * (high / low) ** (step / _GRID)
            found.append((above(data, threshold), f"channels beyond {threshold:.3g}"))
    return found


def above(data: Tensor, threshold: float) -> Tensor:
    """max(1, max|X_j| / t), float64."""
    return (data.double() / threshold).clamp_min(1.0)


def smoothing(data: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """The factors; 1 for channels that are never used or that no weight reads."""
    factors = data.double().pow(alpha) / weight.double().pow(1 - alpha)
    fine = (data > 0) & (weight > 0) & factors.isfinite() & (factors > 0)
    return torch.where(fine, factors, torch.ones_like(factors))


def _largest_columns(weight: Tensor, end: EdgeEnd) -> Tensor:
    return weight.abs().movedim(end.axis, -1).flatten(0, -2).amax(0).float()
