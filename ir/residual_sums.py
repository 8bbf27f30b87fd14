"""The residual sums of a program: a value, and what a product with weights computed from it.

Everything is read from the data flow; no architecture is known by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ancestry import Ancestry
from .edit import same_shape, value_of
from .pattern import bound_arguments
from .program import Node, Program
from .weight_expressions import constant_nodes

_ATEN, _OURS = torch.ops.aten, torch.ops.planish
SUM = _ATEN.add.Tensor
VIEWS = {_ATEN.reshape.default, _ATEN.view.default, _ATEN._unsafe_view.default}
_ATTENTIONS = {_OURS.attention.default, _ATEN.scaled_dot_product_attention.default}
_PRODUCTS: dict[Any, tuple[str, str]] = {
    _ATEN.linear.default: ("input", "weight"),
    _ATEN.addmm.default: ("mat1", "mat2"),
    _ATEN.mm.default: ("self", "mat2"),
    _ATEN.bmm.default: ("self", "mat2"),
    _ATEN.baddbmm.default: ("batch1", "batch2"),
    _ATEN.matmul.default: ("self", "other"),
}
_CONVOLUTIONS = {
    _ATEN.conv1d.default,
    _ATEN.conv2d.default,
    _ATEN.conv3d.default,
    _ATEN.convolution.default,
}
_CHOICES = {
    *VIEWS,
    _ATEN.index.Tensor,
    _ATEN.index_select.default,
    _ATEN.select.int,
    _ATEN.slice.Tensor,
    _ATEN.transpose.int,
    _ATEN.permute.default,
    _ATEN.t.default,
    _ATEN.unsqueeze.default,
    _ATEN._to_copy.default,
}
_SCALES = {_ATEN.mul.Tensor, _ATEN.div.Tensor, _ATEN.mul.Scalar, _ATEN.div.Scalar, *VIEWS}


@dataclass(frozen=True)
class ResidualSum:
    """total = rest + term.

    enters: the value of the stream that the term is computed from: `rest`, or what that was before
    branches side by side with this one were added to it, or before it was scaled.
    """

    total: Node
    rest: Node
    term: Node
    enters: Node


class ResidualSums:
    """One look at a program, true until that is edited. sums: by their totals, in graph order."""

    def __init__(self, program: Program) -> None:
        self.ancestry = Ancestry(program)
        self.constant = constant_nodes(program)
        self.sums: dict[Node, ResidualSum] = {}
        for node in program.graph.nodes:
            found = self._sum(node)
            if found:
                self.sums[node] = found
        self._drop_nested()

    def mixes(self, enters: Node, term: Node) -> bool:
        """Whether positions meet: attention, values that multiply each other, a convolution."""
        for node in self.ancestry.between(enters, term):
            if node.target in _ATTENTIONS or node.target in _CONVOLUTIONS:
                return True
            if _operands(node) and not self._weighted(node):
                return True
        return False

    def multiplies(self, enters: Node, term: Node) -> bool:
        """Whether a product with a weight lies between."""
        return any(
            node.target in _CONVOLUTIONS or self._weighted(node)
            for node in self.ancestry.between(enters, term)
        )

    def behind(self, rest: Node) -> Node | None:
        """The last residual sum that `rest` is, or is made of without a product."""
        waiting, seen = [rest], {rest}
        found: list[Node] = []
        while waiting:
            node = waiting.pop()
            if node in self.sums:
                found.append(node)
            elif not (self._weighted(node) or node.target in _CONVOLUTIONS | _ATTENTIONS):
                fresh = [read for read in node.all_input_nodes if read not in seen]
                seen.update(fresh)
                waiting.extend(fresh)
        return max(found, key=self.ancestry.place.__getitem__, default=None)

    def _sum(self, node: Node) -> ResidualSum | None:
        pair = addends(node)
        if pair is None or not value_of(node).is_floating_point():
            return None
        for rest, term in (pair, pair[::-1]):
            enters = self._stream_below(rest, term)
            if enters is not None and self.multiplies(enters, term):
                return ResidualSum(node, rest, term, enters)
        return None

    def _stream_below(self, rest: Node, term: Node) -> Node | None:
        while not self.ancestry.feeds(rest, term):
            if rest in self.sums:
                rest = self.sums[rest].rest
                continue
            source = self._scaled(rest)
            if source is None:
                return None
            rest = source
        return None if rest in self.constant else rest

    def _scaled(self, node: Node) -> Node | None:
        """What a value is a view of, or a multiple by one number."""
        reads = [read for read in node.all_input_nodes if read not in self.constant]
        rest = [read for read in node.all_input_nodes if read in self.constant]
        single = all(value_of(read).numel() == 1 for read in rest)
        return reads[0] if node.target in _SCALES and len(reads) == 1 and single else None

    def _weighted(self, node: Node) -> bool:
        return any(self._of_weight(operand) for operand in _operands(node))

    def _of_weight(self, node: Node) -> bool:
        while node not in self.constant:
            if node.target not in _CHOICES:
                return False
            node = node.all_input_nodes[0]
        return True

    def _drop_nested(self) -> None:
        """Keep sums that lie within no other branch (adapters do), and drop those around whole
        blocks (a connection from the first layer to the last)."""
        every = self.sums.values()
        spans = {s.total: set(self.ancestry.between(s.enters, s.term)) for s in every}
        mixing = {s.total for s in every if self.mixes(s.enters, s.term)}
        around = {total for total in mixing if spans[total] & mixing - {total}}
        inside = {node for total in self.sums if total not in around for node in spans[total]}
        gone = around | inside
        self.sums = {total: found for total, found in self.sums.items() if total not in gone}


def _operands(node: Node) -> Sequence[Node]:
    """What a product multiplies; empty for what is none."""
    if node.target is _ATEN.einsum.default:
        return node.all_input_nodes
    names = _PRODUCTS.get(node.target)
    given = bound_arguments(node) if names else {}
    return [given[name] for name in names or ()]


def addends(node: Node) -> tuple[Node, Node] | None:
    """The two values of its own shape and dtype that a node adds, unscaled; None if not so."""
    if node.target is not SUM or bound_arguments(node)["alpha"] != 1:
        return None
    reads = node.all_input_nodes
    if len(reads) != 2 or not all(alike(read, node) for read in reads):
        return None
    return reads[0], reads[1]


def alike(a: Node, b: Node) -> bool:
    """Whether two values are tensors of the same shape and dtype."""
    one, other = a.meta.get("val"), b.meta.get("val")
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return same_shape(a, b) and one.dtype == other.dtype


__all__ = ["SUM", "VIEWS", "ResidualSum", "ResidualSums", "addends", "alike"]
