"""ATen's operations that make tensors from nothing but sizes, in ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as oir

from .onnx_builder import INT64, Value
from .onnx_call import Call, Table
from .onnx_sizes import size_list


def _arange(call: Call) -> Value:
    """start, start + step, ...: in the result's dtype."""
    inner = call.dtype if call.dtype.is_floating_point() else INT64
    start, step = call.get("start", 0), call.get("step", 1)
    ends = [call.of(value, inner) for value in (start, call["end"], step)]
    return call.b.cast(call.op("Range", *ends, dtype=inner), call.dtype)


def _filled(call: Call, fill: Any) -> Value:
    if not call.shape:
        return call.b.constant(fill, call.dtype)
    value = oir.Tensor(np.asarray([fill], call.dtype.numpy()))
    shape = size_list(call.b, call.shape)
    return call.op("ConstantOfShape", shape, value=value, dtype=call.dtype)


def _full(call: Call) -> Value:
    fill = call["fill_value"]
    if isinstance(fill, (bool, int, float)):
        return _filled(call, fill)
    return call.op("Expand", call.of(fill, call.dtype), size_list(call.b, call.shape))


def _scalar_tensor(call: Call) -> Value:
    return call.of(call["s"], call.dtype)


TABLE: Table = {
    "aten.arange": _arange,
    "aten.scalar_tensor": _scalar_tensor,
    **{f"aten.{name}": _full for name in ("full", "full_like", "new_full")},
    **{f"aten.{name}": lambda c: _filled(c, 0) for name in ("zeros", "zeros_like", "new_zeros")},
    **{f"aten.{name}": lambda c: _filled(c, 1) for name in ("ones", "ones_like", "new_ones")},
    # The contents of an empty tensor are anything, so zeros will do.
    **{f"aten.{name}": lambda c: _filled(c, 0) for name in ("empty", "empty_like", "new_empty")},
}
