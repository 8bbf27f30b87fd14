"""Find what of a program can be cut: heads, query heads, FFN channels, width, table width.

Read from the channel map alone; what each kind is, see `units_heads` and `units_channels`.
"""

from __future__ import annotations

from collections.abc import Iterable

from .channel_map import ChannelMap
from .program import Program
from .prunable_units import Kind, Unit, costs_of
from .units_channels import embedding_units, ffn_units, width_units
from .units_heads import head_units, query_units


def find_units(program: Program, channels: ChannelMap, kinds: Iterable[Kind]) -> list[Unit]:
    """The units of the given kinds (heads, queries, ffn, width, embedding), in graph order."""
    found: list[Unit] = []
    wanted = set(kinds)
    costs = costs_of(program, channels)
    finders = {
        "heads": head_units,
        "queries": query_units,
        "ffn": ffn_units,
        "width": width_units,
        "embedding": embedding_units,
    }
    for kind, find in finders.items():
        if kind in wanted:
            found += find(channels, costs)
    return found


__all__ = ["find_units"]
