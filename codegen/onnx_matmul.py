"""Matrix products and convolutions in ONNX."""

from __future__ import annotations

from typing import Any

from .onnx_builder import Value
from .onnx_call import Call, Table
from .onnx_quantized import matrix_product
from .onnx_weights import is_weight, packed, transposed_weight


def _linear(call: Call) -> Value:
    weight, x, bias = call["weight"], call.value("input"), call.optional("bias")
    encoded = packed(call.b, weight)
    if encoded is not None and len(encoded.shape) == 2 and encoded.axis == -1:
        return matrix_product(call.b, weight, encoded, x, bias)
    if is_weight(weight) and encoded is None and call.rank("weight") == 2:
        matrix = transposed_weight(call.b, weight)
    elif call.rank("weight") == 2:
        matrix = call.op("Transpose", call.value("weight"), perm=[1, 0])
    else:
        raise call.refuse("a linear with a weight that is not a matrix")
    product = call.op("MatMul", x, matrix)
    return product if bias is None else call.op("Add", product, bias)


def _product(call: Call, left: str, right: str) -> Value:
    """left @ right, on integer codes where `right` [in, out] is stored so along `in`."""
    encoded = packed(call.b, call[right])
    if encoded is not None and len(encoded.shape) == 2 and encoded.axis == -2:
        return matrix_product(call.b, call[right], encoded, call.value(left), None)
    return call.op("MatMul", call.value(left), call.value(right))


def _scaled_sum(call: Call, product: Value) -> Value:
    """beta * self + alpha * product."""
    alpha, beta = call.get("alpha", 1), call.get("beta", 1)
    added = call.value("self")
    if alpha != 1:
        product = call.op("Mul", product, call.number(alpha))
    if beta == 0:
        return product
    if beta != 1:
        added = call.op("Mul", added, call.number(beta))
    return call.op("Add", product, added)


def _convolution(call: Call) -> Value:
    """Every form of convolution; string paddings are those of ONNX."""
    rank = call.rank("weight") - 2
    if call.get("transposed", False):
        raise call.refuse("a transposed convolution")
    attributes: dict[str, Any] = {
        "strides": _per_axis(call.get("stride", 1), rank),
        "dilations": _per_axis(call.get("dilation", 1), rank),
        "group": call.get("groups", 1),
    }
    padding = call.get("padding", 0)
    if isinstance(padding, str):
        attributes["auto_pad"] = "SAME_UPPER" if padding == "same" else "VALID"
    else:
        attributes["pads"] = _per_axis(padding, rank) * 2
    x = call.value("input")
    return call.op("Conv", x, call.value("weight"), call.optional("bias"), **attributes)


def _per_axis(value: int | list[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
TABLE: Table = {
    "aten.linear": _linear,
    "aten.matmul": lambda call: _product(call, "self", "other"),
    "aten.mm": lambda call: _product(call, "self", "mat2"),
    "aten.bmm": lambda call: _product(call, "self", "mat2"),
    "aten.mv": lambda call: _product(call, "self", "vec"),
    "aten.dot": lambda call: _product(call, "self", "tensor"),
    "aten.addmm": lambda call: _scaled_sum(call, _product(call, "mat1", "mat2")),
    "aten.baddbmm": lambda call: _scaled_sum(call, _product(call, "batch1", "batch2")),
    **{f"aten.{name}": _convolution for name in _CONVOLUTIONS},
}
