"""Axis flow through arithmetic on single elements, and through sums along an axis.

A factor passes through what is homogeneous in the element that carries it (relu too, for positive
factors), through a product from one side, and through a sum from both sides at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .axes_channels import carries, constant_along
from .axes_layout import same
from .axes_walk import ChannelWalk, Unfollowed
from .look_through import number
from .pattern import bound_arguments
from .program import Node
from .text import op_text

_ATEN = torch.ops.aten
GATE = "a product with another value"
RELU = "relu"
OWN = "a factor for each channel"
SUM = "sum %"


def tie_all(flow: ChannelWalk, node: Node) -> Tensor:
    """An operation on elements, where only widths count: its inputs' channels are one."""
    total: Tensor | None = None
    for read in node.all_input_nodes:
        ids = flow.ids(read)
        if not carries(ids):
            continue
        ids = flow.fit(ids, node)
        if total is None:
            total = ids
        else:
            flow.channels.tie(total, ids)
            total = torch.where(total != 0, total, ids) if bool((total == 0).any()) else total
    return flow.no_channels(node) if total is None else total


def passed(flow: ChannelWalk, node: Node) -> Any:
    """f(s x) = s f(x) for s > 0."""
    ids = flow.fit(flow.ids(node.args[0]), node)
    if node.target in _RELUS:
        flow.channels.mark(ids, RELU)
    return ids


def added(flow: ChannelWalk, node: Node) -> Any:
    """x + y: both take the factor or none; a weight that a number is added to keeps being one."""
    first, second = node.args[:2]
    for weight, other in ((first, second), (second, first)):
        shown, addend = flow.view(weight), number(other)
        if shown is not None and addend is not None and node.target is _ATEN.add.Tensor:
            return shown.raised_by(addend) if not node.kwargs else _sum(flow, node)
    if not flow.scale:
        return tie_all(flow, node)
    return _sum(flow, node)


def _sum(flow: ChannelWalk, node: Node) -> Tensor:
    first, second = (flow.fit(flow.ids(value), node) for value in node.args[:2])
    flow.channels.tie(first, second)
    if not (carries(first) and carries(second)):
        alone = second if carries(second) else first
        other = node.args[0] if alone is second else node.args[1]
        name = f"%{other.name}" if isinstance(other, fx.Node) else str(other)
        flow.block(alone, f"{op_text(node)} %{node.name} adds {name}, which takes no factor")
        return flow.no_channels(node)
    whole = (first != 0) & (second != 0)
    if not bool(whole.all()):
        left = torch.where(whole, 0, first + second)
        flow.block(left, f"{op_text(node)} %{node.name} adds values of which one takes no factor")
        return torch.where(whole, first, 0)
    if flow.view(node.args[0]) is None and flow.view(node.args[1]) is None:
        flow.channels.mark(first, SUM + node.name)
    return first


def multiplied(flow: ChannelWalk, node: Node) -> Any:
    """x * y: one of them carries the factor; the first is left alone where both could."""
    if not flow.scale:
        return tie_all(flow, node)
    if any(number(value) is not None for value in node.args[:2]):
        return same(flow, node) if number(node.args[1]) is not None else _scaled(flow, node)
    first, second = (flow.fit(flow.ids(value), node) for value in node.args[:2])
    kept = _only_factor(flow, first, second)
    if kept is None:
        if flow.view(node.args[1]) is not None:
            first, second = second, first
        flow.block(torch.where(second != 0, first, 0), f"%{node.name} multiplies it with a value")
        flow.channels.mark(second, GATE)
        return torch.where(second != 0, second, first)
    place = 0 if kept is first else 1
    other, view = node.args[1 - place], flow.view(node.args[place])
    channel = view.channel_axis() if view is not None else None
    if view is not None and channel is not None:
        flow.produce(view, channel, "factor")
    elif isinstance(other, fx.Node) and flow.shape(other)[-1:] == flow.shape(node)[-1:] != [1]:
        flow.channels.mark(kept, GATE if flow.view(other) is None else OWN)
    return kept


def _only_factor(flow: ChannelWalk, first: Tensor, second: Tensor) -> Tensor | None:
    """The one of two that may still carry a factor; None if both may."""
    if not carries(second):
        return first
    if not carries(first) or flow.channels.all_blocked(first):
        return second
    return first if flow.channels.all_blocked(second) else None


def _scaled(flow: ChannelWalk, node: Node) -> Any:
    """2 * x."""
    return flow.fit(flow.ids(node.args[1]), node)


def divided(flow: ChannelWalk, node: Node) -> Any:
    """x / y passes the factor of x; one of y would be inverted."""
    if not flow.scale:
        return tie_all(flow, node)
    flow.block(flow.ids(node.args[1]), f"%{node.name} divides by it")
    ids = flow.fit(flow.ids(node.args[0]), node)
    if isinstance(node.args[1], fx.Node) and flow.shape(node.args[1])[-1:] not in ([], [1]):
        flow.channels.mark(ids, OWN)
    return ids


def chosen(flow: ChannelWalk, node: Node) -> Any:
    """where, masked_fill: zeros fit any factor, another value must take the same one."""
    given = bound_arguments(node)
    names = ("self", "value") if "mask" in given else ("self", "other")
    if not flow.scale:
        return tie_all(flow, node)
    values = [given[name] for name in names]
    carrying = [value for value in values if carries(flow.ids(value))]
    if not carrying:
        return flow.no_channels(node)
    first = flow.fit(flow.ids(carrying[0]), node)
    if len(carrying) == 2:
        flow.channels.tie(first, flow.fit(flow.ids(carrying[1]), node))
        return first
    other = values[1] if carrying[0] is values[0] else values[0]
    if number(other) != 0.0:
        raise Unfollowed("what it puts in takes no factor")
    return first


def clamped(flow: ChannelWalk, node: Node) -> Any:
    """Only at zero, from one side, is it homogeneous."""
    given = bound_arguments(node)
    bounds = [given.get("min"), given.get("max")]
    if flow.scale and bounds not in ([0, None], [None, 0], [0.0, None], [None, 0.0]):
        raise Unfollowed("it cuts values at fixed numbers")
    return passed(flow, node)


def reduced(flow: ChannelWalk, node: Node) -> Any:
    """sum, mean, amax along axes: equal channels give one; different ones are mixed."""
    given = bound_arguments(node)
    ids = flow.ids(given["self"])
    dims = given.get("dim")
    dims = list(range(ids.dim())) if dims in (None, []) else dims
    dims = [dims] if isinstance(dims, int) else dims
    axes = sorted({int(d) % max(ids.dim(), 1) for d in dims}, reverse=True)
    if not all(constant_along(ids, axis) for axis in axes):
        raise Unfollowed("it mixes channels")
    for axis in axes:
        ids = ids.narrow(axis, 0, 1) if given.get("keepdim") else ids.select(axis, 0)
    return flow.fit(ids, node)


def running(flow: ChannelWalk, node: Node) -> Any:
    """cumsum along an axis of equal channels."""
    ids = flow.ids(node.args[0])
    if not constant_along(ids, int(node.args[1])):  # type: ignore[arg-type]
        raise Unfollowed("it mixes channels")
    return ids


_RELUS = {_ATEN.relu.default, _ATEN.leaky_relu.default, _ATEN.clamp_min.default}
ARITHMETIC: dict[Any, Any] = {
    _ATEN.relu.default: passed,
    _ATEN.leaky_relu.default: passed,
    _ATEN.neg.default: passed,
    _ATEN.abs.default: passed,
    _ATEN.add.Tensor: added,
    _ATEN.add.Scalar: added,
    _ATEN.sub.Tensor: added,
    _ATEN.mul.Tensor: multiplied,
    _ATEN.mul.Scalar: multiplied,
    _ATEN.div.Tensor: divided,
    _ATEN.div.Scalar: divided,
    _ATEN.maximum.default: added,
    _ATEN.minimum.default: added,
    _ATEN.where.self: chosen,
    _ATEN.where.ScalarOther: chosen,
    _ATEN.where.ScalarSelf: chosen,
    _ATEN.masked_fill.Scalar: chosen,
    _ATEN.masked_fill.Tensor: chosen,
    _ATEN.clamp.default: clamped,
    _ATEN.clamp_min.default: clamped,
    _ATEN.sum.dim_IntList: reduced,
    _ATEN.mean.dim: reduced,
    _ATEN.amax.default: reduced,
    _ATEN.amin.default: reduced,
    _ATEN.cumsum.default: running,
}
