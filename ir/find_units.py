"""Find what of a program can be cut: key-value heads with their query heads, FFN channels, width.

Read from the channel map alone. An FFN channel is made by a product and read by another one that
makes no queries, keys or values of it (those are latent channels of a projection), and is neither
of an attention nor of the residual stream. A head group is a key head, its value head and all query
heads that read them, so that what is left is a legal attention. A unit of query heads is one of
each key head, so that all key heads keep as many; where there is one key head, these are its heads.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .channel_map import AttentionHeads, ChannelMap
from .program import Program
from .prunable_units import Kind, Unit


def find_units(program: Program, channels: ChannelMap, kinds: Iterable[Kind]) -> list[Unit]:
    """The units of the given kinds (ffn, heads, queries, width), group by group in graph order."""
    found: list[Unit] = []
    wanted = set(kinds)
    costs = _costs(program, channels)
    if "heads" in wanted:
        for heads in channels.attentions:
            several = len(heads.key) > 1
            found += (_head_groups if several else _queries)(channels, heads, costs, "heads")
    if "queries" in wanted:
        for heads in channels.attentions:
            found += _queries(channels, heads, costs, "queries")
    if "ffn" in wanted:
        found += _ffn(channels, costs)
    if "width" in wanted:
        found += _width(channels, costs)
    return found


def _costs(program: Program, channels: ChannelMap) -> dict[int, int]:
    """For each root the weight entries that it alone takes along."""
    costs: dict[int, int] = {}
    for (name, axis), roots in channels.axes.items():
        shape = program.weights.shape(name)
        each = shape.numel() // max(int(shape[axis]), 1)
        for root, count in zip(*np.unique(roots, return_counts=True), strict=True):
            costs[int(root)] = costs.get(int(root), 0) + each * int(count)
    return costs


def _unit(
    channels: ChannelMap, kind: Kind, group: str, roots: set[int], costs: dict[int, int], label: str
) -> list[Unit]:
    gone = channels.closure(roots)
    if not gone or not channels.blocked.keys().isdisjoint(gone):
        return []
    return [Unit(kind, group, gone, sum(costs.get(r, 0) for r in gone), label)]


def _head_groups(
    channels: ChannelMap, heads: AttentionHeads, costs: dict[int, int], kind: Kind
) -> list[Unit]:
    """Key head by key head."""
    groups = heads.groups
    parts = [
        {*heads.key[place].tolist(), *heads.value[place].tolist()}.union(
            *(_of_query(heads, q) for q in range(place * groups, (place + 1) * groups))
        )
        for place in range(len(heads.key))
    ]
    return _alternatives(channels, kind, _module(heads), parts, costs, "head group")


def _queries(
    channels: ChannelMap, heads: AttentionHeads, costs: dict[int, int], kind: Kind
) -> list[Unit]:
    """One query head of each key head."""
    groups = heads.groups
    parts = [
        set[int]().union(*(_of_query(heads, q) for q in range(place, len(heads.query), groups)))
        for place in range(groups)
    ]
    return _alternatives(channels, kind, _module(heads), parts, costs, "query head")


def _of_query(heads: AttentionHeads, query: int) -> set[int]:
    return {*heads.query[query].tolist(), *heads.out[query].tolist()}


def _module(heads: AttentionHeads) -> str:
    return str(heads.node.meta.get("module", "")) or heads.node.name


def _alternatives(
    channels: ChannelMap,
    kind: Kind,
    group: str,
    parts: list[set[int]],
    costs: dict[int, int],
    what: str,
) -> list[Unit]:
    """A unit for each part; none if two share a channel, or if one of them may not go."""
    found: list[Unit] = []
    taken: set[int] = set()
    for place, roots in enumerate(parts):
        units = _unit(channels, kind, group, roots - {0}, costs, f"{group} {what} {place}")
        if not units or taken & units[0].roots:
            return []
        taken |= units[0].roots
        found += units
    return found if len(found) > 1 else []


def _ffn(channels: ChannelMap, costs: dict[int, int]) -> list[Unit]:
    attended = _attended(channels)
    stream = {
        root
        for key, made in channels.produces.items()
        if made == "table"
        for root in channels.axes[key].tolist()
    }
    read: set[int] = set()
    latent: set[int] = set()
    for name, axis in channels.absorbs:
        roots = set(channels.axes[name, axis].tolist())
        made = {
            root
            for (other, place), found in channels.axes.items()
            if other == name and place != axis
            for root in found.tolist()
        }
        (latent if made & attended else read).update(roots)
    found: list[Unit] = []
    taken = attended | stream | latent | {0}
    for (name, axis), made in channels.produces.items():
        if made != "product":
            continue
        module = name.rpartition(".")[0] or name
        fresh = [r for r in dict.fromkeys(channels.axes[name, axis].tolist()) if r not in taken]
        fresh = [root for root in fresh if root in read]
        units = [
            unit
            for place, root in enumerate(fresh)
            for unit in _unit(channels, "ffn", module, {root}, costs, f"{module} channel {place}")
        ]
        if len(units) > 1:
            found += units
            taken |= set(fresh)
    return found


def _attended(channels: ChannelMap) -> set[int]:
    """All channels of queries, keys, values and results of attentions."""
    parts = [p for a in channels.attentions for p in (a.query, a.key, a.value, a.out)]
    return {int(root) for part in parts for root in np.unique(part)}


def _width(channels: ChannelMap, costs: dict[int, int]) -> list[Unit]:
    """The channels of residual streams: of looked-up tables that products write into and read."""
    written, read = set[int](), set[int]()
    for key, made in channels.produces.items():
        if made == "product":
            written.update(channels.axes[key].tolist())
    for key in channels.absorbs:
        read.update(channels.axes[key].tolist())
    found: list[Unit] = []
    taken: set[int] = set()
    for (name, axis), made in channels.produces.items():
        roots = channels.axes[name, axis].tolist()
        if made != "table" or len(set(roots)) < len(roots) or taken & set(roots):
            continue
        if not set(roots) <= written & read:
            continue
        taken |= set(roots)
        for place, root in enumerate(roots):
            found += _unit(channels, "width", name, {root}, costs, f"{name} channel {place}")
    return found


__all__ = ["find_units"]
