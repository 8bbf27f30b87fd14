"""Take a mask apart: which of its parts follow from positions, which from data, what it adds.

A boolean mask is a conjunction of parts. An additive one is a sum of biases and of numbers so low
that they hide a key; `where(visible, 0, lowest)` is the boolean mask `visible`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..ir.edit import same_shape, same_size, shape, value_of
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from .mask_choice import Number, read_choice, read_comparison, read_inverse

aten = torch.ops.aten

ABSORBS = -1e30
"""A number so low that a score added to it is lost, so that a blind query attends evenly."""

_AND = (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor)
_OR = (aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor)
_NOT = (aten.logical_not.default, aten.bitwise_not.default)


@dataclass(frozen=True)
class Part:
    """A boolean value: keys are visible where it is true (false when `negated`).

    wraps: unsqueezes and slices that the mask applies to it, innermost first. space: the rank of
    the scores it is applied to.
    """

    node: Node
    negated: bool = False
    wraps: tuple[Node, ...] = ()
    space: int = 4


@dataclass(frozen=True)
class Bias:
    """An additive value, to be multiplied by factor."""

    node: Node
    factor: float
    space: int = 4


@dataclass
class MaskParts:
    """What a mask is made of. fills: the numbers that hide; summed: some may add up."""

    parts: list[Part] = field(default_factory=list[Part])
    biases: list[Bias] = field(default_factory=list[Bias])
    fills: set[float] = field(default_factory=set[float])
    summed: bool = False

    def hide(self, visible: Node, negated: bool, fill: float, number: Number) -> None:
        self.parts += split_boolean(visible, number, negated)
        self.fills.add(fill)

    def raise_to(self, floor: float) -> None:
        """No masked score is less than `floor`: what hides adds up to no more than it."""
        if all(fill <= floor for fill in self.fills):
            self.fills = {floor} if self.fills else set()
            self.summed = False

    def add(self, other: MaskParts) -> None:
        """The sum with another mask: where both hide, their fills add up."""
        self.summed |= other.summed or bool(self.fills and other.fills)
        self.parts += other.parts
        self.biases += other.biases
        self.fills |= other.fills


def split_boolean(
    node: Node, number: Number, negated: bool = False, wraps: tuple[Node, ...] = ()
) -> list[Part]:
    """The conjunction's members; a disjunction that hides is split by De Morgan's law."""

    def split(value: Node, negated: bool, *more: Node) -> list[Part]:
        return split_boolean(value, number, negated, (*more, *wraps))

    if node.target in (_OR if negated else _AND):
        pair = [node.args[0], node.args[1]]
        if all(isinstance(x, fx.Node) and value_of(x).dtype == torch.bool for x in pair) and (
            not wraps or all(len(shape(x)) == len(shape(node)) for x in pair)  # type: ignore[arg-type]
        ):
            return [p for x in pair for p in split(x, negated)]  # type: ignore[arg-type]
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node.op != "call_function":
        return [Part(node, negated, wraps)]
    if node.target in _NOT and value_of(source).dtype == torch.bool:
        return split(source, not negated)
    compared = read_comparison(node, number)
    if compared is not None and (not wraps or same_shape(compared[0], node)):
        return split(compared[0], negated != compared[1])
    if node.target is aten.expand.default and (not wraps or _same_rank(node, source)):
        return split(source, negated)
    if node.target is aten.unsqueeze.default or _cuts_shared_axis(node, source):
        inner = split(source, negated, node)
        if len(inner) > 1 and all(_fits(part, node) for part in inner):
            return inner
    return [Part(node, negated, wraps)]


def _same_rank(a: Node, b: Node) -> bool:
    return len(shape(a)) == len(shape(b))


def _cuts_shared_axis(node: Node, source: Node) -> bool:
    return node.target is aten.slice.Tensor and value_of(source).dtype == torch.bool


def _fits(part: Part, wrap: Node) -> bool:
    """Whether the wrap means the same on the part as on the whole that it was written for."""
    whole: Any = wrap.args[0]
    if not _same_rank(part.node, whole):
        return False
    axis = int(wrap.args[1]) if len(wrap.args) > 1 else 0  # type: ignore[arg-type]
    if wrap.target is aten.unsqueeze.default:
        return True
    return same_size(shape(part.node)[axis], shape(whole)[axis])


def split_additive(
    node: Node, factor: float, number: Number, hidden_at: Callable[[Node], set[float] | None]
) -> MaskParts:
    """The parts of `factor * node`.

    hidden_at: for a positional value that is 0 or hides, the numbers that hide; else None.
    """

    def split(value: Node, factor: float) -> MaskParts:
        return split_additive(value, factor, number, hidden_at)

    found = MaskParts()
    constant = number(node)
    if constant == 0:
        return found
    arguments = bound_arguments(node) if _has_schema(node) else {}
    if node.target is aten.add.Tensor and arguments["alpha"] == 1:
        sides = [arguments["self"], arguments["other"]]
        if all(isinstance(side, fx.Node) for side in sides):
            for side in sides:
                found.add(split(side, factor))
            return found
    if node.target in (aten.expand.default, aten._to_copy.default):
        source: Any = node.args[0]
        if value_of(source).is_floating_point():
            return split(source, factor)
    if node.target is aten.mul.Tensor and (inverse := read_inverse(node, factor, number)):
        found.hide(*inverse, number)
        return found
    if node.target is aten.mul.Tensor and number(arguments["other"]) is not None:
        return split(arguments["self"], factor * number(arguments["other"]))  # type: ignore[operator]
    choice = read_choice(node, factor, number)
    if choice is not None:
        if choice.kept is not None:
            found.add(split(choice.kept, factor))
        found.hide(choice.condition, choice.negated, choice.fill, number)
        return found
    fills = hidden_at(node)
    if fills is not None:
        found.parts.append(Part(node))
        found.fills |= {fill * factor for fill in fills}
    else:
        found.biases.append(Bias(node, factor))
    return found


def _has_schema(node: Node) -> bool:
    return node.op == "call_function" and hasattr(node.target, "_schema")


def finite(fill: float) -> bool:
    return not math.isinf(fill)
