"""Units of attentions: key heads with all that reads them, and single query heads.

A head group is a key head, its value head and all query heads that read them, so that what is left
is a legal attention. A unit of query heads is one of each key head, so that all key heads keep as
many; where there is one key head only, these are the heads of the attention.
"""

from __future__ import annotations

from .channel_map import AttentionHeads, ChannelMap
from .prunable_units import Costs, Kind, Unit, units_of


def head_units(channels: ChannelMap, costs: Costs) -> list[Unit]:
    """Key head by key head."""
    found: list[Unit] = []
    for heads in channels.attentions:
        parts = [_of_key(heads, place) for place in range(len(heads.key))]
        if len(parts) > 1:
            found += _alternatives(channels, costs, "heads", heads, parts, "head group")
        else:
            found += _queries(channels, costs, "heads", heads)
    return _once(found)


def query_units(channels: ChannelMap, costs: Costs) -> list[Unit]:
    """One query head of each key head; none where each has but one."""
    found = [u for a in channels.attentions for u in _queries(channels, costs, "queries", a)]
    return _once(found)


def _once(units: list[Unit]) -> list[Unit]:
    """Without those of attentions that share their weights with one before."""
    found: dict[frozenset[int], Unit] = {}
    for unit in units:
        found.setdefault(unit.roots, unit)
    return list(found.values())


def _queries(channels: ChannelMap, costs: Costs, kind: Kind, heads: AttentionHeads) -> list[Unit]:
    groups = heads.groups
    parts = [
        set[int]().union(*(_of_query(heads, q) for q in range(place, len(heads.query), groups)))
        for place in range(groups)
    ]
    return _alternatives(channels, costs, kind, heads, parts, "query head")


def _of_key(heads: AttentionHeads, place: int) -> set[int]:
    queries = range(place * heads.groups, (place + 1) * heads.groups)
    own = {*heads.key[place].tolist(), *heads.value[place].tolist()}
    return own.union(*(_of_query(heads, query) for query in queries))


def _of_query(heads: AttentionHeads, query: int) -> set[int]:
    return {*heads.query[query].tolist(), *heads.out[query].tolist()}


def _alternatives(
    channels: ChannelMap,
    costs: Costs,
    kind: Kind,
    heads: AttentionHeads,
    parts: list[set[int]],
    what: str,
) -> list[Unit]:
    """A unit for each part; none if two share a channel, or if one of them may not go."""
    group = str(heads.node.meta.get("module", "")) or heads.node.name
    named = [(f"{what} {place}", roots) for place, roots in enumerate(parts)]
    found = units_of(channels, costs, kind, group, named)
    apart = sum(len(unit.roots) for unit in found) == len({r for u in found for r in u.roots})
    return found if apart and len(found) == len(parts) > 1 else []


__all__ = ["head_units", "query_units"]
