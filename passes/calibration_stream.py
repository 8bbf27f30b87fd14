"""Calibration batches on their way through a program, all of them a segment of the graph at a time.

A value is kept for every batch from the segment that computes it to the last one that reads it.
What does not depend on a batch's data, or only on inputs that several batches share (positions,
rotary tables, masks of full batches), is kept once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from ..ir.program import Node, Program

_SIZE = torch.ops.aten.sym_size.int
_Source = tuple[Node, str]  # an input, and whether its "data" is read or only its "shape"


@dataclass
class Schedule:
    """When each needed value is read last, in segments that end after `stops`.

    segments: the nodes to call, in graph order; last: the last segment that reads a value.
    """

    stops: Sequence[Node]
    segments: list[list[Node]]
    last: dict[Node, int] = field(default_factory=dict[Node, int])


def schedule(program: Program, stops: Sequence[Node]) -> Schedule:
    """Segments that compute `stops` (in graph order), and nothing that none of them needs."""
    needed = ancestors(stops)
    plan = Schedule(stops, [[] for _ in stops])
    at, place = 0, {node: number for number, node in enumerate(stops)}
    for node in program.graph.nodes:
        if at == len(stops):
            break
        if node.op != "get_attr" and node in needed:
            plan.last[node] = at
            for read in node.all_input_nodes:
                if read.op != "get_attr":
                    plan.last[read] = at
            if node.op == "call_function":
                plan.segments[at].append(node)
        at = place.get(node, at - 1) + 1
    for node, number in place.items():
        plan.last[node] = max(plan.last[node], number)
    return plan


def ancestors(values: Iterable[Node]) -> set[Node]:
    """The values and all that they are computed from."""
    found: set[Node] = set()
    waiting = list(values)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


class Stream:
    """All batches at one place of the graph.

    batches: flat input lists. weight: reads a weight by name; each is read once a segment.
    """

    def __init__(
        self,
        program: Program,
        batches: Sequence[Sequence[Any]],
        plan: Schedule,
        weight: Callable[[str], Tensor],
    ) -> None:
        self.plan, self.weight, self.count = plan, weight, len(batches)
        self._kept: dict[Node, dict[Hashable, Any]] = {}
        self._sources = _data_sources(program)
        self._classes = [_input_classes(program, batch) for batch in batches]
        self._holders: dict[tuple[_Source, ...], dict[Hashable, int]] = {}
        for position, node in enumerate(program.inputs):
            if node in plan.last:
                for number, batch in enumerate(batches):
                    self._kept.setdefault(node, {})[self._key(node, number)] = batch[position]

    def value(self, node: Node, batch: int) -> Any:
        """A kept value of one batch."""
        return self._kept[node][self._key(node, batch)]

    def rows(self, node: Node) -> Iterator[Tensor] | None:
        """A kept value of every batch as [tokens, width]; None if it is not kept now."""
        kept = self._kept.get(node, {})
        if any(self._key(node, batch) not in kept for batch in range(self.count)):
            return None
        values = (self.value(node, batch) for batch in range(self.count))
        return (value.reshape(-1, value.shape[-1]) for value in values)

    @torch.no_grad()
    def advance(self, segment: int) -> None:
        """Run one segment for every batch; drop what no later segment reads."""
        weights: dict[str, Tensor] = {}
        stop = self.plan.stops[segment]
        doomed = [
            node
            for node, last in self.plan.last.items()
            if last == segment and node in self._kept and node is not stop
        ]
        ends = _last_reads(self.plan, segment)
        for batch in range(self.count):
            self._run(segment, batch, weights, ends)
            for node in doomed:
                self._drop(node, batch)

    def leave(self, segment: int) -> None:
        """Drop the segment's last value if no later segment reads it."""
        stop = self.plan.stops[segment]
        if self.plan.last[stop] == segment:
            self._kept.pop(stop, None)

    def _run(
        self, segment: int, batch: int, weights: dict[str, Tensor], ends: dict[Node, list[Node]]
    ) -> None:
        local: dict[Node, Any] = {}

        def read(value: Any) -> Any:
            if not isinstance(value, fx.Node):
                return value
            if value.op == "get_attr":
                name = str(value.target)
                if name not in weights:
                    weights[name] = self.weight(name)
                return weights[name]
            return local[value] if value in local else self.value(value, batch)

        stop = self.plan.stops[segment]
        for node in self.plan.segments[segment]:
            lasting = self.plan.last[node] > segment or node is stop
            key = self._key(node, batch) if lasting else None
            if lasting and key in self._kept.setdefault(node, {}):
                continue
            args, kwargs = map_aggregate(node.args, read), map_aggregate(node.kwargs, read)
            result = node.target(*args, **kwargs)  # type: ignore[operator]
            if lasting:
                self._kept[node][key] = result
            else:
                local[node] = result
            for done in ends.get(node, ()):
                local.pop(done, None)

    def _key(self, node: Node, batch: int) -> Hashable:
        """Equal for batches that give a value the same content."""
        classes = self._classes[batch]
        return tuple(classes[source] for source in self._sources[node])

    def _drop(self, node: Node, batch: int) -> None:
        """Drop one batch's value, unless a later batch shares it."""
        key, sources = self._key(node, batch), self._sources[node]
        if sources not in self._holders:
            self._holders[sources] = {self._key(node, n): n for n in range(self.count)}
        if self._holders[sources][key] == batch:
            self._kept[node].pop(key, None)


def _last_reads(plan: Schedule, segment: int) -> dict[Node, list[Node]]:
    """For each node of a segment the values that it is the last to read within the segment."""
    last: dict[Node, Node] = {}
    for node in plan.segments[segment]:
        for read in node.all_input_nodes:
            last[read] = node
        last.setdefault(node, node)
    ends: dict[Node, list[Node]] = {}
    for value, reader in last.items():
        ends.setdefault(reader, []).append(value)
    return ends


def _data_sources(program: Program) -> dict[Node, tuple[_Source, ...]]:
    """For each value the inputs that it depends on, in an order of their own."""
    found: dict[Node, frozenset[_Source]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            found[node] = frozenset([(node, "data")])
        elif node.target is _SIZE and node.args[0].op == "placeholder":
            found[node] = frozenset([(node.args[0], "shape")])
        else:
            found[node] = frozenset[_Source]().union(*(found[r] for r in node.all_input_nodes))
    ordered = {sources: tuple(sorted(sources, key=str)) for sources in set(found.values())}
    return {node: ordered[sources] for node, sources in found.items()}


def _input_classes(program: Program, batch: Sequence[Any]) -> dict[_Source, Hashable]:
    """What tells the inputs of one batch from those of another."""
    classes: dict[_Source, Hashable] = {}
    for node, value in zip(program.inputs, batch, strict=True):
        if isinstance(value, Tensor):
            shape = tuple(value.shape)
            classes[node, "shape"] = shape
            classes[node, "data"] = (shape, _digest(value))
        else:
            classes[node, "shape"] = classes[node, "data"] = repr(value)
    return classes


def _digest(value: Tensor) -> bytes:
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(raw.numpy().data, digest_size=16).digest()
