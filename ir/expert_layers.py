"""Routed layers of a program: which experts there are, and every axis that has one entry for each.

A router scores the experts, a `topk` chooses some of them for each token, and their weights are
taken from stacks [experts, ...] by the chosen numbers. From there the axis of the experts is
followed to all that has it: the router's rows, a correction bias, scores in groups. Everything is
read from the data flow; no architecture is known by name.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .expert_axes import Axis, NotFollowed, Role, sizes, ties
from .pattern import bound_arguments
from .program import Node, Program
from .text import op_text

_ATEN = torch.ops.aten
_TOPK = _ATEN.topk.default
_SAME_NUMBERS = {
    _ATEN.reshape.default,
    _ATEN.view.default,
    _ATEN._unsafe_view.default,
    _ATEN.unsqueeze.default,
    _ATEN.squeeze.dim,
    _ATEN.expand.default,
    _ATEN.clone.default,
    _ATEN.transpose.int,
    _ATEN.permute.default,
    _ATEN._to_copy.default,
    _ATEN.detach.default,
}


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one router.

    chooser: the first `topk` that chooses among them. experts: their number; groups: how many equal
    groups they are routed in (1: none). least: the fewest that routing allows. stacks: weights that
    are taken by expert number. axes: every axis with one entry for each expert (or for each of a
    group). numbers: the chosen numbers, as the first
    stack is read by them. why_not: why none may be cut, "" if they may.
    """

    chooser: Node
    experts: int
    groups: int
    least: int
    stacks: tuple[str, ...]
    numbers: Node
    axes: Mapping[Axis, Role] = field(repr=False)
    why_not: str = ""

    @property
    def module(self) -> str:
        return self.stacks[0].rpartition(".")[0]

    @property
    def weights(self) -> dict[str, int]:
        """The axis of the experts in each weight that has one."""
        return {str(value.target): axis for value, axis in self.axes if value.op == "get_attr"}


def expert_layers(program: Program) -> list[ExpertLayer]:
    """Every routed layer, in graph order; layers that share weights are one."""
    found: list[ExpertLayer] = []
    for node in program.graph.nodes:
        known = any((_scored(node) or (node, 0)) in layer.axes for layer in found)
        if node.target is _TOPK and not known and _stacks(node):
            found.append(_Follow(node).layer())
    return found


class _Follow:
    """Follows the experts that one `topk` chooses among."""

    def __init__(self, chooser: Node) -> None:
        scored = _scored(chooser)
        assert scored is not None
        self.chooser = chooser
        self.experts: int = sizes(scored[0])[scored[1]]
        self.groups = 1
        self.roles: dict[Axis, Role] = {}
        self.why_not = ""
        self.waiting: list[Axis] = []
        self._name(scored, "expert")

    def layer(self) -> ExpertLayer:
        try:
            while self.waiting:
                value, _ = self.waiting.pop()
                self._spread(value)
                for user in value.users:
                    if user.op == "call_function":
                        self._spread(user)
        except NotFollowed as stop:
            self.why_not = stop.what
        taken = _stacks(self.chooser)
        stacks = {str(stack.target): None for stack, _ in taken}
        return ExpertLayer(
            self.chooser,
            self.experts,
            self.groups,
            self._least(),
            tuple(stacks),
            taken[0][1],
            self.roles,
            self.why_not,
        )

    def _name(self, axis: Axis, role: Role) -> None:
        if self.roles.get(axis, role) != role:
            raise NotFollowed(f"%{axis[0].name} has experts and groups of them along one axis")
        if axis in self.roles:
            return
        size = sizes(axis[0])[axis[1]]
        if role == "group":
            self.groups = size
        if axis[0].op == "placeholder":
            raise NotFollowed(f"the input {axis[0].name} has an entry for each expert")
        wanted = {"expert": self.experts, "group": self.groups}.get(role, size)
        if size != wanted:
            raise NotFollowed(f"%{axis[0].name} has {size} entries for {wanted} experts")
        self.roles[axis] = role
        self.waiting.append(axis)

    def _spread(self, node: Node) -> None:
        """Name the axes of what an operation reads and gives, from those that are named."""
        if node.op != "call_function":
            return
        try:
            found = ties(node)
        except NotFollowed as stop:
            raise NotFollowed(f"{op_text(node)} %{node.name}: {stop.what}") from stop
        for a, role_a, b, role_b in found:
            self._match(a, role_a, b, role_b)
            self._match(b, role_b, a, role_a)
        self._choose(node)

    def _match(self, one: Axis, its: Role | None, other: Axis, others: Role | None) -> None:
        held = self.roles.get(one)
        if held is not None and its in (None, held):
            self._name(other, others or held)

    def _choose(self, node: Node) -> None:
        """A `topk` gives numbers of experts; what they choose from has the experts' axis."""
        if node.target is _TOPK:
            scored = _scored(node)
            role = self.roles.get(scored) if scored else None
            numbers = _numbers(node)
            if role == "member" and numbers:
                raise NotFollowed(f"%{node.name} numbers the experts of each group anew")
            for number in numbers if role == "expert" else ():
                for user in number.users:
                    if user.op == "call_function" and user.target not in _SAME_NUMBERS:
                        self._name(_chosen_from(user, number), "expert")
        for value, axis, numbers in _choices(node):
            if (value, axis) in self.roles:
                chooser = _chooser(numbers)
                if self.roles[value, axis] == "expert" and chooser is None:
                    raise NotFollowed(f"%{node.name} chooses experts by numbers of its own")
                scored = _scored(chooser) if chooser else None
                if scored and self.roles[value, axis] == "expert":
                    self._name(scored, "expert")

    def _least(self) -> int:
        """The fewest experts with which every choice finds as many as it takes."""
        least, member, chosen = 1, 1, self.groups
        for value, _ in self.roles:
            for node in value.users:
                scored = _scored(node)
                if scored is None or scored not in self.roles:
                    continue
                count = int(bound_arguments(node)["k"])
                if self.roles[scored] == "expert":
                    least = max(least, count)
                elif self.roles[scored] == "member":
                    member = max(member, count)
                else:
                    chosen = min(chosen, count)
        if self.groups == 1:
            return least
        return self.groups * max(member, -(-least // chosen))


# what chooses, and what is chosen from


def _scored(node: Node) -> Axis | None:
    """The axis along which a `topk` chooses."""
    if node.target is not _TOPK:
        return None
    given = bound_arguments(node)
    return given["self"], given["dim"] % len(sizes(given["self"]))


def _numbers(chooser: Node) -> list[Node]:
    """The chosen numbers in all the shapes they are given; empty if nobody reads them."""
    found = [
        user
        for user in chooser.users
        if user.target is operator.getitem and user.args[1] == 1 and user.users
    ]
    for node in found:
        found += [user for user in node.users if user.target in _SAME_NUMBERS]
    return found


def _chooser(numbers: Any) -> Node | None:
    """The `topk` that numbers come from."""
    while isinstance(numbers, fx.Node) and numbers.target in _SAME_NUMBERS:
        numbers = numbers.args[0]
    if not isinstance(numbers, fx.Node) or numbers.target is not operator.getitem:
        return None
    source: Any = numbers.args[0]
    return source if source.target is _TOPK and numbers.args[1] == 1 else None


def _choices(node: Node) -> list[tuple[Node, int, Node]]:
    """(value, axis, numbers): what an operation takes by number."""
    if node.target is _ATEN.index.Tensor:
        given = bound_arguments(node)
        pairs = enumerate(given["indices"])
        return [(given["self"], axis, number) for axis, number in pairs if number is not None]
    if node.target is _ATEN.embedding.default:
        given = bound_arguments(node)
        return [(given["weight"], 0, given["indices"])]
    if node.target in (_ATEN.gather.default, _ATEN.scatter.value, _ATEN.scatter.src):
        given = bound_arguments(node)
        return [(given["self"], given["dim"] % len(sizes(given["self"])), given["index"])]
    if node.target is _ATEN.index_select.default:
        given = bound_arguments(node)
        return [(given["self"], given["dim"] % len(sizes(given["self"])), given["index"])]
    return []


def _chosen_from(user: Node, number: Node) -> Axis:
    """The axis that numbers of experts choose from; raises NotFollowed."""
    for value, axis, numbers in _choices(user):
        if numbers is number:
            return value, axis
    if user.target is _ATEN.one_hot.default:
        return user, len(sizes(user)) - 1
    raise NotFollowed(f"{op_text(user)} %{user.name} computes with numbers of experts")


def _stacks(chooser: Node) -> list[tuple[Node, Node]]:
    """The weights from which the chosen numbers take, and these numbers."""
    return [
        (value, number)
        for number in _numbers(chooser)
        for user in number.users
        for value, axis, numbers in _choices(user)
        if numbers is number and value.op == "get_attr" and axis == 0 and len(sizes(value)) > 1
    ]


__all__ = ["ExpertLayer", "expert_layers"]
