"""ATen's operations that read and write by index, in ONNX."""

from __future__ import annotations

from typing import Any

from torch import fx

from .onnx_builder import BOOL, INT64, Value
from .onnx_call import Call, Table
from .onnx_embedding import embedding_rows
from .onnx_shape_ops import transpose
from .onnx_sizes import is_size, size_list, sizes
from .onnx_weights import packed


def _embedding(call: Call) -> Value:
    ids, table = call.value("indices", INT64), call["weight"]
    encoded = packed(call.b, table)
    if encoded is not None:
        rows = embedding_rows(call.b, table, encoded, ids)
        if rows is not None:
            return rows
    return call.op("Gather", call.value("weight"), ids, axis=0)


def _index(call: Call) -> Value:
    """self[i, j, :, k]: advanced indexing by integer tensors, as NumPy defines it."""
    given = list(call["indices"])
    axes = [axis for axis, index in enumerate(given) if index is not None]
    nodes = [given[axis] for axis in axes]
    if any(node.meta["val"].dtype.itemsize == 1 for node in nodes):
        return _masked(call, nodes)
    value, rank = call.value("self"), call.rank("self")
    if len(axes) == 1:
        return call.op("Gather", value, call.of(nodes[0], INT64), axis=axes[0])
    rest = [axis for axis in range(rank) if axis not in axes]
    value = transpose(call.b, value, [*axes, *rest])
    found = call.op("GatherND", value, _stacked(call, nodes), dtype=value.dtype)
    adjacent = axes == list(range(axes[0], axes[-1] + 1))
    if not adjacent or axes[0] == 0:
        return found
    # The index's axes come first; they belong where the first indexed axis was.
    count, front, end = len(call.shape) - len(rest), axes[0], len(call.shape)
    moved = range(count, count + front)
    return transpose(call.b, found, [*moved, *range(count), *range(count + front, end)])


def _stacked(call: Call, nodes: list[Any]) -> Value:
    """Index tensors broadcast together and stacked along a new last axis."""
    shape = _broadcast([sizes(node.meta["val"].shape) for node in nodes])
    target = size_list(call.b, shape)
    parts: list[Value] = []
    for node in nodes:
        part = call.of(node, INT64)
        if sizes(node.meta["val"].shape) != shape:
            part = call.op("Expand", part, target)
        parts.append(call.op("Unsqueeze", part, call.b.ints([-1])))
    return call.op("Concat", *parts, axis=-1)


def _broadcast(shapes: list[list[Any]]) -> list[Any]:
    rank = max(len(shape) for shape in shapes)
    padded = [[1] * (rank - len(shape)) + shape for shape in shapes]
    return [next((n for n in lengths if n != 1), 1) for lengths in zip(*padded, strict=True)]


def _masked(call: Call, nodes: list[Any]) -> Value:
    """self[mask] with one boolean mask over the leading axes."""
    if len(nodes) != 1 or call["indices"][0] is None:
        raise call.refuse("indexing by several masks, or by a mask of inner axes")
    places = call.op("NonZero", call.of(nodes[0], BOOL), dtype=INT64)
    places = call.op("Transpose", places, perm=[1, 0])
    return call.op("GatherND", call.value("self"), places)


def _index_put(call: Call) -> Value:
    given = list(call["indices"])
    if any(node is None or node.meta["val"].dtype.itemsize == 1 for node in given):
        raise call.refuse("writing by index other than by integer tensors of the leading axes")
    places = _stacked(call, given)
    shape = _broadcast([sizes(node.meta["val"].shape) for node in given])
    target = [*shape, *call.shape[len(given) :]]
    values = call.value("values", call.dtype)
    if sizes(call["values"].meta["val"].shape) != target:
        values = call.op("Expand", values, size_list(call.b, target))
    reduction = "add" if call.get("accumulate", False) else "none"
    return call.op("ScatterND", call.value("self"), places, values, reduction=reduction)


def _index_select(call: Call) -> Value:
    axis = call.axis(call["dim"])
    return call.op("Gather", call.value("self"), call.value("index", INT64), axis=axis)


def _gather(call: Call) -> Value:
    """Elements by index along one axis; ATen lets every other axis of the index be shorter."""
    axis, places = call.axis(call["dim"]), call.value("index", INT64)
    value = call.value("self")
    if not call.shape:
        return value
    before, wanted = call.shape_of("self"), call.shape_of("index")
    shorter = [a for a in range(len(before)) if a != axis and before[a] != wanted[a]]
    if shorter:
        ends = size_list(call.b, [wanted[a] for a in shorter])
        starts = call.b.ints([0] * len(shorter))
        value = call.op("Slice", value, starts, ends, call.b.ints(shorter))
    return call.op("GatherElements", value, places, axis=axis)


def _scatter(call: Call, reduction: str = "none") -> Value:
    axis, places = call.axis(call["dim"]), call.value("index", INT64)
    source = call.first("src", "value") if "src" in call.args or "value" in call.args else None
    wanted = call.shape_of("index")
    if isinstance(source, fx.Node) and not is_size(source):
        updates = call.of(source, call.dtype)
        if sizes(source.meta["val"].shape) != wanted:
            raise call.refuse("scatter of a source larger than its index")
    else:
        updates = call.op("Expand", call.of(source, call.dtype), size_list(call.b, wanted))
    more: dict[str, Any] = {"axis": axis, "reduction": reduction}
    return call.op("ScatterElements", call.value("self"), places, updates, **more)


def _nonzero(call: Call) -> Value:
    places = call.op("NonZero", call.value("self"), dtype=INT64)
    return call.op("Transpose", places, perm=[1, 0])


TABLE: Table = {
    "aten.embedding": _embedding,
    "aten.index": _index,
    "aten.index_put": _index_put,
    "aten.index_select": _index_select,
    "aten.gather": _gather,
    "aten.scatter": _scatter,
    "aten.scatter_add": lambda call: _scatter(call, "add"),
    "aten.nonzero": _nonzero,
}
