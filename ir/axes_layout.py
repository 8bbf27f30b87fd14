"""Axis flow through operations that only move values: they run on the channel numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .axes_channels import constant_along
from .axes_walk import ChannelWalk, Unfollowed
from .axes_weights import WeightView
from .pattern import bound_arguments
from .program import Node

_ATEN = torch.ops.aten


def same(flow: ChannelWalk, node: Node) -> Any:
    """A copy or a cast: the channels of what it copies."""
    held = flow.view(node.args[0])
    return held if held is not None else flow.fit(flow.ids(node.args[0]), node)


def moved(flow: ChannelWalk, node: Node) -> Any:
    """Reshape, slice, cat, ...: the operation itself, on channel numbers."""
    held = flow.view(node.args[0]) if node.args else None
    if held is not None:
        shown = _moved_weight(flow, node, held)
        if shown is not None:
            return shown
    if node.target is _ATEN.constant_pad_nd.default and bound_arguments(node)["value"] != 0:
        raise Unfollowed("what it pads with takes no factor")
    target = _ATEN.reshape.default if node.target in _VIEWS else None
    return flow.evaluate(node, target)


def _moved_weight(flow: ChannelWalk, node: Node, view: WeightView) -> WeightView | None:
    """The weight, still as a weight; None where it is better seen as a value."""
    rank, given = len(view.shape), bound_arguments(node)
    target: Any = node.target
    if target is _ATEN.t.default:
        return view.permuted(list(reversed(range(rank))))
    if target is _ATEN.transpose.int:
        order = list(range(rank))
        a, b = given["dim0"] % rank, given["dim1"] % rank
        order[a], order[b] = order[b], order[a]
        return view.permuted(order)
    if target is _ATEN.permute.default:
        return view.permuted([axis % rank for axis in given["dims"]])
    if target is _ATEN.unsqueeze.default:
        return view.unsqueezed(given["dim"])
    if target is _ATEN.slice.Tensor and not _sizes(given):
        return view.chosen(given["dim"], slice(given["start"], given["end"], given["step"]))
    if target is _ATEN.select.int and rank > 2 and given["dim"] % rank < rank - 2:
        return view.replaced(given["dim"] % rank, 1, flow.shape(node))
    return None


def _sizes(given: dict[str, Any]) -> bool:
    return any(isinstance(value, (fx.Node, torch.SymInt)) for value in given.values())


def indexed(flow: ChannelWalk, node: Node) -> Any:
    """x[i, :, j]: the channels may not depend on the positions that are chosen by data."""
    source, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    view = flow.view(source)
    chosen = [axis for axis, index in enumerate(indices) if index is not None]
    leading = chosen == list(range(len(chosen)))
    if view is not None and leading and len(chosen) < len(view.shape):
        return view.replaced(0, len(chosen), flow.shape(node))
    ids = flow.ids(source)
    if all(isinstance(i, fx.Node) and i.op == "get_attr" for i in indices if i is not None):
        weights = flow.program.weights
        known = [i if i is None else weights[str(i.target)] for i in indices]
        return _ATEN.index.Tensor(ids, known)
    return _chosen(flow, node, ids, chosen, adjacent=_adjacent(chosen))


def index_selected(flow: ChannelWalk, node: Node) -> Any:
    source, axis = node.args[0], int(node.args[1])  # type: ignore[arg-type]
    view = flow.view(source)
    axis %= len(flow.shape(source))  # type: ignore[arg-type]
    if view is not None and axis == 0 and len(view.shape) > 2:
        return view.replaced(0, 1, flow.shape(node))
    return _chosen(flow, node, flow.ids(source), [axis], adjacent=True)


def _adjacent(chosen: list[int]) -> bool:
    return chosen == list(range(chosen[0], chosen[0] + len(chosen)))


def _chosen(
    flow: ChannelWalk, node: Node, ids: Tensor, chosen: list[int], adjacent: bool
) -> Tensor:
    if not all(constant_along(ids, axis) for axis in chosen):
        raise Unfollowed("data chooses among its channels")
    for axis in reversed(chosen):
        ids = ids.select(axis, 0)
    shape = flow.shape(node)
    first = chosen[0] if adjacent else 0
    for _ in range(len(shape) - ids.dim()):
        ids = ids.unsqueeze(first)
    return flow.fit(ids, node)


def gathered(flow: ChannelWalk, node: Node) -> Any:
    """gather, sort, topk, flip along an axis: fine where it only moves equal channels."""
    given = bound_arguments(node)
    ids = flow.ids(given["self"])
    if not constant_along(ids, given["dim"]):
        raise Unfollowed("data orders its channels")
    return flow.fit(ids.narrow(given["dim"], 0, 1), node)


def looked_up(flow: ChannelWalk, node: Node) -> Any:
    """embedding: the table's columns are the channels; its rows stay what they are."""
    view = flow.view(node.args[0])
    if view is None or len(view.shape) != 2:
        raise Unfollowed("the table is no weight")
    place, row = view.axes[1], view.axes[0]
    if place is None or row is None:
        raise Unfollowed("the table is no matrix")
    flow.produce(view, 1, "table")
    flow.pins.setdefault((view.name, row.axis), f"rows of {view.name} are looked up")
    ids = flow.axis_ids(view, 1)
    assert ids is not None
    return flow.fit(ids, node)


_VIEWS = {_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default}
_MOVES = (
    ("transpose", "int"),
    ("permute", "default"),
    ("t", "default"),
    ("unsqueeze", "default"),
    ("squeeze", "default"),
    ("squeeze", "dim"),
    ("squeeze", "dims"),
    ("expand", "default"),
    ("slice", "Tensor"),
    ("select", "int"),
    ("split", "Tensor"),
    ("split_with_sizes", "default"),
    ("chunk", "default"),
    ("unbind", "int"),
    ("cat", "default"),
    ("stack", "default"),
    ("flip", "default"),
    ("roll", "default"),
    ("repeat", "default"),
    ("repeat_interleave", "self_int"),
    ("flatten", "using_ints"),
    ("unflatten", "int"),
    ("narrow", "default"),
    ("movedim", "int"),
    ("constant_pad_nd", "default"),
    ("unfold", "default"),
)
_COPIES = (
    ("clone", "default"),
    ("contiguous", "default"),
    ("alias", "default"),
    ("type_as", "default"),
    ("detach", "default"),
    ("_to_copy", "default"),
    ("lift_fresh_copy", "default"),
)
LAYOUT: dict[Any, Any] = {
    **dict.fromkeys(_VIEWS, moved),
    **{getattr(getattr(_ATEN, packet), overload): moved for packet, overload in _MOVES},
    **{getattr(getattr(_ATEN, packet), overload): same for packet, overload in _COPIES},
    _ATEN.index.Tensor: indexed,
    _ATEN.index_select.default: index_selected,
    _ATEN.gather.default: gathered,
    _ATEN.embedding.default: looked_up,
}
