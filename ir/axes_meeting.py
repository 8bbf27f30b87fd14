"""Axis flow for cutting: where values meet element by element, shared channels cover the others.

The rules of `cut` mode for arithmetic, layout and sums. They differ from those of `width` mode,
which make one channel of all that meet, in three ways: what several channels share covers them
(`axes_covers`); a weight that meets a value has channels along every axis along which that has
some; and a value without channels (a slope per head, a state that starts at 0) takes part in the
cut where it meets channels one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .axes_arithmetic import ARITHMETIC, reduced
from .axes_channels import carries, constant_along
from .axes_covers import alike, copies, meet, rows_of
from .axes_layout import index_selected, moved, same
from .axes_walk import ChannelWalk, Rule, Unfollowed
from .axes_weights import WeightView
from .look_through import number
from .pattern import bound_arguments
from .program import Node

_ATEN, _OURS = torch.ops.aten, torch.ops.planish
ATTENTIONS = {_OURS.attention.default, _ATEN.scaled_dot_product_attention.default}


def meet_all(flow: ChannelWalk, node: Node) -> Any:
    """An operation on elements: its inputs' channels meet."""
    reads = [read for read in node.all_input_nodes if isinstance(read.meta.get("val"), Tensor)]
    views = {read: view for read in reads if (view := flow.view(read)) is not None}
    if len(reads) == 1 and views:
        return views[reads[0]]  # still a weight, of which each entry is changed on its own
    total = flow.no_channels(node)
    for read in reads:
        if read not in views:
            total = meet(flow.channels, total, flow.fit(flow.ids(read), node))
    for view in views.values():
        total = meet(flow.channels, total, flow.fit(weight_met(flow, view, total), node))
    for read in reads:
        if read not in views and not carries(flow.ids(read)):
            total = meet_bare(flow, node, read, total)
    return total


def weight_met(flow: ChannelWalk, view: WeightView, other: Tensor, what: str = "value") -> Tensor:
    """The channels of a weight that meets a value: along its last axis, and along every axis along
    which the value has some."""
    rank, own = len(view.shape), view.channel_axis()
    found = torch.zeros(view.shape, dtype=torch.int64)
    for axis in range(rank):
        place, size = view.axes[axis], view.shape[axis]
        if place is None or size == 1:
            continue
        near = axis - rank
        varied = -near <= other.dim() and other.shape[near] == size
        if axis != own and not (varied and not constant_along(other, near)):
            flow.pins.setdefault((view.name, place.axis), f"{view.name} is also read whole")
            continue
        ids = flow.axis_ids(view, axis)
        assert ids is not None
        flow.produce(view, axis, what)
        found = meet(flow.channels, found, ids.reshape([-1, *([1] * (-near - 1))]))
    return found


def meet_bare(flow: ChannelWalk, node: Node, read: Any, ids: Tensor) -> Tensor:
    """The node's channels, met with a value that has none: one channel per place of it.

    ids: of the node's shape, or one that broadcasts with it. Only axes along which they differ
    count; a value that is spread along all of them is left alone.
    """
    if not isinstance(read, fx.Node) or not isinstance(read.meta.get("val"), Tensor):
        return ids
    shape = flow.shape(read)
    sizes = [1] * len(shape)
    for axis in range(-min(len(shape), ids.dim()), 0):
        if shape[axis] > 1 and ids.shape[axis] == shape[axis] and not constant_along(ids, axis):
            sizes[axis] = shape[axis]
    if torch.Size(sizes).numel() == 1:
        return ids
    own = flow.channels.new(torch.Size(sizes).numel()).reshape(sizes)
    own = torch.where(_reached(ids, sizes), own, 0)
    flow.bare[node, read] = own.expand(shape)
    return meet(flow.channels, ids, own)


def _reached(ids: Tensor, sizes: list[int]) -> Tensor:
    """Where a value of these sizes meets channels only."""
    found = ids != 0
    while found.dim() > len(sizes):
        found = found.all(0)
    while found.dim() < len(sizes):
        found = found.unsqueeze(0)
    for axis, size in enumerate(sizes):
        if size == 1:
            found = found.all(axis, keepdim=True)
    return found


def _added(flow: ChannelWalk, node: Node) -> Any:
    """A weight that a number is added to keeps being one."""
    for weight, other in (node.args[:2], node.args[1::-1]):
        view, addend = flow.view(weight), number(other)
        if view is not None and addend is not None and node.target is _ATEN.add.Tensor:
            return meet_all(flow, node) if node.kwargs else view.raised_by(addend)
    return meet_all(flow, node)


def _passed(flow: ChannelWalk, node: Node) -> Any:
    return same(flow, node)


def _repeated(flow: ChannelWalk, node: Node) -> Any:
    """expand, repeat, repeat_interleave: copies along an axis of fixed size have own channels."""
    ids = moved(flow, node)
    if not isinstance(ids, Tensor) or not carries(ids):
        return ids
    source = flow.shape(node.args[0])  # type: ignore[arg-type]
    source = [1] * (ids.dim() - len(source)) + source
    for axis, size in enumerate(node.meta["val"].shape):
        times = ids.shape[axis] // max(source[axis], 1)
        if times > 1 and isinstance(size, int) and axis > 0:
            places = torch.arange(ids.shape[axis])
            inner = node.target is _ATEN.repeat_interleave.self_int
            places = places % times if inner else places // source[axis]
            ids = copies(flow.channels, ids, axis, places)
    return ids


def _joined(flow: ChannelWalk, node: Node) -> Any:
    """cat: channels that stand along other axes must be the same in all parts."""
    given = bound_arguments(node)
    ids, axis = moved(flow, node), given["dim"]
    if not isinstance(ids, Tensor):
        return ids
    parts = [flow.ids(part) for part in given["tensors"]]
    lone = all(part.shape[axis] == 1 for part in parts if part.dim())  # maybe channels, one by one
    if lone or not all(carries(part) and constant_along(part, axis) for part in parts):
        return ids
    met = parts[0].narrow(axis, 0, 1)
    for part in parts[1:]:
        met = meet(flow.channels, met, part.narrow(axis, 0, 1))
    return flow.fit(met, node)


def _summed(flow: ChannelWalk, node: Node) -> Any:
    """sum, mean, amax: over channels it is one channel of each row, or none if there is one row."""
    given = bound_arguments(node)
    ids, dims = flow.ids(given["self"]), given.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(ids.dim()))
    axes = sorted({int(d) % ids.dim() for d in dims}, reverse=True)
    across = [axis for axis in axes if not constant_along(ids, axis)]
    if len(across) != 1:
        return reduced(flow, node)
    rows = sum_over(flow, ids.movedim(across[0], -1)).unsqueeze(-1).movedim(-1, across[0])
    for axis in axes:
        rows = rows.narrow(axis, 0, 1) if given.get("keepdim") else rows.select(axis, 0)
    return flow.fit(rows, node)


def sum_over(flow: ChannelWalk, ids: Tensor) -> Tensor:
    """[..., channels] -> [...]: what a sum over the last axis leaves."""
    if ids.shape[-1] == 0:
        return ids.new_zeros(()).expand(ids.shape[:-1])
    if constant_along(ids, -1):
        return ids.select(-1, 0)
    if alike(ids):
        return ids.new_zeros(()).expand(ids.shape[:-1])
    return rows_of(flow.channels, ids)


def _index_selected(flow: ChannelWalk, node: Node) -> Any:
    """Stored places choose among channels too."""
    source, index = node.args[0], node.args[2]
    if not (isinstance(source, fx.Node) and chooses(node, source)):
        return index_selected(flow, node)
    places = flow.program.weights[str(index.target)]  # type: ignore[union-attr]
    axis = int(node.args[1])  # type: ignore[arg-type]
    ids = flow.ids(source)
    row = ids.movedim(axis, -1)
    if alike(row) and not constant_along(ids, axis) and read_in_parts(source):
        own = own_part(flow, source, row[(0,) * (row.dim() - 1)][places])
        return flow.fit(own.reshape([-1, *[1] * (ids.dim() - axis % ids.dim() - 1)]), node)
    return _ATEN.index_select.default(ids, axis, places)


def chooses(node: Node, source: Node) -> bool:
    """Whether a node is a choice of stored places of a value."""
    index = node.args[2] if node.target is _ATEN.index_select.default else None
    return isinstance(index, fx.Node) and index.op == "get_attr" and node.args[0] is source


def read_in_parts(value: Node) -> bool:
    """Whether a value is read by choices of stored places, and as the mask of attentions only."""
    return all(chooses(user, value) or reads_as_mask(user, value) for user in value.users)


def reads_as_mask(node: Node, value: Node) -> bool:
    if node.target not in ATTENTIONS:
        return False
    given = bound_arguments(node)
    masks = [name for name in ("mask", "attn_mask") if given.get(name) is value]
    return len(masks) == sum(read is value for read in given.values())


def own_part(flow: ChannelWalk, read: Node, ids: Tensor) -> Tensor:
    """Channels of what one reader takes of a value that others read too. Those of the value go when
    all that readers take goes."""
    own = torch.where(ids != 0, flow.channels.new(ids.numel()).reshape(ids.shape), 0)
    pairs = torch.stack((ids[own != 0], own[own != 0])).numpy()
    flow.channels.pools.setdefault(read.name, []).append(pairs)
    return own


def _normalized(flow: ChannelWalk, node: Node) -> Any:
    """softmax: fine along an axis of equal channels."""
    ids = flow.ids(node.args[0])
    if not constant_along(ids, int(node.args[1])):  # type: ignore[arg-type]
        raise Unfollowed("it normalizes over its channels")
    return flow.fit(ids, node)


MEETING: dict[Any, Rule] = {
    **{op: meet_all for op in ARITHMETIC if op is not _ATEN.cumsum.default},
    **dict.fromkeys((_ATEN.add.Tensor, _ATEN.add.Scalar, _ATEN.sub.Tensor), _added),
    **dict.fromkeys((_ATEN.neg.default, _ATEN.abs.default, _ATEN.relu.default), _passed),
    **dict.fromkeys(
        (_ATEN.sum.dim_IntList, _ATEN.mean.dim, _ATEN.amax.default, _ATEN.amin.default), _summed
    ),
    **dict.fromkeys(
        (_ATEN.expand.default, _ATEN.repeat.default, _ATEN.repeat_interleave.self_int), _repeated
    ),
    _ATEN.cat.default: _joined,
    _ATEN.index_select.default: _index_selected,
    **dict.fromkeys((_ATEN.softmax.int, _ATEN._softmax.default), _normalized),
}

__all__ = [
    "ATTENTIONS",
    "MEETING",
    "meet_all",
    "meet_bare",
    "own_part",
    "read_in_parts",
    "sum_over",
    "weight_met",
]
