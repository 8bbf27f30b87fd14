"""Find what of a program can be cut: key-value heads with their query heads, FFN channels, width.

Read from the channel map alone. An FFN channel is made by a product and read by another one that
makes no queries, keys or values of it (those are latent channels of a projection), and is neither
of an attention nor of the residual stream. A head group is a key head, its value head and all query
heads that read them, so that what is left is a legal attention.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .channel_map import AttentionHeads, ChannelMap
from .program import Program
from .prunable_units import Kind, Unit


def find_units(program: Program, channels: ChannelMap, kinds: Iterable[Kind]) -> list[Unit]:
    """The units of the given kinds (ffn, heads, width), group by group in graph order."""
    found: list[Unit] = []
    wanted = set(kinds)
    costs = _costs(program, channels)
    if "heads" in wanted:
        for heads in channels.attentions:
            found += _head_groups(channels, heads, costs)
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
    roots = roots - {0}
    if not roots or any(root in channels.blocked for root in roots):
        return []
    return [Unit(kind, group, frozenset(roots), sum(costs.get(r, 0) for r in roots), label)]


def _head_groups(channels: ChannelMap, heads: AttentionHeads, costs: dict[int, int]) -> list[Unit]:
    where = str(heads.node.meta.get("module", "")) or heads.node.name
    found: list[Unit] = []
    taken: set[int] = set()
    for place in range(len(heads.key)):
        roots = {*heads.key[place].tolist(), *heads.value[place].tolist()}
        for query in range(place * heads.groups, (place + 1) * heads.groups):
            roots |= {*heads.query[query].tolist(), *heads.out[query].tolist()}
        if roots & taken - {0}:
            return []  # heads share channels (a norm over head channels), so none may go alone
        taken |= roots
        found += _unit(channels, "heads", where, roots, costs, f"{where} head group {place}")
    return found if len(found) == len(heads.key) > 1 else []


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
