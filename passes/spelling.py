"""What a canonicalization rule may say about a node, and how it reads the node's arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.edit import same_size, shape
from ..ir.program import Node

FAR = torch.iinfo(torch.int64).max
"""The end of a slice that has none."""


@dataclass(frozen=True)
class Same:
    """The node's value is another node's value."""

    node: Node


@dataclass(frozen=True)
class Known:
    """The node's value is this integer."""

    value: int


@dataclass(frozen=True)
class Spelled:
    """The same value, written with another operator or other arguments."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])


Outcome = Same | Known | Spelled | None


def is_tensor(value: Any) -> bool:
    """Whether an argument is a node that holds one tensor."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)


def calls(node: Any, *targets: Any) -> bool:
    """Whether an argument is a call of one of these operator overloads."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def arguments(node: Node) -> tuple[Any, ...]:
    """The node's positional arguments."""
    return node.args


def rank(node: Node) -> int:
    return len(shape(node))


def axis(dim: int, of: int) -> int:
    """An axis counted from the front."""
    return dim % of if of else 0


def size_value(size: Any) -> Any:
    """A size argument: an int, or the SymInt that its node carries."""
    return size.meta.get("val") if isinstance(size, fx.Node) else size


def equal_size(a: Any, b: Any) -> bool:
    """Whether two size arguments are provably equal."""
    left, right = size_value(a), size_value(b)
    if not isinstance(left, (int, torch.SymInt)) or not isinstance(right, (int, torch.SymInt)):
        return False
    return same_size(left, right)


def same_type(a: Node, b: Node) -> bool:
    """The same dtype, the same device and provably the same sizes."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    if x.dtype != y.dtype or x.device != y.device or x.dim() != y.dim():
        return False
    return all(same_size(m, n) for m, n in zip(x.shape, y.shape, strict=True))
