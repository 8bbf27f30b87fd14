"""Read a spelled-out normalization: the statistic first, then what it multiplies, in any order.

The statistic is 1 / sqrt(mean(x^2) + eps) or 1 / sqrt(var(x) + eps) over the last axis; then come
the product with x, casts, the weight and the bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ir.edit import shape, value_of
from ..ir.look_through import narrowest, number, other_factor, same_value, sole_reader
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from ..ir.rewrite import Decline
from .spelling import arguments, axis, calls, rank

aten = torch.ops.aten


@dataclass(frozen=True)
class Statistic:
    """The inverse (or, if `root`, the plain) root mean square of `x`, or of x minus its mean.

    centred: the value whose mean is taken away, for a layer norm. by_variance: the statistic reads
    the uncentred value and centres it by itself.
    """

    node: Node
    x: Node
    eps: float
    root: bool
    centred: Node | None
    by_variance: bool = False


@dataclass(frozen=True)
class Scaled:
    """A value on the way: `node` is x times the statistic, with or without weight and bias.

    rounded: the dtype to which the normalized value was cast before its weight.
    """

    node: Node
    rounded: torch.dtype
    has_x: bool = False
    weight: Node | None = None
    bias: Node | None = None


def read_statistic(node: Node) -> tuple[Statistic | Decline, bool] | None:
    """The statistic that starts at a root, or why it is none, and whether x is centred."""
    root = _is_root(node)
    if root is None:
        return None
    inner, eps = _without_eps(arguments(node)[0])
    squares = _mean_of_squares(inner)
    if squares is None:
        return _eps_multiplied(inner)
    source, fault = squares
    variance = _is_variance(inner)
    centred = source if variance else _mean_taken_away(source)
    if fault:
        return Decline(fault), centred is not None
    statistic = Statistic(node, source, eps, root, centred, variance)
    if root and _eps_after(node):
        return Decline("eps is added after the square root, not before it"), centred is not None
    return statistic, centred is not None


def _is_root(node: Node) -> bool | None:
    """False for an inverse square root, True for a square root, None for anything else."""
    if calls(node, aten.rsqrt.default):
        return False
    if calls(node, aten.sqrt.default):
        return True
    if calls(node, aten.pow.Tensor_Scalar) and arguments(node)[1] in (0.5, -0.5):
        return arguments(node)[1] == 0.5
    return None


def _without_eps(value: Any) -> tuple[Any, float]:
    if calls(value, aten.add.Tensor) and bound_arguments(value)["alpha"] == 1:
        for inner, eps in (value.args, value.args[::-1]):
            if number(eps) is not None:
                return inner, number(eps) or 0.0
    return value, 0.0


def _eps_multiplied(inner: Any) -> tuple[Decline, bool] | None:
    if not calls(inner, aten.mul.Tensor):
        return None
    for mean, eps in (inner.args, inner.args[::-1]):
        if number(eps) is not None and _mean_of_squares(mean) is not None:
            return Decline(
                f"the mean of squares is multiplied by {number(eps)}, eps is added"
            ), False
    return None


def _eps_after(root: Node) -> bool:
    reader = sole_reader(root)
    return calls(reader, aten.add.Tensor) and any(number(v) is not None for v in reader.args)  # type: ignore[union-attr]


def _mean_of_squares(value: Any) -> tuple[Node, str] | None:
    """What is squared (or centred and squared), and what is wrong with the mean."""
    if calls(value, aten.unsqueeze.default):
        value = value.args[0]
    if _is_variance(value):
        given = bound_arguments(value)
        unbiased = given.get("unbiased", given.get("correction") != 0)
        fault = "the variance is unbiased (divided by n - 1), a norm divides by n"
        return given["self"], fault if unbiased else _axis_fault(given["self"], given["dim"])
    mean = _mean(value)
    squared = _squared(mean[0]) if mean else None
    if mean is None or squared is None:
        return None
    return squared, _axis_fault(squared, mean[1])


def _is_variance(value: Any) -> bool:
    return calls(value, aten.var.correction, aten.var.dim)


def _mean(value: Any) -> tuple[Node, Any] | None:
    """(averaged value, axes) of a mean, or of a sum divided by the number of its terms."""
    if calls(value, aten.mean.dim):
        return value.args[0], value.args[1]
    if not calls(value, aten.div.Tensor, aten.mul.Tensor):
        return None
    total, count = value.args[0], number(value.args[1])
    if not calls(total, aten.sum.dim_IntList) or not count:
        return None
    count = count if calls(value, aten.div.Tensor) else 1 / count
    source, axes = total.args[0], total.args[1]
    sizes = [shape(source)[dim] for dim in axes]
    return (source, axes) if len(sizes) == 1 and sizes[0] == count else None


def _squared(value: Any) -> Node | None:
    if calls(value, aten.pow.Tensor_Scalar) and value.args[1] == 2:
        return value.args[0]
    if calls(value, aten.mul.Tensor) and same_value(*value.args):
        return value.args[0]
    return None


def _axis_fault(source: Node, axes: Any) -> str:
    last = rank(source) - 1
    found = sorted(axis(dim, rank(source)) for dim in (axes or range(last + 1)))
    if found == [last]:
        return ""
    named = ", ".join(map(str, found))
    return f"the mean is over axis {named} of {last + 1}, not over the last axis alone"


def _mean_taken_away(value: Any) -> Node | None:
    """x, where the value is x minus its mean over the last axis."""
    value = narrowest(value)
    if not calls(value, aten.sub.Tensor):
        return None
    source, mean = value.args[0], value.args[1]
    averaged = _mean(mean.args[0] if calls(mean, aten.unsqueeze.default) else mean)
    if averaged is None or _axis_fault(*averaged) or not _is_row(mean, source):
        return None
    return source if same_value(narrowest(averaged[0]), narrowest(source)) else None


def scaled_forms(found: Statistic) -> list[Scaled]:
    """All values on the way from the statistic that are normalized x, the furthest last."""
    node, inverse = _inverse_row(found)
    state, forms = Scaled(node, value_of(node).dtype), list[Scaled]()
    if not _is_row(node, found.x):
        return forms
    while (reader := sole_reader(state.node)) is not None:
        following = _step(found, state, reader) if inverse else _divided(found, state, reader)
        if following is None:
            break
        inverse, state = True, following
        if state.has_x:
            forms.append(state)
    return forms


def _inverse_row(found: Statistic) -> tuple[Node, bool]:
    """The statistic with its averaged axis put back, and whether it is inverted by now."""
    node, inverse = found.node, not found.root
    while (reader := sole_reader(node)) is not None:
        if not inverse and calls(reader, aten.reciprocal.default):
            inverse = True
        elif not calls(reader, aten.unsqueeze.default):
            break
        node = reader
    return node, inverse


def _is_row(statistic: Node, x: Node) -> bool:
    """Whether the statistic is one number for each row of x: [..., 1]."""
    return rank(statistic) == rank(x) and shape(statistic)[-1] == 1


def _divided(found: Statistic, state: Scaled, reader: Node) -> Scaled | None:
    divided = calls(reader, aten.div.Tensor) and reader.args[1] is state.node
    if not divided or not _is_x(found, reader.args[0]):
        return None
    return replace(state, node=reader, rounded=value_of(reader).dtype, has_x=True)


def _step(found: Statistic, state: Scaled, reader: Node) -> Scaled | None:
    if calls(reader, aten._to_copy.default) and value_of(reader).is_floating_point():
        rounded = state.rounded if state.weight else value_of(reader).dtype
        return replace(state, node=reader, rounded=rounded)
    other = other_factor(reader, state.node)
    if other is not None and state.bias is None:
        return _times(found, replace(state, node=reader), other)
    if calls(reader, aten.add.Tensor) and found.centred and state.weight and not state.bias:
        left, right = arguments(reader)
        bias = right if left is state.node else left
        if bound_arguments(reader)["alpha"] == 1 and per_channel(bias, found.x):
            return replace(state, node=reader, bias=bias)
    return None


def _times(found: Statistic, state: Scaled, factor: Any) -> Scaled | None:
    if not state.has_x and _is_x(found, factor):
        rounded = state.rounded if state.weight else value_of(state.node).dtype
        return replace(state, has_x=True, rounded=rounded)
    if state.weight is None and per_channel(factor, found.x):
        return replace(state, weight=factor)
    if not state.has_x and state.weight is None and calls(factor, aten.mul.Tensor):
        for x, weight in (factor.args, factor.args[::-1]):
            if _is_x(found, x) and per_channel(weight, found.x):
                return replace(state, has_x=True, weight=weight, rounded=value_of(factor).dtype)
    return None


def _is_x(found: Statistic, value: Any) -> bool:
    if not isinstance(value, Node):
        return False
    if not found.by_variance:
        return same_value(narrowest(value), narrowest(found.x))
    source = _mean_taken_away(value)
    return source is not None and same_value(narrowest(source), narrowest(found.x))


def per_channel(value: Any, x: Node) -> bool:
    """Whether a factor has one number for each channel (last axis) of x, and no other axis."""
    if not isinstance(value, Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return False
    sizes, channels = shape(value), shape(x)[-1]
    one_row = bool(sizes) and all(size == 1 for size in sizes[:-1] if isinstance(size, int))
    whole = all(isinstance(size, int) for size in sizes) and isinstance(channels, int)
    return one_row and whole and sizes[-1] == channels and value_of(value).is_floating_point()
