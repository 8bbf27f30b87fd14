"""How each weight is used: by which matmuls, along which axis, or as a table of rows.

Found in the graph, never in names: a weight that `linear` reads sums over its last axis, one that
`addmm` or `matmul` reads on the right sums over its second last, one that `embedding` reads is a
table whose rows are looked up. Stacks of matrices (experts) are followed through the choice of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .pattern import bound_arguments
from .program import Node, Program

_ATEN = torch.ops.aten
# operator: the axis that it sums over, by the schema name of the argument that holds the weight
_READERS: dict[Any, dict[str, int]] = {
    _ATEN.linear.default: {"weight": -1},
    _ATEN.addmm.default: {"mat2": -2, "mat1": -1},
    _ATEN.mm.default: {"mat2": -2, "self": -1},
    _ATEN.bmm.default: {"mat2": -2, "self": -1},
    _ATEN.baddbmm.default: {"batch2": -2, "batch1": -1},
    _ATEN.matmul.default: {"other": -2, "self": -1},
}
_CHOICES = {_ATEN.index.Tensor, _ATEN.index_select.default, _ATEN.select.int}
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
            _follow(node, role, flipped=False)
            roles.append(role)
    return roles


def _follow(start: Node, role: Role, flipped: bool) -> None:
    for user in start.users:
        axis = _summed_axis(user, start)
        if axis is not None:
            role.matmuls.append(user)
            role.axes.add(-3 - axis if flipped else axis)
        elif user.target is _ATEN.embedding.default and user.args[0] is start and not flipped:
            role.tables.append(user)
        elif user.target in _TRANSPOSES and _swaps_last_two(user):
            _follow(user, role, not flipped)
        elif user.target in _CHOICES and _chooses_matrices(user, start):
            _follow(user, role, flipped)
        else:
            role.others.append(user)


def _summed_axis(user: Node, weight: Node) -> int | None:
    """The axis of `weight` that `user` sums over, if it is a matmul that reads it once."""
    places = _READERS.get(user.target, {})
    held = [name for name in places if bound_arguments(user)[name] is weight]
    return places[held[0]] if len(held) == 1 else None


def _chooses_matrices(user: Node, weight: Node) -> bool:
    """Whether `user` picks whole matrices out of a stack (experts by number)."""
    rank = weight.meta["val"].dim()
    if user.args[0] is not weight or rank < 3:
        return False
    if user.target is _ATEN.index.Tensor:
        chosen: Any = user.args[1]
        return len(chosen) <= rank - 2
    return user.args[1] % rank < rank - 2  # type: ignore[operator]


def _swaps_last_two(node: Node) -> bool:
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    if node.target is _ATEN.t.default:
        return rank == 2
    if node.target is _ATEN.transpose.int:
        first, second = node.args[1], node.args[2]
        return {first % rank, second % rank} == {rank - 2, rank - 1}  # type: ignore[operator]
    order = [axis % rank for axis in node.args[1]]  # type: ignore[union-attr,operator]
    return order == [*range(rank - 2), rank - 1, rank - 2]
