"""Read a spelled-out rotary embedding: which value is turned, in which pairs, by which tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from ..ir.edit import same_shape, shape
from ..ir.look_through import same_value, sole_reader
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from .spelling import arguments, axis, calls, rank

aten = torch.ops.aten


@dataclass(frozen=True)
class Turn:
    """A value turned by tables.

    x: the value, or its two parts, which are to be brought together as the result is. wide: the
    tables hold each angle twice. root: the result. sizes: those that x is to be reshaped to first.
    backwards: by the negative angle.
    """

    root: Node
    x: Node | tuple[Node, Node]
    cos: Node
    sin: Node
    interleaved: bool
    wide: bool
    sizes: Any = None
    backwards: bool = False


def read_sum(root: Node) -> Turn | str | None:
    """x * cos + turned(x) * sin; turned(x) is (-b, a) or (b, -a) for the pairs (a, b) of x."""
    if not calls(root, aten.add.Tensor) or bound_arguments(root)["alpha"] != 1:
        return None
    left, right = arguments(root)
    if not calls(left, aten.mul.Tensor) or not calls(right, aten.mul.Tensor):
        return None
    fault: str | None = None
    for straight, turned in ((left, right), (right, left)):
        for quarter, sin in _orders(turned):
            pair = _quarter_turn(quarter)
            if pair is None:
                continue
            first, second, interleaved = pair
            backwards = not calls(first, aten.neg.default)
            one, two = (arguments(second)[0], first) if backwards else (second, arguments(first)[0])
            read = read_pair(one, two)
            for x, cos in _orders(straight):
                if read and read[1] == interleaved and _is_window(x, read):
                    return Turn(root, x, cos, sin, interleaved, True, backwards=backwards)
            fault = "the turned value is not made of the two halves of what the cosine multiplies"
    return fault


def _orders(node: Node) -> Iterator[tuple[Any, Any]]:
    left, right = arguments(node)
    yield left, right
    yield right, left


def _quarter_turn(value: Any) -> tuple[Node, Node, bool] | None:
    """(-b, a, interleaved) of cat([-b, a]) or of stack([-b, a], -1) reshaped; or one of b, -a."""
    parts = joined(value)
    if parts is None:
        return None
    first, second, interleaved = parts
    negated = [calls(part, aten.neg.default) for part in (first, second)]
    return (first, second, interleaved) if sum(negated) == 1 else None


def joined(value: Any) -> tuple[Node, Node, bool] | None:
    """The two values that a cat (False) or a stack of pairs (True) brings together on an axis."""
    if calls(value, aten.cat.default):
        parts, dim = value.args[0], bound_arguments(value)["dim"]
        if len(parts) == 2 and axis(dim, rank(value)) == rank(value) - 1:
            return parts[0], parts[1], False
        return None
    if not calls(value, aten.reshape.default) or not calls(value.args[0], aten.stack.default):
        return None
    stack = value.args[0]
    parts, dim = stack.args[0], axis(bound_arguments(stack)["dim"], rank(stack))
    merges = rank(value) == rank(stack) - 1 and shape(value)[-1] == 2 * shape(stack)[-2]
    if len(parts) == 2 and dim == rank(stack) - 1 and merges:
        return parts[0], parts[1], True
    return None


Pair = tuple[Node, bool, int, int]
"""What two parts are taken from, whether every second channel, the first channel, the width."""


def read_pair(a: Any, b: Any) -> Pair | None:
    """The source whose channels are the pairs (a, b): its halves, or its even and odd ones."""
    if calls(a, aten.slice.Tensor) and calls(b, aten.slice.Tensor):
        return _sliced_pair(a, b)
    if calls(a, aten.select.int) and calls(b, aten.select.int):
        return _selected_pair(a, b)
    return None


def _sliced_pair(a: Node, b: Node) -> Pair | None:
    one, two = bound_arguments(a), bound_arguments(b)
    source, last = one["self"], rank(a) - 1
    width = shape(a)[-1]
    if not same_value(source, two["self"]) or (one["dim"], two["dim"]) != (last, last):
        return None
    start, steps = one["start"], (one["step"], two["step"])
    if not isinstance(start, int) or not isinstance(width, int) or shape(b)[-1] != width:
        return None
    if steps == (1, 1) and two["start"] == start + width:
        return source, False, start, 2 * width
    if steps == (2, 2) and two["start"] == start + 1:
        return source, True, start, 2 * width
    return None


def _selected_pair(a: Node, b: Node) -> Pair | None:
    """The parts 0 and 1 of a last (or last but one) axis of size two that a reshape split off."""
    (split, dim, first), (other, other_dim, second) = arguments(a), arguments(b)
    if not same_value(split, other) or dim != other_dim or (first, second) != (0, 1):
        return None
    if not calls(split, aten.reshape.default) or shape(split)[dim] != 2:
        return None
    source, width = split.args[0], 2 * shape(a)[-1]
    if rank(source) != rank(a) or shape(source)[-1] != width or dim < rank(split) - 2:
        return None
    return source, dim == rank(split) - 1, 0, width


def _is_window(x: Any, pair: Pair) -> bool:
    """Whether x is the channels of the source that the pairs cover."""
    source, _, start, width = pair
    if not isinstance(x, Node) or rank(x) == 0 or shape(x)[-1] != width:
        return False
    if same_value(x, source):
        return start == 0
    if not calls(x, aten.slice.Tensor):
        return False
    given = bound_arguments(x)
    at = (given["dim"], given["start"], given["step"])
    return same_value(given["self"], source) and at == (rank(x) - 1, start, 1)


def read_parts(root: Node) -> Turn | str | None:
    """(a cos - b sin, b cos + a sin), brought together by cat or by stack."""
    parts = joined(root)
    if (
        parts is None
        or not calls(parts[0], aten.sub.Tensor)
        or not calls(parts[1], aten.add.Tensor)
    ):
        return None
    low, high, together = parts
    products = (*arguments(low), *arguments(high))
    if not all(calls(value, aten.mul.Tensor) for value in products):
        return None
    for (a, cos), (b, sin) in product(_orders(products[0]), _orders(products[1])):
        if not _crossed(products[2], products[3], a, b, cos, sin) or not same_shape(a, b):
            continue
        pair = read_pair(a, b)
        if pair is not None and pair[1] == together and _is_window(pair[0], pair):
            return Turn(root, pair[0], cos, sin, together, wide=False)
        sizes = arguments(root)[1] if together else None
        return Turn(root, (a, b), cos, sin, together, wide=False, sizes=sizes)
    return "its two parts do not turn one pair of values by one angle"


def _crossed(one: Node, two: Node, a: Any, b: Any, cos: Any, sin: Any) -> bool:
    """Whether the products are b cos and a sin, in any order."""

    def is_product(node: Node, x: Any, y: Any) -> bool:
        return any(same_value(p, x) and same_value(q, y) for p, q in _orders(node))

    return (is_product(one, b, cos) and is_product(two, a, sin)) or (
        is_product(two, b, cos) and is_product(one, a, sin)
    )


def read_complex(root: Node) -> Turn | None:
    """view_as_real(view_as_complex(pairs of x) * table), flattened."""
    if not calls(root, aten.reshape.default) or not calls(
        arguments(root)[0], aten.view_as_real.default
    ):
        return None
    turned = arguments(arguments(root)[0])[0]
    if not calls(turned, aten.mul.Tensor):
        return None
    for value, table in _orders(turned):
        if not calls(value, aten.view_as_complex.default):
            continue
        pairs: Node = value.args[0]
        flat = rank(pairs) == rank(root) + 1 and shape(root)[-1] == 2 * shape(pairs)[-2]
        if not flat:
            continue
        x = arguments(pairs)[0] if calls(pairs, aten.reshape.default) else pairs
        sizes = None if same_shape(x, root) else arguments(root)[1]
        return Turn(root, x, table, table, interleaved=True, wide=True, sizes=sizes)
    return None


def partial(turn: Turn) -> Turn:
    """The turn with the channels that it lets pass, where a cat brings both together."""
    reader = sole_reader(turn.root)
    parts = joined(reader)
    x = turn.x
    if reader is None or parts is None or parts[2] or parts[0] is not turn.root:
        return turn
    if not isinstance(x, Node) or not calls(x, aten.slice.Tensor):
        return turn
    given, rest = bound_arguments(x), parts[1]
    source, width = given["self"], shape(x)[-1]
    if given["start"] != 0 or given["step"] != 1 or not calls(rest, aten.slice.Tensor):
        return turn
    passed = bound_arguments(rest)
    at = (passed["dim"], passed["start"], passed["step"])
    follows = same_value(passed["self"], source) and at == (rank(x) - 1, width, 1)
    if follows and same_shape(reader, source):
        return replace(turn, root=reader, x=source)
    return turn
