"""How each weight is used: by which matmuls, along which axis, or as a table of rows.

Found in the graph, never in names: a weight that `linear` reads sums over its last axis, one that
`addmm` or `matmul` reads on the right sums over its second last, one that `embedding` reads is a
table whose rows are looked up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .pattern import bound_arguments
from .program import Node, Program

_ATEN = torch.ops.aten
# operator: (schema name of the weight argument, axis of the weight that is summed over)
_READERS: dict[Any, tuple[str, int]] = {
    _ATEN.linear.default: ("weight", -1),
    _ATEN.addmm.default: ("mat2", -2),
    _ATEN.mm.default: ("mat2", -2),
    _ATEN.bmm.default: ("mat2", -2),
    _ATEN.baddbmm.default: ("batch2", -2),
    _ATEN.matmul.default: ("other", -2),
}
_TRANSPOSES = {_ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default}


@dataclass
class Role:
    """How one weight is read.

    matmuls: the reading matmuls; axis: the axis they sum over (-1: [out, in], -2: [in, out]), or
    None if they disagree; tables: reading embeddings; others: readers of any other kind.
    """

    name: str
    node: Node
    matmuls: list[Node] = field(default_factory=list[Node])
    axes: set[int] = field(default_factory=set[int])
    tables: list[Node] = field(default_factory=list[Node])
    others: list[Node] = field(default_factory=list[Node])

    @property
    def axis(self) -> int | None:
        if self.tables and not self.axes:
            return -1
        return next(iter(self.axes)) if len(self.axes) == 1 else None

    @property
    def value(self) -> Tensor:
        return self.node.meta["val"]


def weight_roles(program: Program) -> list[Role]:
    """The role of every floating-point weight of two or more axes, in graph order."""
    roles: list[Role] = []
    for node in program.weight_nodes():
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() >= 2 and value.is_floating_point():
            role = Role(str(node.target), node)
            _follow(node, node, role, flipped=False)
            roles.append(role)
    return roles


def _follow(start: Node, seen: Node, role: Role, flipped: bool) -> None:
    for user in start.users:
        reader = _READERS.get(user.target)
        if reader is not None and bound_arguments(user)[reader[0]] is start:
            axis = reader[1]
            role.matmuls.append(user)
            role.axes.add(-3 - axis if flipped else axis)
        elif user.target is _ATEN.embedding.default and user.args[0] is start and not flipped:
            role.tables.append(user)
        elif user.target in _TRANSPOSES and _swaps_last_two(user):
            _follow(user, user, role, not flipped)
        else:
            role.others.append(user)


def _swaps_last_two(node: Node) -> bool:
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    if node.target is _ATEN.t.default:
        return rank == 2
    if node.target is _ATEN.transpose.int:
        first, second = node.args[1], node.args[2]
        return {first % rank, second % rank} == {rank - 2, rank - 1}  # type: ignore[operator]
    order = [axis % rank for axis in node.args[1]]  # type: ignore[union-attr,operator]
    return order == [*range(rank - 2), rank - 1, rank - 2]
