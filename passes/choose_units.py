"""How many units go in each place: alike everywhere, or where they matter least.

In one place always the least important units go, so a number for each place says all.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..ir.prunable_units import Kind, Unit

SCOPES = ("uniform", "global")
Group = tuple[Kind, str]
Counts = dict[Group, int]
"""Of each place how many units go."""

_TILED: frozenset[Kind] = frozenset({"ffn", "width", "embedding"})
"""Kinds whose numbers are sizes that a kernel cuts into tiles; heads are whole heads already."""


@dataclass(frozen=True)
class Choice:
    """Units with their scores, and how they are chosen.

    scores: one a unit, the least go first. multiple: what stays of tiled kinds is a multiple of it
    (or everything). scope: "uniform", the same share in each place; "global", units of one kind
    compete over all places, by `weighed` scores. At least one unit of each place stays.
    """

    units: Sequence[Unit]
    scores: Sequence[float]
    multiple: int = 1
    scope: str = "uniform"
    normalized: bool = True

    @cached_property
    def groups(self) -> dict[Group, list[int]]:
        """The places in order, each with the numbers of its units."""
        found: dict[Group, list[int]] = {}
        for place, unit in enumerate(self.units):
            found.setdefault((unit.kind, unit.group), []).append(place)
        return found

    def counts(self, shares: Mapping[Kind, float]) -> Counts:
        """How many go in each place when these shares of each kind go."""
        if self.scope == "uniform":
            return {
                group: len(places) - self._kept(group[0], len(places), shares.get(group[0], 0.0))
                for group, places in self.groups.items()
            }
        counts: Counts = dict.fromkeys(self.groups, 0)
        for kind, share in shares.items():
            counts |= self._compete(kind, share)
        return counts

    def dead(self, counts: Mapping[Group, int]) -> set[int]:
        """The channel classes of the units that go."""
        gone: set[int] = set()
        for group, places in self.groups.items():
            chosen = least([self.scores[place] for place in places], counts.get(group, 0))
            gone.update(root for i in chosen for root in self.units[places[i]].roots)
        return gone

    def _tile(self, kind: Kind) -> int:
        return self.multiple if kind in _TILED else 1

    def _kept(self, kind: Kind, size: int, share: float) -> int:
        kept = max(size - int(size * share + 1e-9), 1)
        tile = self._tile(kind)
        return min(size, math.ceil(kept / tile) * tile)

    def _compete(self, kind: Kind, share: float) -> Counts:
        """The least steps over all places until the share is gone; a step keeps tiles whole.

        A place's steps are taken in their order, and their mean scores grow, so that without tiles
        this takes the least units of all places.
        """
        groups = {group: places for group, places in self.groups.items() if group[0] == kind}
        left = int(sum(map(len, groups.values())) * share + 1e-9)
        counts: Counts = dict.fromkeys(groups, 0)
        waiting: list[tuple[float, int, Group, int]] = []
        costs = {group: self._costs(places) for group, places in groups.items()}

        def offer(group: Group, order: int) -> None:
            gone, cost = counts[group], costs[group]
            tile = self._tile(kind)
            step = (len(cost) - gone) % tile or tile
            if len(cost) - gone - step >= min(tile, len(cost)):
                mean = float(cost[gone : gone + step].mean())
                heapq.heappush(waiting, (mean, order, group, step))

        for order, group in enumerate(groups):
            offer(group, order)
        while waiting:
            _, order, group, step = heapq.heappop(waiting)
            if step <= left:
                counts[group] += step
                left -= step
                offer(group, order)
        return counts

    def _costs(self, places: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """The scores of one place in rising order, as parts of their sum if normalized."""
        cost = np.sort(np.asarray([self.scores[place] for place in places], dtype=np.float64))
        total = cost.sum()
        return cost / total if self.normalized and total > 0 else cost


def least(scores: Sequence[float], count: int) -> list[int]:
    """The places of the `count` smallest scores; of equals the earlier."""
    order = np.argsort(np.asarray(scores), kind="stable")
    return sorted(int(place) for place in order[:count])


__all__ = ["SCOPES", "Choice", "Counts", "Group", "least"]
