"""Which rows of its arguments an operation needs for some rows of its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.program import Node

aten = torch.ops.aten
COUNTS = {aten.arange.default, aten.arange.start, aten.arange.start_step}
_ELEMENTWISE = {
    aten._to_copy.default,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.floor_divide.default,
}
Axes = tuple[int, ...]


@dataclass(frozen=True)
class RowSources:
    """A call of which some rows are wanted: for each argument, the axes to take rows of.

    sizes: for each entry of a list of sizes (argument 0 or 1), whether it is one of the rows'.
    """

    node: Node
    axes: dict[Node, Axes]
    sizes: tuple[bool, ...] = ()

    def arguments(
        self,
        given: tuple[Any, ...],
        rows: Callable[[Node, Axes], Node],
        size: Callable[[Any, bool], Any],
    ) -> tuple[Any, ...]:
        """The arguments of the call that computes those rows alone, of those it was given.

        size: gives a size argument's form, told whether it is one of the rows.
        """

        def read(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [read(item) for item in value]  # type: ignore[misc]
            if isinstance(value, fx.Node) and value in self.axes:
                return rows(value, self.axes[value])
            return size(value, False)

        args = [read(value) for value in given]
        if self.sizes:
            place = 0 if self.node.target is aten.full.default else 1
            pairs = zip(given[place], self.sizes, strict=True)
            args[place] = [size(entry, of_rows) for entry, of_rows in pairs]
        return tuple(args)


def row_sources(node: Node, axes: Axes) -> RowSources | None:
    """None where rows of the result are not made of rows of the arguments in a way known here."""
    if _is_elementwise(node):
        return RowSources(node, {x: _aligned(x, node, axes) for x in _tensors(node)})
    source: Any = node.args[0] if node.args else None
    rank = _rank(node)
    if node.target is aten.unsqueeze.default:
        added = int(node.args[1]) % rank  # type: ignore[arg-type]
        return RowSources(node, {source: tuple(a - (a > added) for a in axes)})
    if node.target is aten.transpose.int:
        a, b = (int(x) % rank for x in node.args[1:3])  # type: ignore[arg-type]
        swap = {a: b, b: a}
        return RowSources(node, {source: tuple(swap.get(axis, axis) for axis in axes)})
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return RowSources(node, {source: tuple(int(order[axis]) % rank for axis in axes)})
    if node.target is aten.embedding.default and rank - 1 not in axes:
        return RowSources(node, {node.args[1]: axes})  # type: ignore[dict-item]
    if node.target is aten.slice.Tensor and int(node.args[1]) % rank not in axes:  # type: ignore[arg-type]
        return RowSources(node, {source: axes})
    if node.target is aten.cat.default:
        joined = int(node.args[1]) % rank if len(node.args) > 1 else 0  # type: ignore[arg-type]
        return None if joined in axes else RowSources(node, dict.fromkeys(source, axes))
    if node.target is aten.full.default:
        return RowSources(node, {}, tuple(axis in axes for axis in range(rank)))
    if node.target is aten.expand.default:
        rows = tuple(axis in axes for axis in range(rank))
        return RowSources(node, {source: _aligned(source, node, axes)}, rows)
    return _indexed(node, axes) if node.target is aten.index.Tensor else None


def _indexed(node: Node, axes: Axes) -> RowSources | None:
    """index(source, [i, j, ...]): the first axes are those of the indices, broadcast together."""
    source: Any = node.args[0]
    indices: Any = node.args[1]
    if any(
        not isinstance(index, fx.Node) or index.meta["val"].is_floating_point() for index in indices
    ):
        return None
    if any(index.meta["val"].dtype == torch.bool for index in indices):
        return None
    front = max(_rank(index) for index in indices)
    wanted = {
        index: _aligned_to(index, front, tuple(a for a in axes if a < front)) for index in indices
    }
    behind = tuple(a - front + len(indices) for a in axes if a >= front)
    if behind:
        wanted[source] = behind
    return RowSources(node, wanted)


def _is_elementwise(node: Node) -> bool:
    target: Any = node.target
    if target in _ELEMENTWISE:
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _tensors(node: Node) -> list[Node]:
    return [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), Tensor)]


def _rank(node: Node) -> int:
    return len(node.meta["val"].shape)


def _aligned(source: Node, node: Node, axes: Axes) -> Axes:
    return _aligned_to(source, _rank(node), axes)


def _aligned_to(source: Node, rank: int, axes: Axes) -> Axes:
    """The axes of a value that broadcasts to `rank` axes; where it has one row there are none."""
    behind = rank - _rank(source)
    return tuple(axis - behind for axis in axes if axis >= behind)
