"""Units of a program that can be cut: heads, query heads, FFN channels, residual width, experts.

A unit is a set of channel classes (`channel_map`) that must go together and may go alone. Units of
one group are alternatives of each other in one place: the channels of one feed-forward layer, the
heads of one attention. Everything is read from the data flow; no architecture is known by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["heads", "queries", "ffn", "width", "embedding", "experts", "layers"]


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


__all__ = ["Kind", "Unit"]
