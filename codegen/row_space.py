"""Values as rows and columns: the iteration space of fused kernels, and how operands lie in it.

The last axis of a value are its columns, all others together its rows in row-major order, so a
[batch, length, width] value and its flattened [batch * length, width] have one space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..ir.edit import same_size

Form = Literal["rows", "vector", "general"]
Size = Any
"""An int or a SymInt."""


@dataclass(frozen=True)
class Space:
    """Rows and columns, as integers or symbolic expressions, so that equal spaces are equal."""

    rows: Any
    columns: Any

    def joins(self, other: Space) -> bool:
        """Whether values of the two can be in one kernel: a single column goes with any."""
        alone = 1 in (self.columns, other.columns)
        return self.rows == other.rows and (self.columns == other.columns or alone)


def space_of(value: Tensor) -> Space:
    """The space of a value of at least one axis."""
    return Space(expression(product(value.shape[:-1])), expression(value.shape[-1]))


def product(sizes: Sequence[Size]) -> Size:
    result: Size = 1
    for size in sizes:
        result = size if isinstance(result, int) and result == 1 else result * size
    return result


def expression(size: Size) -> Any:
    """An int, or the sympy expression of a SymInt."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def form_of(operand: Tensor, shape: Sequence[Size]) -> Form:
    """How an operand is broadcast to a reader's shape.

    rows: it has every row of its own; vector: all rows read the same; general: some leading axes
    are broadcast and others are not.
    """
    lead, own = list(shape[:-1]), list(operand.shape[:-1])
    own = [1] * (len(lead) - len(own)) + own
    if all(is_one(size) for size in own):
        return "rows" if all(is_one(size) for size in lead) and operand.dim() > 1 else "vector"
    if all(same_size(a, b) for a, b in zip(own, lead, strict=True)):
        return "rows"
    return "general"


def broadcast_axes(operand: Tensor, shape: Sequence[Size]) -> list[int]:
    """The leading axes of the reader's shape along which the operand has values of its own."""
    missing = len(shape) - operand.dim()
    return [
        axis
        for axis in range(len(shape) - 1)
        if axis >= missing and not is_one(operand.shape[axis - missing])
    ]
