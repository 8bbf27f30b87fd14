"""Canonical spellings of copies, casts, arithmetic, boolean logic and filled tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..ir.edit import value_of
from ..ir.look_through import widened
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from .spelling import Outcome, Same, Spelled, arguments, calls, is_tensor, same_type

aten = torch.ops.aten


def copy_of(node: Node) -> Outcome:
    """clone, alias, detach, lift_fresh_copy, contiguous: the value, in a functional program."""
    source = arguments(node)[0]
    assert isinstance(source, Node)
    returned = any(user.op == "output" for user in node.users)
    if returned and source.op != "call_function":  # the caller must not be given our own memory
        return None
    return Same(source)


def cast(node: Node) -> Outcome:
    """A cast to what a value is does nothing; a cast back from a wider type neither."""
    source, value = arguments(node)[0], value_of(node)
    assert isinstance(source, Node)
    while calls(source, aten._to_copy.default):
        inner = widened(source)
        if inner is None:
            break
        source = inner
    was = value_of(source)
    if (was.dtype, was.device) == (value.dtype, value.device):
        return Same(source)
    if was.device != value.device:
        return None
    return Spelled(aten._to_copy.default, (source,), {"dtype": value.dtype})


def dropout(node: Node) -> Outcome:
    given = bound_arguments(node)
    return Same(arguments(node)[0]) if not given["train"] or given["p"] == 0 else None


def times(node: Node) -> Outcome:
    """x * 1 and x / 1 where the type stays."""
    source, factor = arguments(node)[0], arguments(node)[1]
    if _number(source) and is_tensor(factor) and calls(node, aten.mul.Tensor):
        source, factor = factor, source
    if _number(factor) and factor == 1 and same_type(node, source):
        return Same(source)
    return _tensor_overload(node)


def plus(node: Node) -> Outcome:
    """x + 0 for integers, x - 0 for all: -0.0 + 0 is 0.0, another bit pattern."""
    source, term = arguments(node)[0], arguments(node)[1]
    if calls(node, aten.add.Tensor, aten.add.Scalar) and value_of(node).is_floating_point():
        return _tensor_overload(node)
    if _number(term) and term == 0 and same_type(node, source):
        return Same(source)
    return _tensor_overload(node)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_OVERLOADS: dict[Any, Any] = {
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
}


def _tensor_overload(node: Node) -> Outcome:
    given = bound_arguments(node)
    named = {"alpha": given["alpha"]} if given.get("alpha", 1) != 1 else {}
    return Spelled(_OVERLOADS.get(node.target, node.target), tuple(arguments(node)[:2]), named)


def power(node: Node) -> Outcome:
    if arguments(node)[1] == 1 and same_type(node, arguments(node)[0]):
        return Same(arguments(node)[0])
    return None


def square(node: Node) -> Outcome:
    return Spelled(aten.pow.Tensor_Scalar, (arguments(node)[0], 2))


def logic(node: Node) -> Outcome:
    """Bitwise and logical operators on booleans are one; `and` with an all-true value is none."""
    if not all(value_of(a).dtype == torch.bool for a in node.all_input_nodes):
        return None
    target: Any = _LOGIC[node.target]
    if target is aten.logical_not.default:
        return Spelled(target, (arguments(node)[0],))
    neutral = target is aten.logical_and.default
    values = arguments(node)
    for kept, other in (values, values[::-1]):
        removable = calls(other, aten.full.default) and other.args[1] is neutral
        if removable and same_type(node, kept):
            return Same(kept)
    return Spelled(target, tuple(arguments(node))) if len(node.all_input_nodes) == 2 else None


_LOGIC: dict[Any, Any] = {
    aten.__and__.Tensor: aten.logical_and.default,
    aten.bitwise_and.Tensor: aten.logical_and.default,
    aten.logical_and.default: aten.logical_and.default,
    aten.__or__.Tensor: aten.logical_or.default,
    aten.bitwise_or.Tensor: aten.logical_or.default,
    aten.logical_or.default: aten.logical_or.default,
    aten.bitwise_not.default: aten.logical_not.default,
    aten.logical_not.default: aten.logical_not.default,
}


def filled(node: Node) -> Outcome:
    """zeros, ones, new_full and their like are `full`, where the sizes stand in the call."""
    given, value = bound_arguments(node), value_of(node)
    sizes = given.get("size")
    if sizes is None:
        sizes = list(value.shape)
        if not all(isinstance(size, int) for size in sizes):
            return None
    fill = given.get("fill_value", _FILLS[node.target])
    if fill is None or isinstance(fill, Node):
        return None
    if value.dtype == torch.bool:
        fill = bool(fill)
    named = {"dtype": value.dtype, "device": value.device}
    return Spelled(aten.full.default, (sizes, fill), named)


_FILLS: dict[Any, float | None] = {
    aten.zeros.default: 0,
    aten.ones.default: 1,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.new_full.default: None,
    aten.full_like.default: None,
    aten.full.default: None,
}


def count_up(node: Node) -> Outcome:
    """arange from 0 by 1 is arange(end)."""
    given, value = bound_arguments(node), value_of(node)
    plain = given.get("start", 0) == 0 and given.get("step", 1) == 1
    end = given["end"]
    if not plain or not isinstance(end, (int, Node)):
        return None
    return Spelled(aten.arange.default, (end,), {"dtype": value.dtype, "device": value.device})


def renamed(node: Node) -> Outcome:
    """One name for operators that ATen has under two."""
    target: Any = node.target
    main: Any = getattr(aten, _NAMES[target._schema.name.split("::")[1]])
    return Spelled(getattr(main, target._overloadname), tuple(arguments(node)), dict(node.kwargs))


_NAMES = {
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "negative": "neg",
    "concat": "cat",
    "concatenate": "cat",
    "special_erf": "erf",
    "special_expit": "sigmoid",
    "linalg_matmul": "matmul",
}


def _renamings() -> dict[Any, Callable[[Node], Outcome]]:
    found: dict[Any, Callable[[Node], Outcome]] = {}
    for other, main in _NAMES.items():
        packet: Any = getattr(aten, other)
        for name in set(packet.overloads()) & set(getattr(aten, main).overloads()):
            if not name.endswith("out"):
                found[getattr(packet, name)] = renamed
    return found


COPIES = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
)
_CASTS = (
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.type_as.default,
)

VALUE_RULES: dict[Any, Callable[[Node], Outcome]] = {
    **_renamings(),
    **dict.fromkeys(COPIES, copy_of),
    **dict.fromkeys(_CASTS, cast),
    aten.dropout.default: dropout,
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), times),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), times),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), plus),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), plus),
    aten.pow.Tensor_Scalar: power,
    aten.square.default: square,
    **dict.fromkeys(_LOGIC, logic),
    **dict.fromkeys(_FILLS, filled),
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), count_up),
}
