"""Read attention scores backwards: from the softmax to the product of queries and keys.

On the way lie scales, a soft cap, masks and biases in any order, learned sinks, casts, and reshapes
that join or part batch and heads. Each is recorded; what is not understood ends the reading with
one sentence.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..ir.edit import same_shape, same_size, shape, value_of
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from .mask_choice import read_choice
from .mask_parts import ABSORBS
from .prove_mask import Masking

aten = torch.ops.aten

PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
COPIES = (aten._to_copy.default, aten.clone.default, aten.alias.default, aten.type_as.default)
_MUL_DIV = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


_FLOORS = (
    aten.maximum.default,
    aten.max.other,
    aten.clamp_min.default,
    aten.clamp_min.Tensor,
    aten.clamp.default,
)


class Unreadable(Exception):
    """The scores hold something that attention does not have; the message says what."""


@dataclass
class Scores:
    """What was read. interior: every value on the way, which only the attention may read.

    maskings: in the order in which they were applied. factors: values [.., 1] that multiply (or,
    if true, divide) all scores of a query. floor: the least that a masked score is let be.
    """

    product: Node
    scale: float = 1.0
    factors: list[tuple[Node, bool]] = field(default_factory=list[tuple[Node, bool]])
    floor: float | None = None
    softcap: float = 0.0
    maskings: list[Masking] = field(default_factory=list[Masking])
    sinks: Node | None = None
    interior: list[Node] = field(default_factory=list[Node])


def read_scores(node: Node, number: Callable[[Any], float | None]) -> Scores:
    """The scores that a softmax reads; raises Unreadable with a sentence."""
    return _Reader(number).read(node, 1.0)


def times_number(node: Node, number: Callable[[Any], float | None]) -> tuple[Node, float] | None:
    """(x, c) of c * x or x / c with a known number c."""
    if node.target not in _MUL_DIV:
        return None
    a, b = node.args[0], node.args[1]
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    found: tuple[Node, float] | None = None
    if isinstance(a, fx.Node) and (value := number(b)) is not None and not (divides and not value):
        found = a, 1.0 / value if divides else value
    elif not divides and isinstance(b, fx.Node) and (value := number(a)) is not None:
        found = b, value
    return found if found is not None and same_shape(found[0], node) else None


class _Reader:
    def __init__(self, number: Callable[[Any], float | None]) -> None:
        self.number = number
        self.cap = 0.0

    def read(self, node: Node, factor: float) -> Scores:
        """Read `factor * node`."""
        if node.target in PRODUCTS:
            return self._product(node, factor)
        step = self._step(node, factor)
        scores = self.read(*step)
        scores.interior.append(node)
        self._mask(node, factor, scores, step[0])
        return scores

    def _step(self, node: Node, factor: float) -> tuple[Node, float]:
        """The value under this one and the factor on it."""
        source: Any = node.args[0] if node.args else None
        if node.op != "call_function" or source is None:
            raise Unreadable(f"the scores come from %{node.name}, not from a product")
        scaled = times_number(node, self.number)
        if scaled is not None:
            return scaled[0], factor * scaled[1]
        if node.target in COPIES or _dropout_off(node):
            return source, factor
        if (broad := _times_factor(node)) is not None:
            return broad[0], factor
        if (low := self._floor(node)) is not None and factor > 0 and low[1] * factor <= ABSORBS:
            return low[0], factor
        if node.target is aten.reshape.default:
            if not _joins_or_parts_heads(node, source):
                raise Unreadable("the scores are reshaped across queries or keys")
            return source, factor
        if node.target is aten.tanh.default:
            if self.cap:
                raise Unreadable("the scores pass through two soft caps")
            self.cap = factor
            return source, 1.0
        if node.target in (aten.sub.Tensor, aten.add.Tensor):
            return self._summand(node, factor)
        choice = read_choice(node, factor, self.number)
        if choice is not None and choice.kept is not None:
            return choice.kept, factor
        if node.target is aten.cat.default and factor == 1.0 and not self.cap:
            return node.args[0][0], factor  # type: ignore[index,return-value]
        raise Unreadable(f"the scores pass through {_name(node)}, which attention does not have")

    def _summand(self, node: Node, factor: float) -> tuple[Node, float]:
        a, b = node.args[0], node.args[1]
        if bound_arguments(node).get("alpha", 1) != 1:
            raise Unreadable("a mask is added with a weight")
        if not isinstance(a, fx.Node):
            raise Unreadable(f"the scores are subtracted from {a}")
        if node.target is aten.sub.Tensor and _greatest_of(b) is a:
            return a, factor
        if not isinstance(b, fx.Node):
            return a, factor  # softmax does not see one number added to every score
        if self._holds_product(a):
            return a, factor
        if node.target is aten.add.Tensor and isinstance(b, fx.Node) and self._holds_product(b):
            return b, factor
        raise Unreadable("neither side of a sum of scores is a product of queries and keys")

    def _holds_product(self, node: Node) -> bool:
        before = self.cap
        try:
            self.read(node, 1.0)
        except Unreadable:
            return False
        finally:
            self.cap = before
        return True

    def _mask(self, node: Node, factor: float, scores: Scores, under: Node) -> None:
        """Record what this node does to the scores besides scaling them."""
        space = len(shape(node))
        masking: Masking | None = None
        if node.target in (aten.add.Tensor, aten.sub.Tensor):
            other: Any = node.args[1] if node.args[0] is under else node.args[0]
            if _greatest_of(other) is under:
                scores.interior += [other, *(n for n in other.all_input_nodes if n is not under)]
            elif isinstance(other, fx.Node):
                sign = -1.0 if node.target is aten.sub.Tensor else 1.0
                masking = Masking(other, factor * sign, space=space)
        elif node.target is aten.tanh.default:
            if scores.maskings:
                raise Unreadable("a mask is applied under the soft cap")
            if factor <= 0:
                raise Unreadable(f"the soft cap {factor:g} is not positive")
            # factor * tanh(g * q k) is the soft cap `factor` on scores of scale g * factor
            scores.softcap, scores.scale = factor, scores.scale * factor
        elif node.target is aten.cat.default:
            scores.sinks = _sinks(node)
        elif (broad := _times_factor(node)) is not None:
            self._factor(node, broad[1], broad[2], scores)
        elif (low := self._floor(node)) is not None:
            scores.floor = low[1] * factor
        elif times_number(node, self.number) is None:
            choice = read_choice(node, factor, self.number)
            if choice is not None:
                masking = Masking(choice.condition, 1.0, choice.fill, choice.negated, space)
        if masking is not None and not same_shape(node, under):
            raise Unreadable("a mask has more examples or heads than the scores")
        if masking is not None and scores.sinks is not None:
            raise Unreadable("a mask is applied to the sinks too")
        if masking is not None and scores.floor is not None:
            raise Unreadable("a mask is applied to scores that have a floor")
        if masking is not None:
            scores.maskings.append(masking)

    def _factor(self, node: Node, factor: Node, divides: bool, scores: Scores) -> None:
        if scores.maskings or scores.softcap or scores.sinks or scores.floor is not None:
            raise Unreadable("masked or capped scores are multiplied by a tensor")
        if len(shape(node)) != 4 or len(shape(scores.product)) != 4:
            raise Unreadable("scores without an axis of heads are multiplied by a tensor")
        scores.factors.append((factor, divides))

    def _floor(self, node: Node) -> tuple[Node, float] | None:
        """(x, c) of max(x, c) with a known number c."""
        if node.target not in _FLOORS or not isinstance(node.args[0], fx.Node):
            return None
        low = self.number(node.args[1]) if len(node.args) == 2 else None
        if low is None or not same_shape(node, node.args[0]):
            return None
        return node.args[0], low

    def _product(self, node: Node, factor: float) -> Scores:
        scores = Scores(node, factor, interior=[node])
        if node.target is aten.baddbmm.default:
            arguments = bound_arguments(node)
            scores.scale = factor * arguments["alpha"]
            weight = factor * arguments["beta"]
            if weight:
                scores.maskings.append(Masking(arguments["self"], weight, space=3))
        return scores


def _times_factor(node: Node) -> tuple[Node, Node, bool] | None:
    """(x, t, divides) of x * t or x / t, where t has one number for all keys of a query."""
    divides = node.target is aten.div.Tensor
    if node.target is not aten.mul.Tensor and not divides:
        return None
    pair = (node.args[0], node.args[1])
    for x, t in (pair,) if divides else (pair, pair[::-1]):
        if not isinstance(x, fx.Node) or not isinstance(t, fx.Node) or not same_shape(x, node):
            continue
        sizes, alike = shape(t), value_of(t).dtype == value_of(node).dtype
        if alike and sizes and sizes[-1] == 1 and len(sizes) <= len(shape(x)):
            return x, t, divides
    return None


def _greatest_of(node: Any) -> Node | None:
    """The value whose greatest element along the last axis this is."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is operator.getitem and node.args[1] == 0:
        inner: Any = node.args[0]
        node = inner if inner.target is aten.max.dim else node
    if node.target in (aten.max.dim, aten.amax.default):
        a = bound_arguments(node)
        dims = a["dim"] if isinstance(a["dim"], (list, tuple)) else [a["dim"]]
        rank = len(shape(a["self"]))
        if a["keepdim"] and [d % rank for d in dims] == [rank - 1]:
            return a["self"]
    return None


def _sinks(node: Node) -> Node:
    """The [heads] logits of `cat([scores, expand(reshape(sinks, [1, heads, 1, 1]))], last)`."""
    a = bound_arguments(node)
    rank = len(shape(node))
    if len(a["tensors"]) != 2 or a["dim"] % rank != rank - 1 or rank != 4:
        raise Unreadable("the scores are joined with other scores")
    column: Any = a["tensors"][1]
    if column.target is aten.expand.default:
        column = column.args[0]
    while column.target in (aten.reshape.default, aten.unsqueeze.default):
        column = column.args[0]
    if len(shape(column)) != 1 or not same_size(shape(column)[0], shape(node)[1]):
        raise Unreadable("the scores are joined with a value that is not one logit a head")
    return column


def _joins_or_parts_heads(node: Node, source: Node) -> bool:
    a, b = shape(node), shape(source)
    if {len(a), len(b)} - {3, 4} or len(a) == len(b):
        return False
    return all(same_size(x, y) for x, y in zip(a[-2:], b[-2:], strict=True))


def _dropout_off(node: Node) -> bool:
    if node.target is not aten.dropout.default:
        return False
    return bool(not node.args[2] or node.args[1] == 0)


def _name(node: Node) -> str:
    return getattr(getattr(node.target, "_schema", None), "name", str(node.target)).split("::")[-1]
