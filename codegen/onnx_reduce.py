"""ATen's reductions, softmax, sorting and cumulative sums in ONNX."""

from __future__ import annotations

from functools import reduce
from typing import Any

from .onnx_builder import BOOL, INT32, INT64, Value
from .onnx_call import Call, Table, Translation
from .onnx_sizes import size_scalar, size_vector


def _axes(call: Call) -> list[int]:
    dims = call.get("dim")
    if dims is None or dims == []:
        return list(range(call.rank("self")))
    return [call.axis(axis) for axis in (dims if isinstance(dims, (list, tuple)) else [dims])]


def _reduce(op_type: str) -> Translation:
    """Over some axes or all; computed in the result's dtype."""

    def translate(call: Call) -> Value:
        value = call.value("self", call.dtype)
        return _over(call, op_type, value)

    return translate


def _over(call: Call, op_type: str, value: Value) -> Value:
    axes = _axes(call)
    if not axes:
        return value
    keep = int(call.get("keepdim", False))
    return call.op(op_type, value, call.b.ints(axes), keepdims=keep)


def _variance(call: Call) -> tuple[Value, Value]:
    """Variance and mean: sum of squared deviations / (count - correction)."""
    b, axes = call.b, _axes(call)
    x, places = call.value("self"), b.ints(axes)
    centre = call.op("ReduceMean", x, places, keepdims=1)
    deviation = call.op("Sub", x, centre)
    squares = call.op("Mul", deviation, deviation)
    keep = int(call.get("keepdim", False))
    total = call.op("ReduceSum", squares, places, keepdims=keep)
    shape = call.shape_of("self")
    counts = [b.cast(size_scalar(b, shape[axis]), call.dtype) for axis in axes]
    count = reduce(lambda left, right: call.op("Mul", left, right), counts)
    count = call.op("Sub", count, call.number(call.get("correction", 1)))
    mean = centre if keep else call.op("ReduceMean", x, places, keepdims=0)
    return call.op("Div", total, count), mean


def _average_pool(call: Call) -> Value | None:
    """adaptive_avg_pool to one value a channel; other sizes decompose."""
    wanted = list(call["output_size"])
    if any(length != 1 for length in wanted):
        return None
    axes = list(range(-len(wanted), 0))
    return call.op("ReduceMean", call.value("self"), call.b.ints(axes), keepdims=1)


def _truth(op_type: str) -> Translation:
    """any and all: the largest or smallest of 0 and 1."""

    def translate(call: Call) -> Value:
        number = call.b.cast(call.value("self", BOOL), INT32)
        return call.b.cast(_over(call, op_type, number), BOOL)

    return translate


def _extreme(values: str, indices: str) -> Translation:
    """max.dim and min.dim: values and their places."""

    def translate(call: Call) -> list[Value]:
        x, axis, keep = call.value("self"), call.axis(call["dim"]), int(call["keepdim"])
        best = call.op(values, x, call.b.ints([axis]), keepdims=keep)
        return [best, call.op(indices, x, axis=axis, keepdims=keep, dtype=INT64)]

    return translate


def _arg(op_type: str) -> Translation:
    def translate(call: Call) -> Value:
        x, axis = call.value("self"), call.get("dim")
        if axis is not None:
            keep = int(call["keepdim"])
            return call.op(op_type, x, axis=call.axis(axis), keepdims=keep, dtype=INT64)
        flat = call.op("Reshape", x, call.b.ints([-1]))
        return call.op(op_type, flat, axis=0, keepdims=0, dtype=INT64)

    return translate


def _softmax(op_type: str) -> Translation:
    def translate(call: Call) -> Value:
        name = "self" if "self" in call.args else "input"
        axis = call.axis(call["dim"], name)
        return call.op(op_type, call.value(name, call.dtype), axis=axis)

    return translate


def _cumsum(call: Call) -> Value:
    axis = call.b.constant(call.axis(call["dim"]), INT64)
    return call.op("CumSum", call.value("self", call.dtype), axis)


def _topk(call: Call) -> list[Value]:
    inputs = [call.value("self"), size_vector(call.b, call["k"])]
    axis, largest = call.axis(call["dim"]), int(call["largest"])
    attributes: dict[str, Any] = {"axis": axis, "largest": largest, "sorted": int(call["sorted"])}
    return call.b.ops("TopK", inputs, [None, INT64], **attributes)


def _sort(call: Call) -> list[Value]:
    axis: Any = call.axis(call["dim"])
    inputs = [call.value("self"), size_vector(call.b, call.shape_of("self")[axis])]
    attributes: dict[str, Any] = {"axis": axis, "largest": int(call["descending"]), "sorted": 1}
    return call.b.ops("TopK", inputs, [None, INT64], **attributes)


TABLE: Table = {
    "aten.mean": _reduce("ReduceMean"),
    "aten.sum": _reduce("ReduceSum"),
    "aten.prod": _reduce("ReduceProd"),
    "aten.amax": _reduce("ReduceMax"),
    "aten.amin": _reduce("ReduceMin"),
    "aten.max.default": _reduce("ReduceMax"),
    "aten.min.default": _reduce("ReduceMin"),
    "aten.max.dim": _extreme("ReduceMax", "ArgMax"),
    "aten.min.dim": _extreme("ReduceMin", "ArgMin"),
    "aten.logsumexp": _reduce("ReduceLogSumExp"),
    "aten.var.correction": lambda call: _variance(call)[0],
    "aten.var_mean.correction": lambda call: list(_variance(call)),
    "aten.adaptive_avg_pool1d": _average_pool,
    "aten.adaptive_avg_pool2d": _average_pool,
    "aten.any": _truth("ReduceMax"),
    "aten.all": _truth("ReduceMin"),
    "aten.argmax": _arg("ArgMax"),
    "aten.argmin": _arg("ArgMin"),
    "aten.softmax": _softmax("Softmax"),
    "aten._softmax": _softmax("Softmax"),
    "aten.log_softmax": _softmax("LogSoftmax"),
    "aten._log_softmax": _softmax("LogSoftmax"),
    "aten.cumsum": _cumsum,
    "aten.topk": _topk,
    "aten.sort": _sort,
}
