"""The residual stream of a program: the values that share its channels, and who writes and reads.

Found by axis flow, not by names: channels that come from a looked-up table, that products write
into and that products read. Its basis may be rotated, x' = x R, if everything on the way is linear
and treats all channels alike: sums of two such values, factors that are one for all channels,
layout that leaves the channels where they are, and RMS norms, whose length of x does not change
(without weights, or with weights that are all 1). LayerNorms take the mean of x, so they object to
a rotation; where they alone read the stream, its mean may be taken out by all who write into it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .axes import Flow
from .axes_channels import Numbers, carries, narrowed
from .axes_weights import WeightView
from .look_through import number
from .pattern import bound_arguments
from .positional import contents_read
from .program import Node, Program
from .text import op_text

_ATEN, _OURS = torch.ops.aten, torch.ops.planish
_NORM = _OURS.rms_norm.default
_NORMS = {_NORM, _ATEN.layer_norm.default}
_SUMS = {_ATEN.add.Tensor, _ATEN.sub.Tensor}
_FACTORS = {_ATEN.mul.Tensor, _ATEN.div.Tensor, _ATEN.mul.Scalar, _ATEN.div.Scalar}
_PRODUCTS = {
    _ATEN.linear.default,
    _ATEN.addmm.default,
    _ATEN.mm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN.matmul.default,
}
_MOVES = {
    _ATEN.view.default,
    _ATEN._unsafe_view.default,
    _ATEN.reshape.default,
    _ATEN.unsqueeze.default,
    _ATEN.squeeze.dim,
    _ATEN.expand.default,
    _ATEN.slice.Tensor,
    _ATEN.select.int,
    _ATEN.cat.default,
    _ATEN.clone.default,
    _ATEN._to_copy.default,
    _ATEN.type_as.default,
    _ATEN.transpose.int,
    _ATEN.permute.default,
    _ATEN.repeat_interleave.self_int,
    _ATEN.index.Tensor,
    _ATEN.index_select.default,
    _ATEN.sum.dim_IntList,
    _ATEN.embedding.default,
}


@dataclass
class Stream:
    """channels: how many. axes: every (weight, axis) that lies along them, norms apart.

    writers: those of them that make values of the stream. norms, means: RMS norms and LayerNorms
    that take it, in graph order. objections: why it may not be rotated, LayerNorms apart;
    bare: why its mean may not be taken out either.
    """

    channels: int
    axes: list[tuple[str, int]]
    writers: list[tuple[str, int]]
    norms: list[Node]
    means: list[Node]
    objections: list[str] = field(default_factory=list[str])
    bare: list[str] = field(default_factory=list[str])


def residual_streams(program: Program) -> list[Stream]:
    """Every stream of the program, the widest first (an encoder and a decoder may differ)."""
    flow = Flow(program, "width")
    roots = flow.channels.solve().roots
    return [
        _look(program, roots, order)
        for order in sorted(_candidates(flow, roots), key=len, reverse=True)
    ]


def _candidates(flow: Flow, roots: Numbers) -> list[Numbers]:
    """Channel orders of tables that products both write into and read."""
    written, read = set[int](), set[int]()
    for key, ids in flow.weight_axes.items():
        found = np.unique(roots[ids.numpy()]).tolist()
        if flow.produces.get(key) == "product":
            written.update(found)
        if key in flow.absorbs:
            read.update(found)
    orders: dict[bytes, Numbers] = {}
    for key, what in flow.produces.items():
        order = roots[flow.weight_axes[key].numpy()]
        whole = len(np.unique(order)) == len(order)
        if what == "table" and whole and set(order.tolist()) <= written & read:
            orders.setdefault(order.tobytes(), order)
    return list(orders.values())


def _look(program: Program, roots: Numbers, order: Numbers) -> Stream:
    look = _Look(roots, order)
    flow = Flow(program, "width", look.node)
    own = {str(w.target) for n in (*look.norms, *look.means) for w in _weights_of(n)}
    axes: list[tuple[str, int]] = []
    for (name, axis), ids in flow.weight_axes.items():
        found = roots[ids.numpy()]
        if name in own or not np.isin(found, order).any():
            continue
        if not np.array_equal(found, order):
            look.object_to(f"the channels of {name} come in another order along axis {axis}")
        axes.append((name, axis))
    writers = [key for key in axes if key in flow.produces]
    for value in program.results:
        if isinstance(value, fx.Node) and value in look.members:
            look.object_to(f"%{value.name} is returned by the program")
    return Stream(len(order), axes, writers, look.norms, look.means, look.objections, look.bare)


def _weights_of(norm: Node) -> list[Node]:
    return [read for read in norm.all_input_nodes if read.op == "get_attr"]


class _Look:
    """Watches a walk: which values are in the stream's basis, and what may not touch them."""

    def __init__(self, roots: Numbers, order: Numbers) -> None:
        self.roots, self.order = roots, order
        self.known = set(order.tolist())
        self.members: set[Node] = set()
        self.weights: set[Node] = set()
        self.raw: set[Node] = set()  # members that went through no norm
        self.norms: list[Node] = []
        self.means: list[Node] = []
        self.objections: list[str] = []
        self.bare: list[str] = []

    def object_to(self, sentence: str) -> None:
        if sentence not in self.objections:
            self.objections.append(sentence)

    def node(self, node: Node, value: Any) -> None:
        if isinstance(value, WeightView):
            self.weights.add(node)
        taken = [read for read in contents_read(node) if read in self.members]
        if isinstance(value, Tensor) and self._touches(value):
            self.members.add(node)
            if node.target not in _NORMS and (not taken or not self.raw.isdisjoint(taken)):
                self.raw.add(node)
            if not self._ordered(value) and not self._read_turned(node):
                self.object_to(f"%{node.name} has the channels in another order or place")
        if taken:
            self._judge(node, taken)

    def _judge(self, node: Node, taken: list[Node]) -> None:
        if node.target in _NORMS:
            (self.norms if node.target is _NORM else self.means).append(node)
        elif node.target in _SUMS:
            if not all(isinstance(a, fx.Node) and self._same(a) for a in node.args[:2]):
                self.object_to(f"{op_text(node)} %{node.name} adds what is not of the stream")
            elif 0 < len(self.raw.intersection(taken)) < len(taken):
                self.bare.append(f"a norm writes into the stream at {op_text(node)} %{node.name}")
        elif node.target in _FACTORS:
            self._judge_factor(node)
        elif node.target in _PRODUCTS:
            if all(read in self.members for read in node.all_input_nodes):
                self.object_to(f"%{node.name} multiplies two values of the stream")
            if not self.raw.isdisjoint(taken):
                self.bare.append(f"{op_text(node)} %{node.name} reads the stream without a norm")
        elif node.target in _MOVES:
            if node.target is not _ATEN.embedding.default and node not in self.members:
                self.object_to(f"{op_text(node)} %{node.name} takes channels apart")
        elif not getattr(node.target, "__name__", "").startswith(("sym_size", "_assert")):
            self.object_to(f"{op_text(node)} %{node.name} does not treat all channels alike")

    def _judge_factor(self, node: Node) -> None:
        first, second = node.args[:2]
        others = [a for a in (first, second) if not (isinstance(a, fx.Node) and a in self.members)]
        fine = len(others) == 1 and (number(others[0]) is not None or _one_for_all(others[0]))
        if not fine or (node.target is _ATEN.div.Tensor and others[0] is first):
            self.object_to(f"{op_text(node)} %{node.name} gives channels different factors")

    def _same(self, node: Node) -> bool:
        """Of the stream, or a weight that is (its axis is checked with the weights)."""
        return node in self.members | self.weights or node.op == "get_attr"

    def _touches(self, ids: Tensor) -> bool:
        seen = narrowed(ids)[0] if carries(ids) else ids.new_zeros(1)
        return not self.known.isdisjoint(self.roots[seen.unique().numpy()].tolist())

    def _ordered(self, ids: Tensor) -> bool:
        if ids.dim() == 0 or ids.shape[-1] != len(self.order):
            return False
        rows = narrowed(ids)[0].reshape(-1, len(self.order)).unique(dim=0)
        return bool((self.roots[rows.numpy()] == self.order).all())

    def _read_turned(self, node: Node) -> bool:
        """[..., channels, 1] or another turn, which only products read."""
        moved = node.target in _MOVES or node.target in _PRODUCTS
        return moved and all(user.target in _PRODUCTS | _MOVES for user in node.users)


def _one_for_all(value: Any) -> bool:
    """Whether a factor is the same for all channels: a tensor of one entry along the last axis."""
    held = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(held, Tensor) and (held.dim() == 0 or held.shape[-1] == 1)


def norm_weight(node: Node) -> tuple[str, float] | None:
    """The name of an RMS norm's weight and what is added to it; None if it has none."""
    given = bound_arguments(node)
    weight = given["weight"]
    return None if weight is None else (str(weight.target), float(given["offset"]))
