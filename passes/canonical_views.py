"""Canonical spellings of what only moves, cuts or reshapes values.

One operator for each meaning: `reshape` for view, _unsafe_view and reshape; `transpose` for a swap
of two axes and `permute` for any other order; `slice` and `select` for the parts of a split, chunk
or unbind; axes counted from the front; sizes that are known written as numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from ..ir.edit import shape, value_of
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from .spelling import (
    FAR,
    Known,
    Outcome,
    Same,
    Spelled,
    arguments,
    axis,
    calls,
    equal_size,
    is_tensor,
    rank,
    same_type,
)

aten = torch.ops.aten
_ORDER_KEEPING = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim)
_PERMUTING = (aten.permute.default, aten.transpose.int)


def reshape(node: Node) -> Outcome:
    """view, _unsafe_view, reshape; of a reshape, only the last counts."""
    source, sizes = arguments(node)[0], arguments(node)[1]
    assert is_tensor(source)
    if same_type(node, source):
        return Same(source)
    while calls(source, *_ORDER_KEEPING):
        source = source.args[0]
        if same_type(node, source):
            return Same(source)
    return Spelled(aten.reshape.default, (source, _known_sizes(node, sizes)))


def _known_sizes(node: Node, sizes: Any) -> list[Any]:
    """The size arguments with numbers where the result's size is a number."""
    found = shape(node)
    return [known if isinstance(known, int) else s for s, known in zip(sizes, found, strict=True)]


def expand(node: Node) -> Outcome:
    """An expand to the same sizes does nothing; of two, only the last counts."""
    source, sizes = arguments(node)[0], list(arguments(node)[1])
    if same_type(node, source):
        return Same(source)
    sizes = _known_sizes(node, sizes)
    while calls(source, aten.expand.default):
        inner = list(source.args[1])
        offset = len(sizes) - len(inner)
        sizes = [
            inner[i - offset] if i >= offset and isinstance(s, int) and s == -1 else s
            for i, s in enumerate(sizes)
        ]
        source = source.args[0]
    return Spelled(aten.expand.default, (source, sizes))


def _order(node: Any) -> list[int]:
    """For each axis of the result, the axis of the source that it is."""
    count = rank(node)
    if node.target is aten.permute.default:
        return [axis(dim, count) for dim in arguments(node)[1]]
    order = list(range(count))
    a, b = (arguments(node)[1], arguments(node)[2]) if len(arguments(node)) > 1 else (0, 1)
    a, b = axis(a, count), axis(b, count)
    order[a], order[b] = order[b], order[a]
    return order


def permute(node: Node) -> Outcome:
    """permute, transpose, t: composed, and a transpose where two axes are swapped."""
    if rank(node) < 2:
        return Same(arguments(node)[0])
    source, order = arguments(node)[0], _order(node)
    while calls(source, *_PERMUTING):
        inner = _order(source)
        order, source = [inner[i] for i in order], source.args[0]
    moved = [i for i, from_ in enumerate(order) if i != from_]
    if not moved:
        return Same(source)
    if len(moved) == 2:
        return Spelled(aten.transpose.int, (source, moved[0], moved[1]))
    return Spelled(aten.permute.default, (source, order))


def unsqueeze(node: Node) -> Outcome:
    source, dim = arguments(node)[0], axis(arguments(node)[1], rank(node))
    if calls(source, aten.squeeze.dim) and axis(source.args[1], rank(node)) == dim:
        inner = source.args[0]
        if same_type(node, inner):
            return Same(inner)
    return Spelled(aten.unsqueeze.default, (source, dim))


def squeeze(node: Node) -> Outcome:
    source, dims = arguments(node)[0], arguments(node)[1]
    if same_type(node, source):
        return Same(source)
    if isinstance(dims, (list, tuple)):
        if len(dims) != 1:
            return None
        dims = dims[0]
    dim = axis(dims, rank(source))
    if calls(source, aten.unsqueeze.default) and axis(source.args[1], rank(source)) == dim:
        return Same(source.args[0])
    return Spelled(aten.squeeze.dim, (source, dim))


def slice_(node: Node) -> Outcome:
    """A slice that keeps every element does nothing; slices of slices add up."""
    given = bound_arguments(node)
    source, step = given["self"], given["step"]
    if step == 1 and same_type(node, source):
        return Same(source)
    dim = axis(given["dim"], rank(node))
    size = shape(source)[dim]
    start, end = _bounds(given["start"], given["end"], size)
    inner = bound_arguments(source) if calls(source, aten.slice.Tensor) else None
    if inner is not None and inner["dim"] == dim and inner["step"] == 1:
        first = inner["start"]
        if all(isinstance(value, int) for value in (size, start, end, first)):
            start, end, source = first + start, first + end, inner["self"]
    return Spelled(aten.slice.Tensor, _slice_arguments(source, dim, start, end, step))


def _slice_arguments(source: Any, dim: int, start: Any, end: Any, step: Any) -> tuple[Any, ...]:
    arguments = (source, dim, start, end)
    return arguments if step == 1 else (*arguments, step)


def _bounds(start: Any, end: Any, size: Any) -> tuple[Any, Any]:
    """Start and end counted from the front; FAR for the end of an axis of free size."""
    start = 0 if start is None else start
    end = FAR if end is None or equal_size(end, size) else end
    if not isinstance(size, int):
        return start, end
    if isinstance(start, int):
        start = max(start + size, 0) if start < 0 else min(start, size)
    if isinstance(end, int):
        end = max(end + size, 0) if end < 0 else min(end, size)
    return start, end


def select(node: Node) -> Outcome:
    source, dim, index = arguments(node)
    dim = axis(dim, rank(source))
    size = shape(source)[dim]
    if isinstance(index, int) and isinstance(size, int) and index < 0:
        index += size
    return Spelled(aten.select.int, (source, dim, index))


def part(node: Node) -> Outcome:
    """An element of a split is a slice, an element of an unbind a select."""
    whole, place = arguments(node)
    if not isinstance(whole, Node) or not isinstance(place, int):
        return None
    if calls(whole, aten.unbind.int):
        given = bound_arguments(whole)
        return Spelled(aten.select.int, (given["self"], axis(given["dim"], rank(node) + 1), place))
    if not calls(whole, *_SPLITS):
        return None
    given = bound_arguments(whole)
    dim = axis(given["dim"], rank(node))
    widths = [piece.shape[dim] for piece in whole.meta["val"][: place + 1]]
    if not all(isinstance(width, int) for width in widths):
        return None
    start = sum(widths[:-1])
    return Spelled(aten.slice.Tensor, (given["self"], dim, start, start + widths[-1]))


_SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.split.sizes,
    aten.unsafe_split.Tensor,
    aten.unsafe_chunk.default,
)


def scatter_slices(node: Node) -> Outcome:
    """A buffer whose slices are all written, front to back, is a concatenation."""
    pieces: list[Any] = []
    dim: Any = None
    upto: Any = None
    buffer: Any = node
    while calls(buffer, aten.slice_scatter.default):
        given = bound_arguments(buffer)
        here = axis(given["dim"], rank(buffer))
        start, end = _bounds(given["start"], given["end"], shape(buffer)[here])
        whole = shape(buffer)[here] if isinstance(shape(buffer)[here], int) else FAR
        if given["step"] != 1 or dim not in (None, here) or end != (whole if dim is None else upto):
            return None
        dim, upto = here, start
        pieces.insert(0, given["src"])
        if upto == 0:
            return Spelled(aten.cat.default, (pieces, dim))
        buffer = given["self"]
    return None


def copy(node: Node) -> Outcome:
    """copy(old, new) is new where they have one type."""
    source = arguments(node)[1]
    return Same(source) if is_tensor(source) and same_type(node, source) else None


def cat(node: Node) -> Outcome:
    """A cat of one part is that part; empty parts add nothing."""
    parts, dim = arguments(node)[0], axis(bound_arguments(node)["dim"], rank(node))
    kept = [part for part in parts if rank(part) == rank(node) and shape(part)[dim] != 0]
    if len(kept) == 1 and same_type(node, kept[0]):
        return Same(kept[0])
    if {value_of(part).dtype for part in kept} != {value_of(part).dtype for part in parts}:
        kept = parts
    return Spelled(aten.cat.default, (kept, dim))


def size(node: Node) -> Outcome:
    value = node.meta.get("val")
    return Known(value) if isinstance(value, int) else None


VIEW_RULES: dict[Any, Callable[[Node], Outcome]] = {
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten.reshape.default), reshape),
    aten.expand.default: expand,
    **dict.fromkeys((*_PERMUTING, aten.t.default), permute),
    aten.unsqueeze.default: unsqueeze,
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims), squeeze),
    aten.slice.Tensor: slice_,
    aten.select.int: select,
    operator.getitem: part,
    aten.slice_scatter.default: scatter_slices,
    aten.copy.default: copy,
    aten.cat.default: cat,
    aten.sym_size.int: size,
}
