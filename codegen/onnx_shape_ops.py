"""ATen's operations that move, cut and join axes, in ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as oir

from .onnx_builder import Builder, Value
from .onnx_call import Call, Table
from .onnx_sizes import Size, is_size, size, size_list, size_vector

END = (1 << 63) - 1


def reshape(
    b: Builder, value: Value, before: Sequence[Size] | None, after: Sequence[Size]
) -> Value:
    """`value` of shape `before` in shape `after`; before=None: unknown to the caller.

    A length that equals the input's at the same place is written as 0 (keep) and one more unknown
    as -1, so that most shapes are constants.
    """
    if before is not None and list(before) == list(after):
        return value
    plan: list[Any] = []
    free = False
    for place, length in enumerate(after):
        if isinstance(length, int) and length != 0:
            plan.append(length)
        elif before is not None and place < len(before) and before[place] == length:
            plan.append(0)
        elif not free and length != 0:
            free = True
            plan.append(-1)
        else:
            plan.append(length)
    return b.op("Reshape", value, size_list(b, plan))


def transpose(b: Builder, value: Value, order: Sequence[int]) -> Value:
    """The axes of `value` in a new order; itself where that is the old one."""
    if list(order) == list(range(len(order))):
        return value
    return b.op("Transpose", value, perm=list(order))


def expand(b: Builder, value: Value, before: Sequence[Size], after: Sequence[Size]) -> Value:
    """Broadcast from shape `before` to `after` (which may have more axes in front)."""
    padded = [1] * (len(after) - len(before)) + list(before)
    if padded == list(after):
        same_rank = len(before) == len(after)
        return value if same_rank else reshape(b, value, before, after)
    target = [1 if old == new else new for old, new in zip(padded, after, strict=True)]
    return b.op("Expand", value, size_list(b, target))


def cut(b: Builder, value: Value, axis: int, start: Any, stop: Any, step: int = 1) -> Value:
    """value[start:stop:step] along an axis; the ends may be sizes of run time."""
    ends = [size_vector(b, end) for end in (start, stop)]
    return b.op("Slice", value, ends[0], ends[1], b.ints([axis]), b.ints([step]))


def _view(call: Call) -> Value:
    return reshape(call.b, call.value("self"), call.shape_of("self"), call.shape)


def _transpose(call: Call) -> Value:
    order = list(range(call.rank("self")))
    first, second = call.axis(call["dim0"]), call.axis(call["dim1"])
    order[first], order[second] = order[second], order[first]
    return transpose(call.b, call.value("self"), order)


def _permute(call: Call) -> Value:
    return transpose(call.b, call.value("self"), [call.axis(axis) for axis in call["dims"]])


def _t(call: Call) -> Value:
    return transpose(call.b, call.value("self"), list(range(call.rank("self")))[::-1])


def _expand(call: Call) -> Value:
    return expand(call.b, call.value("self"), call.shape_of("self"), call.shape)


def _copy(call: Call) -> Value:
    """A tensor of self's shape and dtype with the values of src."""
    source = call.value("src", call.dtype)
    return expand(call.b, source, call.shape_of("src"), call.shape)


def _unsqueeze(call: Call) -> Value:
    axis = call["dim"] % (call.rank("self") + 1)
    return call.op("Unsqueeze", call.value("self"), call.b.ints([axis]))


def _squeeze(call: Call) -> Value:
    before, dims = call.shape_of("self"), call.get("dim")
    wanted = range(len(before)) if dims is None else dims if isinstance(dims, list) else [dims]
    axes = [call.axis(axis) for axis in wanted]
    axes = [axis for axis in axes if before[axis] == 1]
    value = call.value("self")
    return call.op("Squeeze", value, call.b.ints(axes)) if axes else value


def _slice(call: Call) -> Value:
    axis = call.axis(call["dim"])
    if call.shape_of("self")[axis] == call.shape[axis] and call["step"] == 1:
        return call.value("self")
    start, stop = call.get("start", 0), call.get("end", END)
    return cut(call.b, call.value("self"), axis, start, stop, call["step"])


def _select(call: Call) -> Value:
    index = call["index"]
    at = call.of(index) if is_size(index) else call.b.constant(index, oir.DataType.INT64)
    return call.op("Gather", call.value("self"), at, axis=call.axis(call["dim"]))


def _cat(call: Call) -> Value:
    nodes = [node for node in call["tensors"] if node.meta["val"].shape != (0,)]
    parts = [call.of(node, call.dtype) for node in nodes]
    axis = call["dim"] % len(call.shape)
    return parts[0] if len(parts) == 1 else call.op("Concat", *parts, axis=axis)


def _stack(call: Call) -> Value:
    axis = call["dim"] % len(call.shape)
    at = call.b.ints([axis])
    parts = [call.op("Unsqueeze", call.of(node, call.dtype), at) for node in call["tensors"]]
    return parts[0] if len(parts) == 1 else call.op("Concat", *parts, axis=axis)


def _split(call: Call) -> list[Value]:
    """All forms of split, chunk: the lengths are the results' own."""
    parts = call.node.meta["val"]
    axis = call.axis(call.get("dim", 0))
    if len(parts) == 1:
        return [call.value("self")]
    lengths = size_list(call.b, [size(part.shape[axis]) for part in parts])
    inputs = [call.value("self"), lengths]
    return call.b.ops("Split", inputs, [None] * len(parts), axis=axis)


def _unbind(call: Call) -> list[Value]:
    axis = call.axis(call.get("dim", 0))
    value, count = call.value("self"), len(call.node.meta["val"])
    at = [call.b.constant(place, oir.DataType.INT64) for place in range(count)]
    return [call.op("Gather", value, place, axis=axis) for place in at]


def _repeat(call: Call) -> Value:
    before, times = call.shape_of("self"), call["repeats"]
    value = call.value("self")
    if len(times) > len(before):
        wide = [1] * (len(times) - len(before)) + before
        value = reshape(call.b, value, before, wide)
    return call.op("Tile", value, size_list(call.b, times))


def _repeat_interleave(call: Call) -> Value:
    """Every element `repeats` times in a row, along one axis or over the flattened tensor."""
    before, times, value = call.shape_of("self"), call["repeats"], call.value("self")
    if call.get("dim") is None:
        value = call.op("Reshape", value, call.b.ints([-1]))
        return _interleave(call, value, 0, 1, times)
    return _interleave(call, value, call.axis(call["dim"]), len(before), times)


def _interleave(call: Call, value: Value, axis: int, rank: int, times: Any) -> Value:
    wide = call.op("Unsqueeze", value, call.b.ints([axis + 1]))
    ones: list[Any] = [1] * (rank + 1)
    ones[axis + 1] = size(times)
    wide = call.op("Expand", wide, size_list(call.b, ones))
    return reshape(call.b, wide, None, call.shape)


def _flip(call: Call) -> Value:
    axes = [call.axis(axis) for axis in call["dims"]]
    ends = [call.b.ints([end] * len(axes)) for end in (-1, -END - 1)]
    steps = call.b.ints([-1] * len(axes))
    return call.op("Slice", call.value("self"), *ends, call.b.ints(axes), steps)


def _pad(call: Call) -> Value:
    """constant_pad_nd: pairs (before, after), last axis first; negative pads cut."""
    pads, rank = call["pad"], call.rank("self")
    before: list[Any] = [0] * rank
    after: list[Any] = [0] * rank
    for place in range(len(pads) // 2):
        before[rank - 1 - place], after[rank - 1 - place] = pads[2 * place : 2 * place + 2]
    fill = call.b.constant(call.get("value", 0), call.dtype)
    return call.op("Pad", call.value("self"), size_list(call.b, [*before, *after]), fill)


def _slice_scatter(call: Call) -> Value:
    """self with src in place of self[start:end]."""
    axis, full = call.axis(call["dim"]), call.shape
    source = call.value("src", call.dtype)
    start, stop = call.get("start", 0), call.get("end", END)
    if call.shape_of("src")[axis] == full[axis]:
        return source
    if call["step"] != 1 or any(not is_size(e) and e < 0 for e in (start, stop)):
        raise call.refuse("slice_scatter with a step or with negative ends")
    parts = [cut(call.b, call.value("self"), axis, 0, start)] if start != 0 else []
    parts.append(source)
    parts.append(cut(call.b, call.value("self"), axis, stop, END))
    return call.op("Concat", *parts, axis=axis)


def _select_scatter(call: Call) -> Value:
    axis, index = call.axis(call["dim"]), call["index"]
    source = call.op("Unsqueeze", call.value("src", call.dtype), call.b.ints([axis]))
    parts = [source]
    if index != 0:
        parts.insert(0, cut(call.b, call.value("self"), axis, 0, index))
    if index != -1:
        parts.append(cut(call.b, call.value("self"), axis, index + 1, END))
    return call.op("Concat", *parts, axis=axis)


def _triangle(call: Call, upper: int) -> Value:
    diagonal = call.b.constant(call["diagonal"], oir.DataType.INT64)
    return call.op("Trilu", call.value("self"), diagonal, upper=upper)


_RESHAPES = ("view", "_unsafe_view", "reshape", "flatten", "unflatten", "_reshape_copy")
TABLE: Table = {
    **{f"aten.{name}": _view for name in _RESHAPES},
    "aten.transpose": _transpose,
    "aten.permute": _permute,
    "aten.t": _t,
    "aten.numpy_T": _t,
    "aten.expand": _expand,
    "aten.copy": _copy,
    "aten.unsqueeze": _unsqueeze,
    "aten.squeeze": _squeeze,
    "aten.slice": _slice,
    "aten.select": _select,
    "aten.cat": _cat,
    "aten.concat": _cat,
    "aten.stack": _stack,
    "aten.split": _split,
    "aten.split_with_sizes": _split,
    "aten.chunk": _split,
    "aten.unbind": _unbind,
    "aten.repeat": _repeat,
    "aten.repeat_interleave.self_int": _repeat_interleave,
    "aten.flip": _flip,
    "aten.constant_pad_nd": _pad,
    "aten.slice_scatter": _slice_scatter,
    "aten.select_scatter": _select_scatter,
    "aten.tril": lambda call: _triangle(call, 0),
    "aten.triu": lambda call: _triangle(call, 1),
}
