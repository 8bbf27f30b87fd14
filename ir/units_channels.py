"""Units that are single channels: of feed-forward layers, of residual streams, of small tables.

Told apart by who makes and who reads them. A residual stream starts at a looked-up table, or goes
through norms, and several products write into it and read it. An FFN channel is made by a product
and read by another one, and is of no attention and no stream. Latent channels, which a narrow
product makes of what the next one makes wide again, are neither: of keys and values in latent
attention, or of the step sizes of a scan. A table narrower than the stream, which a product widens,
has a width of its own ("embedding").
"""

from __future__ import annotations

from collections.abc import Iterable

from .channel_map import ChannelMap, Key
from .prunable_units import Costs, Kind, Unit, units_of


def ffn_units(channels: ChannelMap, costs: Costs) -> list[Unit]:
    roles = _Roles(channels)
    taken = set(roles.attended) | roles.streams | roles.latent() | roles.tables | {0}
    found: list[Unit] = []
    for (name, axis), made in channels.produces.items():
        if made != "product":
            continue
        roots = dict.fromkeys(channels.axes[name, axis].tolist())
        fresh = [root for root in roots if root not in taken and root in roles.read]
        units = _each(channels, costs, "ffn", name.rpartition(".")[0] or name, fresh)
        if len(units) > 1:
            found += units
            taken |= set(fresh)
    return found


def width_units(channels: ChannelMap, costs: Costs) -> list[Unit]:
    roles = _Roles(channels)
    return [
        unit
        for name, roots in roles.stream_orders
        for unit in _each(channels, costs, "width", name, roots)
    ]


def embedding_units(channels: ChannelMap, costs: Costs) -> list[Unit]:
    roles = _Roles(channels)
    taken = set(roles.streams) | roles.attended | {0}
    found: list[Unit] = []
    for (name, axis), made in channels.produces.items():
        roots = channels.axes[name, axis].tolist()
        if made == "table" and set(roots) <= roles.read - taken:
            found += _each(channels, costs, "embedding", name, roots)
            taken |= set(roots)
    return found


def _each(
    channels: ChannelMap, costs: Costs, kind: Kind, group: str, roots: Iterable[int]
) -> list[Unit]:
    named = [(f"channel {place}", (root,)) for place, root in enumerate(roots)]
    return units_of(channels, costs, kind, group, named)


class _Roles:
    """What the classes of a program are for.

    written, read: by products. attended: of queries, keys, values and results of attentions.
    streams: of residual streams, whose channels in order are stream_orders, named by what makes
    them first. tables: of looked-up tables.
    """

    def __init__(self, channels: ChannelMap) -> None:
        self.channels = channels
        self.sets = {key: frozenset(roots.tolist()) for key, roots in channels.axes.items()}
        self.writers = self._count(k for k, made in channels.produces.items() if made == "product")
        self.readers = self._count(channels.absorbs)
        self.read = set(self.readers)
        self.attended = channels.attended
        self.tables = self._of("table")
        self.stream_orders = self._streams()
        self.streams = {root for _, order in self.stream_orders for root in order}

    def _count(self, keys: Iterable[Key]) -> dict[int, int]:
        found: dict[int, int] = {}
        for key in keys:
            for root in self.sets[key]:
                found[root] = found.get(root, 0) + 1
        return found

    def _of(self, what: str) -> set[int]:
        keys = [key for key, made in self.channels.produces.items() if made == what]
        return set[int]().union(*(self.sets[key] for key in keys))

    def _streams(self) -> list[tuple[str, list[int]]]:
        """Tables that products write into and read, several of them or through norms; and what
        norms, several writers and several readers have (as if it starts at a convolution)."""
        normed, both = self._of("norm"), self.writers.keys() & self.readers.keys()
        several = {r for r in both if self.writers[r] > 1} | (both & normed)
        often = {r for r in both if min(self.writers[r], self.readers[r]) > 1} & normed
        found: list[tuple[str, list[int]]] = []
        taken = set(self.attended) | {0}
        for wanted, allowed in (("table", several), ("product", often)):
            for (name, axis), made in self.channels.produces.items():
                roots = self.channels.axes[name, axis].tolist()
                whole = len(set(roots)) == len(roots) > 1
                if made == wanted and whole and set(roots) <= allowed - taken:
                    found.append((name, roots))
                    taken |= set(roots)
        return found

    def latent(self) -> set[int]:
        """What a product makes narrow, and all who read it make wide again, or make heads of."""
        columns: dict[str, frozenset[int]] = {}
        for name, axis in self.channels.absorbs:
            columns[name] = columns.get(name, frozenset()) | self.sets[name, axis]
        makers: dict[int, set[Key]] = {}
        for key, made in self.channels.produces.items():
            for root in self.sets[key] if made == "product" else ():
                makers.setdefault(root, set()).add(key)
        axes: dict[str, dict[int, frozenset[int]]] = {}
        for (name, axis), roots in self.sets.items():
            axes.setdefault(name, {})[axis] = roots
        wide_by: dict[int, int] = {}
        for name, axis in self.channels.absorbs:
            others = [roots for other, roots in axes[name].items() if other != axis]
            wide, read = frozenset[int]().union(*others) - {0}, self.sets[name, axis]
            found = set(read) if wide & self.attended else set[int]()
            for key in set[Key]().union(*(makers.get(root, ()) for root in read)):
                if wide & columns.get(key[0], frozenset()) - self.streams:
                    found |= read & self.sets[key]
            for root in found:
                wide_by[root] = wide_by.get(root, 0) + 1
        return {root for root, count in wide_by.items() if count == self.readers[root]}


__all__ = ["embedding_units", "ffn_units", "width_units"]
