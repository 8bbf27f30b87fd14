"""Read values that are one of two numbers by a condition: `where(visible, 0, lowest)` and its kin.

Also what is made of them again: a comparison with a number in between is the condition itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.edit import value_of
from ..ir.pattern import bound_arguments
from ..ir.program import Node

aten = torch.ops.aten

HIDES = -1e4
"""A number added to a score that takes all weight from the key, in float64 too (exp underflows)."""

_WHERES = (
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
)
_MASKED_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_SAME_FORM = (aten.expand.default, aten.clone.default, aten.alias.default)
_COMPARES: dict[str, Callable[[float, float], bool]] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}

Number = Callable[[Any], float | None]
"""The number that an argument is (also as a tensor of one known value), or None."""


@dataclass(frozen=True)
class Choice:
    """`kept` (a value, or None for the number 0) where shown, elsewhere `fill`.

    condition: shown where it is true (false when `negated`).
    """

    condition: Node
    negated: bool
    kept: Node | None
    fill: float


def read_choice(node: Node, factor: float, number: Number) -> Choice | None:
    """The choice that `factor * node` is, if its fill hides keys."""
    sides = _sides(node)
    if sides is None:
        return None
    condition, first, second = sides
    kept, fill, negated = first, number(second), False
    if fill is None or fill * factor > HIDES:
        kept, fill, negated = second, number(first), True
    if fill is None or fill * factor > HIDES or value_of(condition).dtype != torch.bool:
        return None
    constant = number(kept)
    if constant not in (0, None) or not (constant == 0 or isinstance(kept, fx.Node)):
        return None
    return Choice(condition, negated, None if constant == 0 else kept, fill * factor)


def _sides(node: Node) -> tuple[Node, Any, Any] | None:
    """(condition, what is where it is true, what is elsewhere)."""
    if node.target in _MASKED_FILLS:
        a = bound_arguments(node)
        return a["mask"], a["value"], a["self"]
    if node.target in _WHERES:
        a = bound_arguments(node)
        return a["condition"], a["self"], a["other"]
    return None


def read_comparison(node: Node, number: Number) -> tuple[Node, bool] | None:
    """(condition, negated) that a boolean made of a value of two numbers is.

    For example of `where(visible, 0, lowest) < -1`, and of the same value cast to boolean.
    """
    if node.op != "call_function" or value_of(node).dtype != torch.bool:
        return None
    test = _test(node, number)
    value: Any = node.args[0]
    while test is not None and isinstance(value, fx.Node) and value.target in _SAME_FORM:
        value = value.args[0]
    sides = _sides(value) if test is not None and isinstance(value, fx.Node) else None
    if test is None or sides is None:
        return None
    numbers = [number(side) for side in sides[1:]]
    if None in numbers or value_of(sides[0]).dtype != torch.bool:
        return None
    first, second = (test(n) for n in numbers if n is not None)
    return (sides[0], second) if first != second else None


def _test(node: Node, number: Number) -> Callable[[float], bool] | None:
    """The function of one number that a comparison or a cast to boolean is."""
    if node.target is aten._to_copy.default:
        return bool
    name = getattr(getattr(node.target, "_schema", None), "name", "").split("::")[-1]
    compare = _COMPARES.get(name)
    bound = number(node.args[1]) if compare is not None and len(node.args) > 1 else None
    if compare is None or bound is None:
        return None
    return lambda value: compare(value, bound)


def read_inverse(node: Node, factor: float, number: Number) -> tuple[Node, bool, float] | None:
    """(visible, negated, fill) of `(1 - cast(visible)) * fill`."""
    other = number(node.args[1])
    inner: Any = node.args[0]
    if other is None or other * factor > HIDES or not isinstance(inner, fx.Node):
        return None
    if inner.target is aten.rsub.Scalar and inner.args[1] == 1:
        cast: Any = inner.args[0]
        if isinstance(cast, fx.Node) and cast.target is aten._to_copy.default:
            source: Any = cast.args[0]
            if value_of(source).dtype == torch.bool:
                return source, False, other * factor
    return None
