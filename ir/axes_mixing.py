"""Axis flow through norms, attention, rotary embeddings and gates: planish's and ATen's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .axes_arithmetic import GATE, tie_all
from .axes_channels import carries, constant_along
from .axes_products import VALUES
from .axes_walk import ChannelWalk, Unfollowed
from .pattern import bound_arguments
from .program import Node
from .text import op_text

_ATEN, _OURS = torch.ops.aten, torch.ops.planish


def normed(flow: ChannelWalk, node: Node) -> Any:
    """The statistics mix the channels that come in; the weight and bias make those that go out."""
    given = bound_arguments(node)
    source = given["x"] if "x" in given else given["input"]
    flow.block(flow.ids(source), f"{op_text(node)} %{node.name} takes statistics of it")
    parts = [given.get("weight"), given.get("bias")]
    shown = [flow.view(part) for part in parts if isinstance(part, fx.Node)]
    if given.get("offset") and shown and shown[0] is not None:
        shown[0] = shown[0].raised_by(float(given["offset"]))
    if None in shown:
        raise Unfollowed("its weight is computed")
    ids = [flow.weight_ids(view, "norm") for view in shown if view is not None]
    if not flow.scale:
        ids.append(flow.ids(source))
    spread = [flow.fit(part, node) for part in ids]
    for other in spread[1:]:
        flow.channels.tie(spread[0], other)
    return spread[0] if spread else flow.no_channels(node)


def group_normed(flow: ChannelWalk, node: Node) -> Any:
    flow.block(flow.ids(node.args[0]), f"group_norm %{node.name} takes statistics of it")
    for read in node.all_input_nodes[1:]:
        flow.block(flow.ids(read), f"group_norm %{node.name} is not followed")
    return flow.no_channels(node)


def attention(flow: ChannelWalk, node: Node) -> Any:
    """Queries and keys meet in scores that softmax mixes; a head's value channels pass."""
    given = bound_arguments(node)
    names = ("q", "k", "v") if "q" in given else ("query", "key", "value")
    query, key, value = (flow.ids(given[name]) for name in names)
    for ids in (query, key):
        flow.block(ids, f"{op_text(node)} %{node.name} takes the softmax of its scores")
    for name in ("mask", "attn_mask", "sinks"):
        if isinstance(given.get(name), fx.Node):
            flow.block(flow.ids(given[name]), f"%{node.name} adds it to scores")
    shape = flow.shape(node)
    if not flow.scale:
        _tie_scores(flow, shape[1], query, key)
    if not carries(value):
        return flow.no_channels(node)
    if not constant_along(value, -2):
        raise Unfollowed("its values have other channels at other positions")
    flow.channels.mark(value, VALUES)
    if flow.scale:
        flow.channels.join(value.narrow(-2, 0, 1))
    return flow.fit(_by_query_head(value.narrow(-2, 0, 1), shape[1]), node)


def _by_query_head(ids: Tensor, heads: int) -> Tensor:
    """Channels of key-value heads [batch, kv_heads, ...], repeated for the query heads."""
    groups = heads // ids.shape[1]
    return ids.repeat_interleave(groups, 1) if groups > 1 else ids


def _tie_scores(flow: ChannelWalk, heads: int, query: Tensor, key: Tensor) -> None:
    """Channel d of a query head and of its key head go together."""
    if query.dim() == 4 and key.dim() == 4 and constant_along(query, 2) and constant_along(key, 2):
        flow.channels.tie(query[:1, :, :1], _by_query_head(key[:1, :, :1], heads))


def rotated(flow: ChannelWalk, node: Node) -> Any:
    """Both channels of a rotated pair take one factor."""
    given = bound_arguments(node)
    ids = flow.ids(given["x"])
    half = flow.shape(given["cos"])[-1]
    if given["interleaved"]:
        pairs = ids[..., 0 : 2 * half : 2], ids[..., 1 : 2 * half : 2]
    else:
        pairs = ids[..., :half], ids[..., half : 2 * half]
    if flow.scale:
        for one, other in (pairs, pairs[::-1]):
            flow.block(torch.where(other == 0, one, 0), f"%{node.name} rotates it with a bare one")
    flow.channels.tie(*pairs)
    return flow.fit(ids, node)


def gated(flow: ChannelWalk, node: Node) -> Any:
    """activation(gate) * up: the factor passes from up."""
    gate, up, activation = node.args[:3]
    if not flow.scale:
        return tie_all(flow, node)
    flow.block(flow.ids(gate), f"gated %{node.name} takes the {activation} of it")
    ids = flow.fit(flow.ids(up), node)
    flow.channels.mark(ids, GATE)
    return ids


def activated(flow: ChannelWalk, node: Node) -> Any:
    """An activation function of ours: of each element, and not homogeneous."""
    if flow.scale:
        raise Unfollowed("it is not homogeneous")
    return tie_all(flow, node)


MIXING: dict[Any, Any] = {
    _OURS.rms_norm.default: normed,
    _ATEN.rms_norm.default: normed,
    _ATEN.layer_norm.default: normed,
    _ATEN.group_norm.default: group_normed,
    _OURS.attention.default: attention,
    _ATEN.scaled_dot_product_attention.default: attention,
    _OURS.rotary.default: rotated,
    _OURS.gated.default: gated,
    _OURS.quick_gelu.default: activated,
}
