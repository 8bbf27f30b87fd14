"""Units of a program that can be cut: heads, query heads, FFN channels, residual width, experts.

A unit is a set of channel classes (`channel_map`) that must go together and may go alone. Units of
one group are alternatives of each other in one place: the channels of one feed-forward layer, the
heads of one attention. Everything is read from the data flow; no architecture is known by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .channel_map import ChannelMap
from .program import Program

Kind = Literal["heads", "queries", "ffn", "width", "embedding", "experts", "layers"]
Costs = Mapping[int, int]
"""For each root the weight entries that it alone takes along."""


@dataclass(frozen=True)
class Unit:
    """One thing that can be cut.

    group: names the place whose units are alternatives of each other. roots: the channel classes
    that go with it. parameters: weight entries that go if it alone is cut. label: for people.
    """

    kind: Kind
    group: str
    roots: frozenset[int]
    parameters: int
    label: str


def costs_of(program: Program, channels: ChannelMap) -> Costs:
    costs: dict[int, int] = {}
    for (name, axis), roots in channels.axes.items():
        shape = program.weights.shape(name)
        each = shape.numel() // max(int(shape[axis]), 1)
        for root, count in zip(*np.unique(roots, return_counts=True), strict=True):
            costs[int(root)] = costs.get(int(root), 0) + each * int(count)
    return costs


def units_of(
    channels: ChannelMap,
    costs: Costs,
    kind: Kind,
    group: str,
    parts: Iterable[tuple[str, Iterable[int]]],
) -> list[Unit]:
    """A unit for each part (what it is called, its roots) that nothing outside needs."""
    found: list[Unit] = []
    for what, roots in parts:
        gone = channels.closure(roots)
        if gone and channels.blocked.keys().isdisjoint(gone):
            entries = sum(costs.get(root, 0) for root in gone)
            found.append(Unit(kind, group, gone, entries, f"{group} {what}"))
    return found


__all__ = ["Costs", "Kind", "Unit", "costs_of", "units_of"]
