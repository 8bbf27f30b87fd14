"""Scale edges: where a positive factor per channel may be moved from some weights to others.

An edge is a family of channels that the same weight axes produce and read. Its producers take 1/s
(weight rows with their biases; norm weights; a norm that multiplies by offset + w takes
(offset + w)/s - offset), its consumers take s, and the program computes the same function. Every
family with a producer is told, with the reason why it may not take a factor where it may not:
somebody else reads the channels (a residual sum, an output), a weight is tied and would have to
take s in one place and 1/s in another, or an operation on the way is not homogeneous.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .axes import Flow, Reading
from .axes_arithmetic import GATE, RELU, SUM
from .axes_channels import Classes
from .axes_products import VALUES
from .program import Program
from .weights import Derived, EncodedTensor

Key = tuple[str, int]


_TIED = "is tied"
_ORDER = ("norm", "factor", "product", "table", "value", "bias")


@dataclass(frozen=True)
class EdgeEnd:
    """One weight axis of an edge.

    channel: int64 [size of the axis], the number of the factor that an entry takes, or -1.
    what: product (rows of a matmul), norm, factor (it multiplies what has none: a norm that is
    spelled out), bias, table or value. offset: see the module.
    readings: for a consumer, the products that read it with the activations they multiply.
    """

    weight: str
    axis: int
    channel: Tensor
    what: str
    offset: float = 0.0
    readings: tuple[Reading, ...] = ()

    def spread(self, factors: Tensor) -> Tensor:
        """The factor of each entry along the axis, 1 where it takes none."""
        padded = torch.cat((factors, factors.new_ones(1)))
        return padded[self.channel]


@dataclass(frozen=True)
class ScaleEdge:
    """kind: norm->linear, v->o, up->down, fc1->fc2 (through relu), linear->linear, table->linear;
    or only norm, linear or table where no product reads the channels.

    factors: how many free factors there are. reason: why none may be moved, or "". passed: what
    stands on the way. heads: of v->o, int64 [heads, value channels], the factors of each head in
    order, if every head is whole; None otherwise.
    """

    kind: str
    producers: tuple[EdgeEnd, ...]
    consumers: tuple[EdgeEnd, ...]
    factors: int
    reason: str
    passed: frozenset[str] = frozenset()
    heads: Tensor | None = None

    @property
    def free(self) -> bool:
        return not self.reason and bool(self.consumers)

    @property
    def name(self) -> str:
        """The weight that it starts from."""
        return self._starts[0].weight

    @property
    def _starts(self) -> list[EdgeEnd]:
        return sorted(self.producers, key=lambda end: _ORDER.index(end.what))

    def sentence(self) -> str:
        """What is moved where, or why not."""
        ends = _listed(dict.fromkeys(end.weight for end in self.consumers)) or "no product"
        starts = _listed(dict.fromkeys(end.weight for end in self._starts))
        if self.reason:
            return f"{self.kind}: {starts} to {ends}: no factor may be moved: {self.reason}"
        shared = ""
        width = sum(int((end.channel >= 0).sum()) for end in self.consumers[:1])
        if width > self.factors:
            shared = f", each shared by {width // self.factors} channels read"
        return f"{self.kind}: {self.factors} factors from {starts} to {ends}{shared}"


def _listed(names: dict[str, None]) -> str:
    found = list(names)
    return ", ".join(found) if len(found) <= 5 else ", ".join(found[:4]) + f" and {len(found) - 4}"


def scale_edges(program: Program) -> list[ScaleEdge]:
    """Every edge that starts at a product, a norm or a table, in graph order; blocked ones too."""
    flow = Flow(program, "scale")
    _pin(flow)
    classes = flow.channels.solve()
    edges = [_edge(flow, classes, group) for group in _families(flow, classes)]
    return [edge for edge in edges if any(end.what in _starts(edge) for end in edge.producers)]


def _starts(edge: ScaleEdge) -> tuple[str, ...]:
    """A factor that leads nowhere is no edge: tables of angles, decays, ..."""
    found = ("product", "norm", "table")
    return (*found, "factor") if edge.consumers else found


def _pin(flow: Flow) -> None:
    """Block what the roles of the weights themselves forbid."""
    for (name, axis), reason in flow.pins.items():
        if (name, axis) in flow.weight_axes:
            flow.block(flow.axis_channels(name, axis), reason)
    for key in flow.produces.keys() & flow.absorbs.keys():
        reason = f"{key[0]} {_TIED}: its axis {key[1]} is read here and makes channels elsewhere"
        flow.channels.block(flow.axis_channels(*key), reason, first=True)
    for name, axis in flow.weight_axes:
        entry = flow.program.weights.entry(name)
        if isinstance(entry, EncodedTensor) and not isinstance(entry, Derived):
            flow.block(flow.axis_channels(name, axis), f"{name} is encoded already")


@dataclass(frozen=True)
class _Family:
    """Channels with the same ends: their roots, ascending."""

    roots: np.ndarray
    keys: tuple[Key, ...]


def _families(flow: Flow, classes: Classes) -> Iterator[_Family]:
    """Channels grouped by the weight axes that they belong to and by why they are blocked."""
    rng = np.random.default_rng(0)
    keys = list(flow.weight_axes)
    signature = np.zeros(len(classes.roots), dtype=np.uint64)  # random numbers, combined
    members: list[np.ndarray] = []
    for key in keys:
        roots = np.unique(classes.roots[flow.weight_axes[key].numpy()])
        members.append(roots)
        signature[roots] ^= rng.integers(1, 2**63, dtype=np.uint64)
    reasons: dict[str, np.uint64] = {}
    for root, reason in classes.reasons.items():
        if reason not in reasons:
            reasons[reason] = rng.integers(1, 2**63, dtype=np.uint64)
        signature[root] ^= reasons[reason]
    used = np.unique(np.concatenate(members)) if members else np.zeros(0, dtype=np.int64)
    by_signature: dict[int, list[Key]] = {}
    for key, roots in zip(keys, members, strict=True):
        for sign in np.unique(signature[roots]).tolist():
            by_signature.setdefault(sign, []).append(key)
    _, first, inverse = np.unique(signature[used], return_index=True, return_inverse=True)
    for place in np.argsort(first):
        roots = used[inverse == place]
        yield _Family(roots, tuple(by_signature[int(signature[roots[0]])]))


def _edge(flow: Flow, classes: Classes, family: _Family) -> ScaleEdge:
    producers: list[EdgeEnd] = []
    consumers: list[EdgeEnd] = []
    for name, axis in family.keys:
        roots = classes.roots[flow.weight_axes[name, axis].numpy()]
        places = np.searchsorted(family.roots, roots).clip(max=len(family.roots) - 1)
        channel = torch.from_numpy(np.where(family.roots[places] == roots, places, -1))
        readings = tuple(flow.absorbs.get((name, axis), ()))
        if readings:
            consumers.append(EdgeEnd(name, axis, channel, "product", readings=readings))
        if (name, axis) in flow.produces:
            what, offset = flow.produces[name, axis], flow.offsets.get(name, 0.0)
            producers.append(EdgeEnd(name, axis, channel, what, offset))
    first = int(family.roots[0])
    marks = classes.marks.get(first, set())
    reason = classes.reasons.get(first, "")
    if not reason and not consumers:
        reason = "nothing that could take it reads these channels"
    kind = _kind(producers, bool(consumers), marks)
    return ScaleEdge(
        kind,
        tuple(producers),
        tuple(consumers),
        len(family.roots),
        _told(reason, marks),
        frozenset(mark for mark in marks if not mark.startswith(SUM)),
        _heads(flow, classes, family) if VALUES in marks else None,
    )


def _heads(flow: Flow, classes: Classes, family: _Family) -> Tensor | None:
    """The value heads that the family's channels make up, if each of them is in just one."""
    found: list[np.ndarray] = []
    for rows in flow.channels.rows:
        roots = classes.roots[rows]
        inside = np.isin(roots, family.roots)
        if inside.all():
            found.append(np.searchsorted(family.roots, np.unique(roots, axis=0)))
        elif inside.any():
            return None
    heads = np.concatenate(found) if len({part.shape[1] for part in found}) == 1 else None
    if heads is None or len(np.unique(heads)) != heads.size:
        return None
    return torch.from_numpy(heads)


def _kind(producers: list[EdgeEnd], consumed: bool, marks: set[str]) -> str:
    starts = {end.what for end in producers}
    start = "norm" if starts & {"norm", "factor"} else "linear" if "product" in starts else "table"
    if not consumed:
        return start
    for mark, kind in ((VALUES, "v->o"), (GATE, "up->down"), (RELU, "fc1->fc2")):
        if mark in marks and start == "linear":
            return kind
    return f"{start}->linear"


def _told(reason: str, marks: set[str]) -> str:
    sums = sorted(mark for mark in marks if mark.startswith(SUM))
    if reason and sums and _TIED not in reason:
        more = f" and {len(sums) - 1} more" if len(sums) > 1 else ""
        return f"the {sums[0]}{more} joins it with other values (a residual); {reason}"
    return reason
