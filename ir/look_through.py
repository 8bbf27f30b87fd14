"""Looking through what does not change a value: lossless casts, numbers in tensors, twins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .edit import value_of
from .program import Node

aten = torch.ops.aten

_WIDER: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
    torch.int32: (torch.int64, torch.float64),
}
"""Dtypes that hold every value of another one."""


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of `narrow` is a value of `wide`."""
    return wide == narrow or narrow == torch.bool or wide in _WIDER.get(narrow, ())


def widened(node: Any) -> Node | None:
    """What a lossless cast casts; None if the node is no such cast."""
    if not isinstance(node, fx.Node) or node.target is not aten._to_copy.default:
        return None
    source: Any = node.args[0]
    before, after = value_of(source), value_of(node)
    lossless = holds(after.dtype, before.dtype) and before.device == after.device
    return source if lossless else None


def narrowest(node: Node) -> Node:
    """The value before all lossless casts."""
    while (source := widened(node)) is not None:
        node = source
    return node


def sole_reader(node: Node) -> Node | None:
    """The only reader of a value, if there is but one and it reads it once."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    return reader if reader.all_input_nodes.count(node) == 1 and reader.op != "output" else None


def number(value: Any) -> float | None:
    """A number argument, or the number that a scalar `full` holds."""
    if isinstance(value, fx.Node) and value.target is aten.full.default and value.args[0] == []:
        value = value.args[1]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return None


def same_value(a: Any, b: Any, depth: int = 8) -> bool:
    """Whether two arguments are one value, or are computed alike from the same values."""
    if a is b:
        return True
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        pairs = list(zip(a, b, strict=False))  # type: ignore[reportUnknownArgumentType]
        return len(a) == len(b) and all(same_value(x, y, depth) for x, y in pairs)  # type: ignore[reportUnknownArgumentType]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return type(a) is type(b) and a == b
    if depth == 0 or a.op != "call_function" or a.target is not b.target or a.kwargs != b.kwargs:
        return False
    if torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ()):
        return False
    return same_value(a.args, b.args, depth - 1)


def other_factor(product: Any, node: Node) -> Any:
    """In a product of two, the one that is not `node`; None if it is no such product."""
    if not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor:
        return None
    left, right = product.args
    if left is node:
        return right
    return left if right is node else None


def is_floating(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_floating_point()
