"""A map of a program's channels: what may be cut, what goes with it, and what forbids it.

Axis flow (`axes`) gives every element of every value its channel. Here the walk is kept: the class
(root) of every entry along every weight axis, of every element of every value, the heads of every
attention, and why some classes must stay. A root is a number that means nothing by itself; the
sets of roots that people cut are found by looking at weight axes and heads.

Channels that several others share are one with them: the query heads of a key head go together, and
so do all heads under a norm whose weight has one entry per head channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .axes import Flow
from .axes_channels import Numbers
from .pattern import bound_arguments
from .program import Node, Program

_ATTENTIONS = {
    torch.ops.planish.attention.default,
    torch.ops.aten.scaled_dot_product_attention.default,
}
Key = tuple[str, int]
"""A weight's canonical name and one of its axes."""


@dataclass(frozen=True)
class AttentionHeads:
    """The channels of one attention, as roots (0: an element without a channel).

    query [heads, d], key [kv heads, d], value [kv heads, dv], out [heads, dv]. What a head has
    besides (a row of a bias table, a sink, a slope) is not followed; a cut that needs it is
    refused.
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
    _values: Mapping[Node, Any] = field(repr=False)
    _roots: Numbers = field(repr=False)

    def values(self, node: Node) -> Tensor | None:
        """The root of each element of a value, int64 of its shape (free sizes are small numbers);
        None for a value without channels."""
        held = self._values.get(node)
        if not isinstance(held, Tensor):
            return None
        return _spread_roots(self._roots, held)

    def parts(self, node: Node) -> list[Tensor]:
        """The roots of a value's elements, or of each of several values; empty without channels."""
        held = self._values.get(node)
        held = held if isinstance(held, (tuple, list)) else [held]
        return [_spread_roots(self._roots, part) for part in held if isinstance(part, Tensor)]

    def closure(self, dead: Iterable[int]) -> frozenset[int]:
        """The roots that go when these go: themselves, without 0."""
        return frozenset(int(root) for root in dead) - {0}

    def dead_entries(self, dead: Iterable[int]) -> dict[str, dict[int, Tensor]]:
        """weight -> axis -> bool [size], True where the entry goes; of axes that lose some."""
        gone = np.fromiter(self.closure(dead), dtype=np.int64)
        found: dict[str, dict[int, Tensor]] = {}
        for (name, axis), roots in self.axes.items():
            mask = np.isin(roots, gone)
            if mask.any():
                found.setdefault(name, {})[axis] = torch.from_numpy(mask)
        return found

    def why_not(self, dead: Iterable[int]) -> str:
        """The sentence that forbids a cut, "" if none of its channels is blocked."""
        return next((self.blocked[root] for root in self.closure(dead) if root in self.blocked), "")


def channel_map(program: Program) -> ChannelMap:
    """Walk over the program once and keep what was seen."""
    values: dict[Node, Any] = {}

    def keep(node: Node, value: Any) -> None:
        values[node] = value

    flow = Flow(program, "width", keep)
    classes = flow.channels.solve()
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


def _spread_roots(roots: Numbers, ids: Tensor) -> Tensor:
    """Roots of channel numbers, kept spread where the numbers were."""
    seen = ids
    for axis in range(ids.dim()):
        if ids.shape[axis] > 1 and ids.stride(axis) == 0:
            seen = seen.narrow(axis, 0, 1)
    return torch.from_numpy(roots[seen.numpy()]).expand(ids.shape)


__all__ = ["AttentionHeads", "ChannelMap", "Key", "channel_map"]
