"""Axis flow for cutting, through products, norms, attention and rotary embeddings.

A weight that all heads read (a norm's, a projection's) is covered by the heads' own channels; so is
a key head by its query heads. A head is a channel too, which covers the channels of its queries,
keys, values and results: a sink, a slope or a column of a bias table goes with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .axes_channels import carries, constant_along
from .axes_covers import alike, meet, rows_of
from .axes_matmul import Matmul
from .axes_meeting import (
    ATTENTIONS,
    meet_all,
    meet_bare,
    own_part,
    read_in_parts,
    sum_over,
    weight_met,
)
from .axes_walk import ChannelWalk, Rule, Unfollowed
from .axes_weights import WeightView
from .pattern import bound_arguments
from .program import Node
from .text import op_text

_ATEN, _OURS = torch.ops.aten, torch.ops.planish


def _biased(flow: ChannelWalk, node: Node, out: Tensor, bias: Any) -> Tensor:
    if not isinstance(bias, fx.Node):
        return out
    view = flow.view(bias)
    added = weight_met(flow, view, out, "bias") if view is not None else flow.ids(bias)
    if not carries(added):
        return meet_bare(flow, node, bias, out)
    return meet(flow.channels, out, flow.fit(added, node))


def _by_weight(
    flow: ChannelWalk,
    node: Node,
    source: Node,
    ids: Tensor,
    weight: WeightView,
    summed: int,
    kept: int,
) -> Tensor:
    """ids: the source's, the summed axis last. Returns the result's channels, [kept] or
    [..., kept] where a weight that all heads read gives each head its own."""
    columns, rows = flow.axis_ids(weight, summed), flow.axis_ids(weight, kept)
    place, other = weight.axes[summed], weight.axes[kept]
    if columns is None or rows is None or place is None or other is None:
        raise Unfollowed("its weight lacks one of the two axes")
    flow.absorbs.setdefault((weight.name, place.axis), []).append((node, source))
    flow.produce(weight, kept, "product")
    if not carries(ids):
        flow.channels.block(columns, f"{op_text(node)} %{node.name} reads %{source.name} with it")
        return rows
    read = meet(flow.channels, ids, columns)
    if alike(read):
        return rows
    return meet(flow.channels, rows_of(flow.channels, read).unsqueeze(-1), rows)


def _of_values(flow: ChannelWalk, node: Node, left: Tensor, right: Tensor) -> Tensor:
    """The products of all pairs, summed: each row of them is a channel."""
    if left.dim() < 2 or right.dim() < 2:
        raise Unfollowed("two values of unknown form")
    for ids, axis in ((left, -2), (right, -1)):
        if constant_along(ids, axis):
            continue
        if ids.shape[axis] * left.shape[-1] > 1 << 20:
            raise Unfollowed("it multiplies too many channels with each other")
    left = left.narrow(-2, 0, 1) if constant_along(left, -2) else left
    right = right.narrow(-1, 0, 1) if constant_along(right, -1) else right
    apart = (constant_along(left, -1), constant_along(right, -2))
    if apart != (True, True) and not (carries(left) and carries(right)):
        raise Unfollowed("it sums over channels with a value that has none")
    met = meet(flow.channels, left.unsqueeze(-2), right.transpose(-1, -2).unsqueeze(-3))
    return flow.fit(sum_over(flow, met), node)


def _convolution(flow: ChannelWalk, node: Node) -> Any:
    """Channels on axis 1; of all channels, or of each on its own."""
    given = bound_arguments(node)
    weight, ids = flow.view(given["weight"]), flow.ids(given["input"])
    if weight is None or given.get("transposed"):
        raise Unfollowed("its weight is computed or transposed")
    spatial = [1] * (len(weight.shape) - 2)
    ids = ids if ids.dim() else flow.no_channels(given["input"])
    if given["groups"] == 1:
        rows = _by_weight(flow, node, given["input"], ids.movedim(1, -1), weight, 1, 0)
        if rows.dim() > 1:
            raise Unfollowed("its input has other channels at other positions")
    else:
        rows = _each_alone(flow, ids, weight, given["groups"])
    bias = flow.view(given["bias"])
    if bias is not None:
        rows = meet(flow.channels, rows, weight_met(flow, bias, rows, "bias"))
    return flow.fit(rows.reshape(-1, *spatial), node)


def _each_alone(flow: ChannelWalk, ids: Tensor, weight: WeightView, groups: int) -> Tensor:
    rows = flow.axis_ids(weight, 0)
    if rows is None or groups != len(rows) or ids.dim() < 2 or ids.shape[1] != groups:
        raise Unfollowed("it convolves groups of channels")
    read = ids.movedim(1, -1)
    if not alike(read):
        raise Unfollowed("its input has other channels at other positions")
    flow.produce(weight, 0, "factor")
    return meet(flow.channels, read[(0,) * (read.dim() - 1)], rows)


def _normed(flow: ChannelWalk, node: Node) -> Any:
    given = bound_arguments(node)
    source = given["x"] if "x" in given else given["input"]
    total = flow.fit(flow.ids(source), node)
    for place, part in enumerate((given.get("weight"), given.get("bias"))):
        if not isinstance(part, fx.Node):
            continue
        view = flow.view(part)
        if view is None:
            raise Unfollowed("its weight is computed")
        offset = float(given.get("offset") or 0.0)
        view = view.raised_by(offset) if offset and not place else view
        total = meet(flow.channels, total, flow.fit(weight_met(flow, view, total, "norm"), node))
    return total


def _rotated(flow: ChannelWalk, node: Node) -> Any:
    """Both channels of a pair go together."""
    given = bound_arguments(node)
    ids, half = flow.ids(given["x"]), flow.shape(given["cos"])[-1]
    if given["interleaved"]:
        pairs = ids[..., 0 : 2 * half : 2], ids[..., 1 : 2 * half : 2]
    else:
        pairs = ids[..., :half], ids[..., half : 2 * half]
    flow.channels.tie(*pairs)
    for angles in (given["cos"], given["sin"]):
        meet_bare(flow, node, angles, pairs[0])
    return flow.fit(ids, node)


def _attention(flow: ChannelWalk, node: Node) -> Any:
    """A query head's channels meet those of its key head, which is repeated; so are values."""
    given = bound_arguments(node)
    names = ("q", "k", "v") if "q" in given else ("query", "key", "value")
    heads, parts = flow.shape(node)[1], [flow.ids(given[name]) for name in names]
    for ids in parts:
        if ids.dim() != 4 or not constant_along(ids, 2) or bool((ids[:1, :, :1] == 0).any()):
            raise Unfollowed("its heads cannot be told apart")
    query, key, value = (
        ids[:1, :, :1].repeat_interleave(heads // ids.shape[1], 1) for ids in parts
    )
    head = rows_of(flow.channels, meet(flow.channels, query, key)).unsqueeze(-1)
    for name in ("mask", "attn_mask", "sinks"):
        if isinstance(given.get(name), fx.Node):
            head = _met_by_heads(flow, node, given[name], head, name != "sinks")
    return flow.fit(meet(flow.channels, head, value), node)


def _met_by_heads(
    flow: ChannelWalk, node: Node, read: Node, head: Tensor, positions: bool
) -> Tensor:
    """head [1, heads, 1, 1] met with what each head has besides: a sink, a bias on its scores.

    What several attentions read goes when all of them let it go; each reads what it needs of it.
    """
    heads = head.shape[1]
    if not positions:
        head = head[0, :, 0, 0]
    view, axis = flow.view(read), -3 if positions else -1
    if view is None:
        ids = flow.ids(read)
    elif len(view.shape) >= -axis and view.shape[axis] == heads > 1:
        made = flow.axis_ids(view, axis)
        assert made is not None
        flow.produce(view, axis, "value")
        ids = made.reshape([-1, 1, 1] if positions else [-1])
    else:
        ids = torch.zeros((), dtype=torch.int64)
    if not carries(ids):
        met = meet_bare(flow, node, read, head)
    elif positions and not (constant_along(ids, -1) and constant_along(ids, -2)):
        raise Unfollowed("its mask has channels along positions")
    else:
        row = ids[..., :1, :1] if positions else ids
        if view is None and row.dim() > 2 and row.shape[-3] == heads > 1 and read_in_parts(read):
            row = own_part(flow, read, row[:1] if row.dim() > 3 else row)
            flow.bare[node, read] = flow.fit(row, read)
        met = meet(flow.channels, head, row)
    met = met if positions else met.reshape(1, -1, 1, 1)
    return met[:1]


MEETING_PRODUCTS: dict[Any, Rule] = {
    **Matmul(_by_weight, _of_values, _biased).rules(),
    **dict.fromkeys(
        (_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.convolution.default), _convolution
    ),
    **dict.fromkeys(
        (_OURS.rms_norm.default, _ATEN.rms_norm.default, _ATEN.layer_norm.default), _normed
    ),
    **dict.fromkeys(ATTENTIONS, _attention),
    _OURS.rotary.default: _rotated,
    _OURS.gated.default: meet_all,
    _OURS.quick_gelu.default: meet_all,
}

__all__ = ["MEETING_PRODUCTS"]
