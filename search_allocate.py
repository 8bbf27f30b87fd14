"""Which format each layer gets: least total cost under a budget of bits, exactly.

One choice of each class, costs and sizes added up: the multiple-choice knapsack problem. Partial
choices are extended class by class; a partial choice that another one beats in size and cost goes,
and so does one whose bound exceeds the best choice known (Kellerer, Pferschy & Pisinger 2004,
ch. 11). The bound is the linear relaxation's, which the lower convex hulls of the classes give:
take their segments in order of steepness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .ir.errors import PlanishError

_MOST = 50_000  # partial choices kept at once


class BudgetTooSmall(PlanishError):
    """A budget below what the smallest formats take."""


@dataclass(frozen=True)
class Choices:
    """The candidates of one class: sizes in bits, and costs; `Allocation.chosen` indexes them."""

    sizes: Sequence[float]
    costs: Sequence[float]


@dataclass(frozen=True)
class Allocation:
    """One candidate of each class. exact: whether it is proven that no other one is better."""

    chosen: tuple[int, ...]
    size: float
    cost: float
    exact: bool


def allocate(classes: Sequence[Choices], budget: float) -> Allocation:
    """The cheapest choice whose sizes sum to at most `budget`; raises BudgetTooSmall."""
    least = sum(min(choices.sizes) for choices in classes)
    if least > budget * (1 + 1e-12):
        raise BudgetTooSmall(
            "the budget is below what the smallest candidates take",
            expected=f"at least {least:g}",
            found=f"{budget:g}",
        )
    hulls = [_hull(choices) for choices in classes]
    bounds = [_Relaxed(hulls[k:]) for k in range(len(hulls) + 1)]
    best = _rounded(hulls, budget)
    known = _total(classes, best)[1]
    found, dropped = _search(classes, bounds, budget, known)
    chosen = found if found is not None else best
    size, cost = _total(classes, chosen)
    if cost > known:
        chosen, (size, cost) = best, _total(classes, best)
    return Allocation(tuple(chosen), size, cost, not dropped)


def cheapest_within(classes: Sequence[Choices], highest: float) -> Allocation:
    """The smallest choice whose cost is at most `highest`: the same problem, roles exchanged.

    Raises BudgetTooSmall if even the largest formats cost more.
    """
    turned = [Choices(choices.costs, choices.sizes) for choices in classes]
    found = allocate(turned, highest)
    return Allocation(found.chosen, found.cost, found.size, found.exact)


def frontier(classes: Sequence[Choices], points: int = 60) -> list[tuple[float, float]]:
    """(size, cost) of the relaxation along all sizes: what no allocation can be below."""
    hulls = [_hull(choices) for choices in classes]
    relaxed = _Relaxed(hulls)
    sizes = np.linspace(relaxed.sizes[0], relaxed.sizes[-1], points)
    return [(float(s), float(c)) for s, c in zip(sizes, relaxed.cost(sizes), strict=True)]


@dataclass(frozen=True)
class _Hull:
    """The lower convex hull of a class: candidates by growing size and falling cost."""

    places: list[int]
    sizes: list[float]
    costs: list[float]


def _hull(choices: Choices) -> _Hull:
    order = sorted(range(len(choices.sizes)), key=lambda i: (choices.sizes[i], choices.costs[i]))
    kept: list[int] = []
    for i in order:
        if kept and choices.costs[i] >= choices.costs[kept[-1]]:
            continue
        while len(kept) > 1 and _above(choices, kept[-2], kept[-1], i):
            kept.pop()
        kept.append(i)
    return _Hull(kept, [choices.sizes[i] for i in kept], [choices.costs[i] for i in kept])


def _above(choices: Choices, a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    sizes, costs = choices.sizes, choices.costs
    left = (costs[b] - costs[a]) * (sizes[c] - sizes[a])
    return left >= (costs[c] - costs[a]) * (sizes[b] - sizes[a])


class _Relaxed:
    """The least cost of some classes, if candidates could be mixed, as a function of the size."""

    def __init__(self, hulls: Sequence[_Hull]) -> None:
        segments = [
            (hull.sizes[k + 1] - hull.sizes[k], hull.costs[k + 1] - hull.costs[k])
            for hull in hulls
            for k in range(len(hull.places) - 1)
        ]
        segments.sort(key=lambda s: s[1] / s[0])
        steps = np.array(segments, dtype=np.float64).reshape(-1, 2).cumsum(0)
        start = sum(hull.sizes[0] for hull in hulls), sum(hull.costs[0] for hull in hulls)
        self.sizes = np.concatenate([[start[0]], start[0] + steps[:, 0]])
        self.costs = np.concatenate([[start[1]], start[1] + steps[:, 1]])

    def cost(self, size: np.ndarray) -> np.ndarray:
        """A lower bound of the cost within each size; infinite where nothing fits."""
        found = np.interp(size, self.sizes, self.costs)
        return np.where(size < self.sizes[0] * (1 - 1e-12), np.inf, found)


def _rounded(hulls: Sequence[_Hull], budget: float) -> list[int]:
    """A good choice: the segments in order of steepness, as long as they fit."""
    at = [0] * len(hulls)
    left = budget - sum(hull.sizes[0] for hull in hulls)
    steps = [
        ((h.costs[k + 1] - h.costs[k]) / (h.sizes[k + 1] - h.sizes[k]), n, k)
        for n, h in enumerate(hulls)
        for k in range(len(h.places) - 1)
    ]
    for _, n, k in sorted(steps):
        grown = hulls[n].sizes[k + 1] - hulls[n].sizes[k]
        if at[n] == k and grown <= left:
            at[n], left = k + 1, left - grown
    return [hull.places[k] for hull, k in zip(hulls, at, strict=True)]


def _search(
    classes: Sequence[Choices], bounds: Sequence[_Relaxed], budget: float, known: float
) -> tuple[list[int] | None, bool]:
    """The best choice that costs at most `known`, and whether partial choices had to be dropped."""
    sizes, costs = np.zeros(1), np.zeros(1)
    parents: list[tuple[np.ndarray, np.ndarray]] = []
    dropped = False
    slack = 1e-12 * max(budget, 1.0)
    for k, choices in enumerate(classes):
        count = len(sizes)
        grown = (sizes[:, None] + np.asarray(choices.sizes, dtype=np.float64)).ravel()
        spent = (costs[:, None] + np.asarray(choices.costs, dtype=np.float64)).ravel()
        parent = np.repeat(np.arange(count), len(choices.sizes))
        pick = np.tile(np.arange(len(choices.sizes)), count)
        hopeful = spent + bounds[k + 1].cost(budget + slack - grown) <= known * (1 + 1e-12) + 1e-15
        order = np.lexsort((spent[hopeful], grown[hopeful]))
        keep = np.flatnonzero(hopeful)[order]
        cheaper = np.minimum.accumulate(spent[keep]) if len(keep) else spent[keep]
        first = np.ones(len(keep), dtype=bool)
        first[1:] = spent[keep][1:] < cheaper[:-1]
        keep = keep[first]
        if len(keep) > _MOST:
            total = spent[keep] + bounds[k + 1].cost(budget + slack - grown[keep])
            keep = np.sort(keep[np.argsort(total)[:_MOST]])
            keep = keep[np.argsort(grown[keep], kind="stable")]
            dropped = True
        sizes, costs = grown[keep], spent[keep]
        parents.append((parent[keep], pick[keep]))
        if not len(keep):
            return None, dropped
    place = int(np.argmin(costs))
    chosen: list[int] = []
    for parent, pick in reversed(parents):
        chosen.append(int(pick[place]))
        place = int(parent[place])
    return chosen[::-1], dropped


def _total(classes: Sequence[Choices], chosen: Sequence[int]) -> tuple[float, float]:
    size = sum(choices.sizes[i] for choices, i in zip(classes, chosen, strict=True))
    return size, sum(choices.costs[i] for choices, i in zip(classes, chosen, strict=True))


__all__ = ["Allocation", "BudgetTooSmall", "Choices", "allocate", "cheapest_within", "frontier"]
