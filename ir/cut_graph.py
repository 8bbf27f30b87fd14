"""The literal sizes of a graph after a cut: views, splits, slices, norms and repeats follow.

Each value has a mask of what is kept, from the channels of its elements. The kept elements, in
their order, must again be a tensor: along each axis every row that keeps anything keeps as many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .axes_channels import narrowed
from .errors import PlanishError
from .pattern import bound_arguments
from .program import Node
from .text import op_text

_ATEN = torch.ops.aten


class CannotCut(PlanishError):
    """These channels cannot be cut: something on their way needs them, or the rest is ragged."""


def cannot_cut(node: Node, why: str) -> CannotCut:
    return CannotCut(
        f"{op_text(node)} %{node.name} forbids the cut: {why}",
        where=str(node.meta.get("module", "")),
        expected="channels that are cut alike in every value they reach",
        found=why,
        fix="cut other channels, or leave these",
    )


def kept_sizes(mask: Tensor) -> list[int] | None:
    """The shape of what is kept of a value; None if that is ragged."""
    sizes: list[int] = []
    seen = narrowed(mask)[0]
    spread = [
        whole if whole > size else 0 for size, whole in zip(seen.shape, mask.shape, strict=True)
    ]
    for _ in range(mask.dim()):
        counts = seen.sum(-1)
        some = counts[counts > 0].unique()
        if len(some) > 1:
            return None
        sizes.insert(0, int(some[0]) if len(some) else 0)
        seen = counts > 0
    return [whole if whole and size else size for size, whole in zip(sizes, spread, strict=True)]


def kept_before(mask: Tensor, axis: int, place: int) -> int | None:
    """How many of the first `place` positions along an axis are kept; None if rows differ."""
    rows = narrowed(mask)[0].movedim(axis, -1) if mask.stride(axis) else mask.movedim(axis, -1)
    rows = rows.reshape(-1, rows.shape[-1])
    counts = rows[rows.any(-1)][:, :place].sum(-1).unique()
    return int(counts[0]) if len(counts) == 1 else None


class LiteralSizes:
    """Changes the literals of the nodes of one graph.

    masks: of each value that loses something (or a list of masks for one that is several), True
    where an element is kept.
    """

    def __init__(self, masks: Mapping[Node, Any]) -> None:
        self.masks = masks

    def change(self, node: Node) -> None:
        """Raises CannotCut."""
        reads = [read for read in node.all_input_nodes if read in self.masks]
        handler = _HANDLERS.get(node.target)
        if handler is not None and (reads or node in self.masks):
            handler(self, node)

    @staticmethod
    def changes(node: Node) -> bool:
        """Whether literals of this operation may follow what it reads."""
        return node.target in _HANDLERS

    def lost(self, value: Any, axis: int) -> bool:
        """Whether a value loses positions along an axis."""
        mask = self.masks.get(value)
        if not isinstance(mask, Tensor):
            return False
        sizes = kept_sizes(mask)
        return sizes is None or sizes[axis] != mask.shape[axis]

    def size(self, node: Node, value: Any, axis: int) -> int:
        sizes = kept_sizes(self.masks[value])
        if sizes is None:
            raise cannot_cut(node, f"%{value.name} would be ragged")
        return sizes[axis]

    def before(self, node: Node, value: Any, axis: int, place: int) -> int:
        found = kept_before(self.masks[value], axis, place)
        if found is None:
            raise cannot_cut(node, f"the rows of %{value.name} lose different positions")
        return found


def set_argument(node: Node, name: str, value: Any) -> None:
    """Give an argument by its schema name another value, where it stands."""
    target: Any = node.target
    for place, argument in enumerate(target._schema.arguments):
        if argument.name == name:
            if place < len(node.args):
                node.args = (*node.args[:place], value, *node.args[place + 1 :])
            else:
                node.kwargs = {**node.kwargs, name: value}
            return
    raise AssertionError(f"{target} has no argument {name}")


def _shape_of(name: str, infers: bool) -> Callable[[LiteralSizes, Node], None]:
    """infers: a size of -1 is what all others leave."""

    def change(cut: LiteralSizes, node: Node) -> None:
        mask = cut.masks.get(node)
        if not isinstance(mask, Tensor):
            return
        sizes = list(bound_arguments(node)[name])
        offset = mask.dim() - len(sizes)
        for axis, literal in enumerate(sizes):
            if cut.lost(node, axis + offset) and literal != -1:
                if isinstance(literal, int):
                    sizes[axis] = cut.size(node, node, axis + offset)
                elif not infers or -1 in sizes:
                    raise cannot_cut(node, "a size that follows from the inputs would change")
                else:
                    sizes[axis] = -1
        set_argument(node, name, sizes)

    return change


def _slice(cut: LiteralSizes, node: Node) -> None:
    given = bound_arguments(node)
    source = given["self"]
    mask = cut.masks.get(source)
    if not isinstance(mask, Tensor):
        return
    axis, size = given["dim"] % mask.dim(), mask.shape[given["dim"]]
    if not cut.lost(source, axis):
        return
    if given["step"] != 1:
        _strided(node, mask, axis, given)
        return
    for name in ("start", "end"):
        place = given[name]
        if isinstance(place, int) and place < size and place != 0:
            place = place + size if place < 0 else place
            set_argument(node, name, cut.before(node, source, axis, place))
        elif isinstance(place, (fx.Node, torch.SymInt)):
            raise cannot_cut(node, "its place follows from the inputs")


def _strided(node: Node, mask: Tensor, axis: int, given: dict[str, Any]) -> None:
    """Every n-th position: what is kept of it must again be every n-th of what is kept."""
    rows = mask.movedim(axis, -1).reshape(-1, mask.shape[axis]).unique(dim=0)
    rows = rows[rows.any(-1)]
    if len(rows) != 1:
        raise cannot_cut(node, "its rows lose different positions")
    taken = torch.zeros_like(rows[0])
    taken[given["start"] : given["end"] : given["step"]] = True
    places = (rows[0].cumsum(0) - 1)[taken & rows[0]].tolist()
    first, end = places[0], places[-1] + 1
    if places != list(range(first, end, given["step"])):
        raise cannot_cut(node, "what is left of every n-th channel is not every n-th any more")
    set_argument(node, "start", first)
    set_argument(node, "end", end)


def _narrow(cut: LiteralSizes, node: Node) -> None:
    given = bound_arguments(node)
    if cut.lost(given["self"], given["dim"]):
        start, end = given["start"], given["start"] + given["length"]
        first = cut.before(node, given["self"], given["dim"], start)
        set_argument(node, "start", first)
        last = cut.before(node, given["self"], given["dim"], end)
        set_argument(node, "length", last - first)


def _select(cut: LiteralSizes, node: Node) -> None:
    given = bound_arguments(node)
    if cut.lost(given["self"], given["dim"]):
        size = cut.masks[given["self"]].shape[given["dim"]]
        place = cut.before(node, given["self"], given["dim"], given["index"] % size)
        set_argument(node, "index", place)


def _split(cut: LiteralSizes, node: Node) -> None:
    given = bound_arguments(node)
    parts, axis = cut.masks.get(node), given["dim"]
    if not isinstance(parts, list):
        return
    sizes: list[int] = []
    for part in parts:
        found = kept_sizes(part)
        if found is None:
            raise cannot_cut(node, "its parts would be ragged")
        sizes.append(found[axis])
    if sizes == [part.shape[axis] for part in parts]:
        return
    node.target = _ATEN.split_with_sizes.default
    node.args, node.kwargs = (given["self"], sizes, axis), {}


def _unbind(cut: LiteralSizes, node: Node) -> None:
    given = bound_arguments(node)
    if cut.lost(given["self"], given["dim"]):
        raise cannot_cut(node, "it takes the channels one by one")


def _layer_norm(cut: LiteralSizes, node: Node) -> None:
    given = bound_arguments(node)
    source = given["input"]
    if cut.lost(source, -1):
        shape = [*given["normalized_shape"][:-1], cut.size(node, source, -1)]
        set_argument(node, "normalized_shape", shape)


def _repeats(cut: LiteralSizes, node: Node) -> None:
    given = bound_arguments(node)
    axis, source = given["dim"], given["self"]
    if axis is not None and node in cut.masks:
        new = cut.size(node, node, axis)
        old = cut.size(node, source, axis) if source in cut.masks else cut.masks[node].shape[axis]
        if new % max(old, 1):
            raise cannot_cut(node, f"{new} positions are no multiple of {old}")
        if source in cut.masks:
            set_argument(node, "repeats", new // max(old, 1))


def _mixes(cut: LiteralSizes, node: Node) -> None:
    given = bound_arguments(node)
    source: Any = given.get("self", given.get("input"))
    dims = given.get("dim")
    mask = cut.masks.get(source)
    if not isinstance(mask, Tensor):
        return
    dims = range(mask.dim()) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    if any(cut.lost(source, axis) for axis in dims):
        raise cannot_cut(node, "it depends on how many channels there are")


def _grouped(cut: LiteralSizes, node: Node) -> None:
    """A convolution of each channel on its own has as many groups as channels."""
    given = bound_arguments(node)
    if cut.lost(given["input"], 1) and given["groups"] > 1:
        set_argument(node, "groups", cut.size(node, given["input"], 1))


def _refused(cut: LiteralSizes, node: Node) -> None:
    raise cannot_cut(node, "it is not followed when channels are cut")


_HANDLERS: dict[Any, Callable[[LiteralSizes, Node], None]] = {
    _ATEN.view.default: _shape_of("size", infers=True),
    _ATEN._unsafe_view.default: _shape_of("size", infers=True),
    _ATEN.reshape.default: _shape_of("shape", infers=True),
    _ATEN.expand.default: _shape_of("size", infers=False),
    _ATEN.slice.Tensor: _slice,
    _ATEN.narrow.default: _narrow,
    _ATEN.select.int: _select,
    _ATEN.split.Tensor: _split,
    _ATEN.split_with_sizes.default: _split,
    _ATEN.chunk.default: _split,
    _ATEN.unbind.int: _unbind,
    _ATEN.layer_norm.default: _layer_norm,
    _ATEN.rms_norm.default: _layer_norm,
    _ATEN.repeat_interleave.self_int: _repeats,
    _ATEN.mean.dim: _mixes,
    _ATEN.amax.default: _mixes,
    _ATEN.amin.default: _mixes,
    _ATEN.softmax.int: _mixes,
    _ATEN._softmax.default: _mixes,
    _ATEN.var.correction: _mixes,
    _ATEN.conv1d.default: _grouped,
    _ATEN.conv2d.default: _grouped,
    _ATEN.convolution.default: _grouped,
    _ATEN.group_norm.default: _refused,
    _ATEN.roll.default: _refused,
    _ATEN.unfold.default: _refused,
    _ATEN.repeat.default: _refused,
    _ATEN.index.Tensor: lambda cut, node: _indexed(cut, node),
}


def _indexed(cut: LiteralSizes, node: Node) -> None:
    source, indices = node.args[0], node.args[1]
    for axis, index in enumerate(indices):  # type: ignore[arg-type]
        if index is not None and cut.lost(source, axis):
            raise cannot_cut(node, "it chooses among the channels by number")


__all__ = ["CannotCut", "LiteralSizes", "cannot_cut", "kept_before", "kept_sizes", "set_argument"]
