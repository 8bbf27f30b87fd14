"""A map of a program's channels: what may be cut, what goes with it, and what forbids it.

Axis flow (`axes`) gives every element of every value its channel. Here the walk is kept: the class
(root) of every entry along every weight axis, of every element of every value, the heads of every
attention, and why some classes must stay. A root is a number that means nothing by itself; the
sets of roots that people cut are found by looking at weight axes and heads.

What several channels share covers them (`axes_covers`): a norm's weight of one entry per head
channel covers that channel of every head, a key head its query heads. It goes when all of them go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .axes import Flow
from .axes_channels import Numbers
from .axes_covers import Covers, settle
from .axes_weights import WeightView
from .pattern import bound_arguments
from .program import Node, Program

_ATTENTIONS = {
    torch.ops.planish.attention.default,
    torch.ops.aten.scaled_dot_product_attention.default,
}
Marked = NDArray[np.bool_]
Key = tuple[str, int]
"""A weight's canonical name and one of its axes."""


@dataclass(frozen=True)
class AttentionHeads:
    """The channels of one attention, as roots (0: an element without a channel).

    query [heads, d], key [kv heads, d], value [kv heads, dv], out [heads, dv].
    """

    node: Node
    query: Numbers
    key: Numbers
    value: Numbers
    out: Numbers

    @property
    def groups(self) -> int:
        """Query heads on each key-value head."""
        return len(self.query) // max(len(self.key), 1)


@dataclass(frozen=True)
class ChannelMap:
    """What one walk over a program found; true until the program is edited.

    axes: (weight, axis) -> the root of each entry, int64 [size]. produces, absorbs: which of them
    make channels and which read them. offsets: what is added to a weight before it multiplies (1 in
    norms that store weight - 1). blocked: root -> why it may not be cut (one sentence).
    """

    axes: Mapping[Key, Numbers]
    attentions: tuple[AttentionHeads, ...]
    blocked: Mapping[int, str]
    produces: Mapping[Key, str]
    absorbs: frozenset[Key]
    offsets: Mapping[str, float]
    _bare: Mapping[tuple[Node, Node], Tensor] = field(repr=False)
    _covers: Covers = field(repr=False)
    _values: Mapping[Node, Any] = field(repr=False)
    _roots: Numbers = field(repr=False)

    def values(self, node: Node) -> Tensor | None:
        """The root of each element of a value, int64 of its shape (free sizes are small numbers);
        None for a value without channels."""
        held = self._values.get(node)
        if not isinstance(held, Tensor):
            return None
        return _spread_roots(self._roots, held)

    def kept(self, node: Node, gone: Marked) -> list[Tensor]:
        """Which elements of a value stay when the classes marked in `gone` go, bool of its shape,
        or of each of several values; empty without channels."""
        held = self._values.get(node)
        if isinstance(held, WeightView):
            return [self._kept_of(held, gone)]
        held = held if isinstance(held, (tuple, list)) else [held]
        return [_stays(self._roots, part, gone) for part in held if isinstance(part, Tensor)]

    def kept_bare(self, key: tuple[Node, Node], gone: Marked) -> Tensor:
        """Which elements of a bare value its reader needs when these go."""
        return _stays(self._roots, self._bare[key], gone)

    def _kept_of(self, view: WeightView, gone: Marked) -> Tensor:
        mask = torch.ones((), dtype=torch.bool).expand(view.shape)
        for axis, place in enumerate(view.axes):
            roots = self.axes.get((view.name, place.axis)) if place is not None else None
            if place is not None and roots is not None and gone[roots].any():
                stay = torch.from_numpy(~gone[roots])[place.index]
                mask = mask & stay.reshape([-1, *[1] * (mask.dim() - axis - 1)])
        return mask

    def marked(self, dead: Iterable[int]) -> Marked:
        """bool [channels], True for the roots that go when these go."""
        found = np.zeros(len(self._roots), dtype=np.bool_)
        found[list(self.closure(dead))] = True
        return found

    @property
    def bare(self) -> Collection[tuple[Node, Node]]:
        """(a node, what it reads) where the node meets channels with a value that has none, or of
        which others read other parts."""
        return self._bare.keys()

    def closure(self, dead: Iterable[int]) -> frozenset[int]:
        """The roots that go when these go: with what they cover, and what covers only them."""
        return self._covers.closure(dead)

    def dead_entries(self, dead: Iterable[int]) -> dict[str, dict[int, Tensor]]:
        """weight -> axis -> bool [size], True where the entry goes; of axes that lose some."""
        gone = self.marked(dead)
        found: dict[str, dict[int, Tensor]] = {}
        for (name, axis), roots in self.axes.items():
            mask = gone[roots]
            if mask.any():
                found.setdefault(name, {})[axis] = torch.from_numpy(mask)
        return found

    @property
    def attended(self) -> frozenset[int]:
        """The roots of all queries, keys, values and results of attentions."""
        parts = [p for a in self.attentions for p in (a.query, a.key, a.value, a.out)]
        return frozenset(int(root) for part in parts for root in np.unique(part))

    def why_not(self, dead: Iterable[int]) -> str:
        """The sentence that forbids a cut, "" if none of its channels is blocked."""
        return next((self.blocked[root] for root in self.closure(dead) if root in self.blocked), "")


def channel_map(program: Program) -> ChannelMap:
    """Walk over the program once and keep what was seen."""
    values: dict[Node, Any] = {}

    def keep(node: Node, value: Any) -> None:
        values[node] = value

    flow = Flow(program, "cut", keep)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "get_attr" and isinstance(value, Tensor):
            name = program.weights.canonical(str(node.target))
            values[node] = WeightView.whole(name, [int(size) for size in value.shape])
    classes, covers = settle(flow.channels)
    roots = classes.roots
    axes = {key: roots[ids.numpy()] for key, ids in flow.weight_axes.items()}
    attentions = [
        _heads(node, values, roots)
        for node in program.graph.nodes
        if node.target in _ATTENTIONS and isinstance(values.get(node), Tensor)
    ]
    return ChannelMap(
        axes,
        tuple(found for found in attentions if found is not None),
        classes.reasons,
        dict(flow.produces),
        frozenset(flow.absorbs),
        dict(flow.offsets),
        dict(flow.bare),
        covers,
        values,
        roots,
    )


def _heads(node: Node, values: Mapping[Node, Any], roots: Numbers) -> AttentionHeads | None:
    given = bound_arguments(node)
    names = ("q", "k", "v") if "q" in given else ("query", "key", "value")
    parts = [values.get(given[name]) for name in names] + [values.get(node)]
    if not all(isinstance(part, Tensor) and part.dim() == 4 for part in parts):
        return None
    rows = [roots[part[0, :, 0].numpy()] for part in parts if isinstance(part, Tensor)]
    return AttentionHeads(node, *rows)


def _stays(roots: Numbers, ids: Tensor, gone: Marked) -> Tensor:
    """Where channels are of no class that goes, kept spread where the channels are."""
    seen = ids
    for axis in range(ids.dim()):
        if ids.shape[axis] > 1 and ids.stride(axis) == 0:
            seen = seen.narrow(axis, 0, 1)
    return torch.from_numpy(~gone[roots[seen.numpy()]]).expand(ids.shape)


def _spread_roots(roots: Numbers, ids: Tensor) -> Tensor:
    """Roots of channel numbers, kept spread where the numbers were."""
    seen = ids
    for axis in range(ids.dim()):
        if ids.shape[axis] > 1 and ids.stride(axis) == 0:
            seen = seen.narrow(axis, 0, 1)
    return torch.from_numpy(roots[seen.numpy()]).expand(ids.shape)


__all__ = ["AttentionHeads", "ChannelMap", "Key", "Marked", "channel_map"]
