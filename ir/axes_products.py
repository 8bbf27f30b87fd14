"""Axis flow through matrix products, with weights and of two values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .axes_channels import carries, constant_along
from .axes_matmul import Matmul
from .axes_walk import ChannelWalk, Unfollowed
from .axes_weights import WeightView
from .pattern import bound_arguments
from .program import Node
from .text import op_text

_ATEN = torch.ops.aten
VALUES = "the values of an attention"


def _biased(flow: ChannelWalk, node: Node, out: Tensor, bias: Any) -> Tensor:
    """The result's channels, tied to those of what is added to it."""
    if not isinstance(bias, fx.Node):
        return out
    view = flow.view(bias)
    added = flow.weight_ids(view, "bias") if view is not None else flow.ids(bias)
    added = flow.fit(added, node)
    flow.channels.tie(out, added)
    if flow.scale and not carries(added):
        flow.block(out, f"{op_text(node)} %{node.name} adds %{bias.name}, which takes no factor")
    elif flow.scale and not carries(out):
        flow.block(added, f"{op_text(node)} %{node.name} adds it to what takes no factor")
    return out


def _by_weight(
    flow: ChannelWalk,
    node: Node,
    source: Node,
    ids: Tensor,
    weight: WeightView,
    summed: int,
    kept: int,
) -> Tensor:
    """ids: the source's, the summed axis last. Returns the result's channels, [kept]."""
    columns, rows = flow.axis_ids(weight, summed), flow.axis_ids(weight, kept)
    place, other = weight.axes[summed], weight.axes[kept]
    if columns is None or rows is None or place is None or other is None:
        raise Unfollowed("its weight lacks one of the two axes")
    if ids.dim() == 0:
        ids = ids.expand(len(columns))
    flow.channels.tie(ids, columns.expand(ids.shape))
    if flow.scale:
        _refuse_mixed(flow, node, source, ids, columns)
    flow.absorbs.setdefault((weight.name, place.axis), []).append((node, source))
    flow.produce(weight, kept, "product")
    return rows


def _refuse_mixed(
    flow: ChannelWalk, node: Node, source: Node, ids: Tensor, columns: Tensor
) -> None:
    reason = f"{op_text(node)} %{node.name} multiplies it with %{source.name}, without a factor"
    if not carries(ids):
        flow.block(columns, reason)
    elif bool((ids == 0).any()):
        bare = (ids == 0).reshape(-1, ids.shape[-1]).any(0)
        flow.block(torch.where(bare, columns, 0), reason)


def _of_values(flow: ChannelWalk, node: Node, left: Tensor, right: Tensor) -> Tensor:
    """Neither is a weight. A factor of the right columns passes if it is the same along the summed
    axis and the left carries none; along the summed axis it would have to meet its inverse."""
    if left.dim() < 2 and right.dim() < 2:
        raise Unfollowed("two values of unknown form")
    if not flow.scale:
        return _width_of_values(flow, node, left, right)
    named = f"{op_text(node)} %{node.name}"
    if carries(left) and carries(right):
        for ids in (left, right):
            flow.block(ids, f"{named} multiplies two values that could carry a factor (scores)")
        return flow.no_channels(node)
    ids, axis = (left, -1) if carries(left) else (right, -2)
    if not constant_along(ids, axis):
        flow.block(ids, f"{named} sums over its channels")
        return flow.no_channels(node)
    flow.channels.mark(ids, VALUES)
    if axis == -2:
        flow.channels.join(ids.narrow(axis, 0, 1))
    return flow.fit(ids.narrow(axis, 0, 1), node)


def _width_of_values(flow: ChannelWalk, node: Node, left: Tensor, right: Tensor) -> Tensor:
    left = left.expand(1, 1) if left.dim() < 2 else left
    right = right.expand(1, 1) if right.dim() < 2 else right
    if not constant_along(left, -1) and not constant_along(right, -2):
        columns = left.transpose(-1, -2)
        if constant_along(columns, -1) and constant_along(right, -1):
            flow.channels.tie(columns.narrow(-1, 0, 1), right.narrow(-1, 0, 1))
        return flow.no_channels(node)
    for ids, axis in ((right, -2), (left, -1)):
        if carries(ids) and constant_along(ids, axis):
            return flow.fit(ids.narrow(axis, 0, 1), node)
    return flow.no_channels(node)


def convolution(flow: ChannelWalk, node: Node) -> Any:
    """Channels on axis 1; padding with zeros fits any factor."""
    given = bound_arguments(node)
    weight, ids = flow.view(given["weight"]), flow.ids(given["input"])
    if weight is None or given.get("transposed"):
        raise Unfollowed("its weight is computed or transposed")
    rank = len(weight.shape)
    source, bias = given["input"], given["bias"]
    if given["groups"] == 1:
        ids = ids if ids.dim() else flow.no_channels(source)
        rows = _by_weight(flow, node, source, ids.movedim(1, -1), weight, 1, 0)
    else:
        flow.block(ids, f"{op_text(node)} %{node.name} convolves groups of its channels")
        flow.produce(weight, 0, "product")
        rows = flow.axis_ids(weight, 0)
        assert rows is not None
    out = flow.fit(rows.reshape(-1, *([1] * (rank - 2))), node)
    view = flow.view(bias)
    if view is not None:
        flow.channels.tie(rows, flow.weight_ids(view, "bias"))
    return out


PRODUCTS: dict[Any, Any] = {
    **Matmul(_by_weight, _of_values, _biased).rules(),
    _ATEN.conv1d.default: convolution,
    _ATEN.conv2d.default: convolution,
    _ATEN.convolution.default: convolution,
}
