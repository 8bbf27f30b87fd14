"""Quantized activations and products of integers in ONNX, as onnxruntime computes them fastest.

Codes are uint8 here, each 128 more than the program's: onnxruntime 1.31.1 multiplies uint8 by int8
fifteen times as fast as int8 by int8 (512 x 576 x 1536: 1.2 ms against 19 ms). Zero points are
uint8 likewise. With profile ort a product is MatMulIntegerToFloat, which also scales; rows with
scales of their own are scaled after it. onnxruntime's ReduceMax passes over NaN, so a NaN among
activations, which makes a row NaN elsewhere, is lost here.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import torch
from torch import Tensor

from ..ir.affine_form import Columns, affine_form
from ..ir.encoded import Encoded
from ..ir.program import Node
from .onnx_builder import CONTRIB, FLOAT, INT32, INT64, Builder, Value, numpy_of
from .onnx_call import Call, Table
from .onnx_shape_ops import reshape
from .onnx_weights import is_weight, packed_entry, weight_name

UINT8, INT8 = oir.DataType.UINT8, oir.DataType.INT8
_MIDDLE = 128


def _float(call: Call, name: str) -> Value:
    return call.value(name, FLOAT)


def _by_tensor(call: Call, name: str) -> bool:
    """Whether a scale or zero point is one for all rows."""
    return call.rank(name) <= 1


def _tensor_range(call: Call) -> list[Value]:
    """(codes, scale, zero) that onnxruntime finds for a whole tensor, widened to hold 0."""

    def make() -> list[Value]:
        found = call.b.ops("DynamicQuantizeLinear", [_float(call, "x")], [UINT8, FLOAT, UINT8])
        return [found[0], call.op("Reshape", found[1], call.b.ints([1])), found[2]]

    return call.b.once(("range of", call["x"]), make)


def _scale(call: Call) -> Value:
    """planish::activation_scale."""
    if not call["symmetric"] and call["per"] == "tensor":
        return _tensor_range(call)[1]
    x, b = _float(call, "x"), call.b
    axes = b.ints([-1]) if call["per"] == "token" else None
    number = 127.0
    if call["symmetric"]:
        most = call.op("ReduceMax", call.op("Abs", x), axes, keepdims=int(axes is not None))
    else:
        low, high = _ends(call, x, axes)
        most, number = call.op("Sub", high, low), 255.0
    found = call.op("Div", most, b.constant(np.float32(number)))
    return found if axes is not None else call.op("Reshape", found, b.ints([1]))


def _ends(call: Call, x: Value, axes: Value | None) -> tuple[Value, Value]:
    zero = call.b.constant(np.float32(0))
    low = call.op("ReduceMin", x, axes, keepdims=1)
    high = call.op("ReduceMax", x, axes, keepdims=1)
    return call.op("Min", low, zero), call.op("Max", high, zero)


def _zero(call: Call) -> Value:
    """planish::activation_zero, as the uint8 code of zero."""
    if call["per"] == "tensor":
        return _tensor_range(call)[2]
    low, _ = _ends(call, _float(call, "x"), call.b.ints([-1]))
    step = _step(call, call.value("scale"))
    code = call.op("Round", call.op("Neg", call.op("Div", low, step)))
    ends = (call.b.constant(np.float32(end)) for end in (0, 255))
    return call.b.cast(call.op("Clip", code, *ends), UINT8)


def _step(call: Call, scale: Value) -> Value:
    """A scale to divide by: 1 where it is 0."""
    zero, one = (call.b.constant(np.float32(number)) for number in (0, 1))
    return call.op("Where", call.op("Equal", scale, zero, dtype=oir.DataType.BOOL), one, scale,
                   dtype=FLOAT)  # fmt: skip


def _stored_zero(b: Builder, node: Node) -> Value:
    """A static zero point, int32 in the program, as the uint8 code of zero."""
    code = b.program.weights[str(node.target)].item() + _MIDDLE
    return b.constant(np.uint8(code))


def _zero_code(call: Call, name: str = "zero") -> Value:
    """The uint8 code of zero: the middle one where there is no zero point."""
    node = call[name]
    if node is None:
        return call.b.constant(np.uint8(_MIDDLE))
    return _stored_zero(call.b, node) if is_weight(node) else call.value(name)


def _quantize(call: Call) -> Value:
    """planish::quantize: uint8 codes, 128 more than the program's."""
    scale_node, b = call["scale"], call.b
    if ("range of", call["x"]) in b.memo and call["zero"] is not None and _by_tensor(call, "scale"):
        return _tensor_range(call)[0]
    x = _float(call, "x")
    if _by_tensor(call, "scale"):
        scale = _static_step(call, scale_node)
        codes = call.op("QuantizeLinear", x, scale, _zero_code(call), dtype=UINT8)
        if call["zero"] is None and is_weight(scale_node):
            codes = call.op("Clip", codes, b.constant(np.uint8(1)))  # code -128 is not symmetric
        return codes
    return _quantize_rows(call, x)


def _static_step(call: Call, node: Node) -> Value:
    if not is_weight(node):
        return _step(call, call.value("scale"))
    value = call.b.program.weights[str(node.target)].float().item()
    return call.b.constant(np.float32(value or 1.0))


def _quantize_rows(call: Call, x: Value) -> Value:
    """Rows with steps of their own: QuantizeLinear along the axis of the rows of a matrix."""
    b, shape = call.b, call.shape_of("x")
    rows = b.op("Reshape", x, b.constant([-1, shape[-1]], INT64)) if len(shape) != 2 else x
    steps = call.op("Reshape", _step(call, call.value("scale")), b.ints([-1]))
    zero = _zero_code(call)
    if call["zero"] is None or is_weight(call["zero"]):
        zeros = call.op("Expand", call.op("Reshape", zero, b.ints([1])), call.op(
            "Shape", steps, dtype=INT64))  # fmt: skip
    else:
        zeros = call.op("Reshape", zero, b.ints([-1]))
    codes = call.op("QuantizeLinear", rows, steps, zeros, dtype=UINT8, axis=0)
    return codes if rows is x else reshape(b, codes, None, shape)


def _dequantize(call: Call) -> Value:
    """planish::dequantize: the values that codes stand for."""
    steps = call.op("Sub", call.value("codes", INT32), call.b.cast(_zero_code(call), INT32))
    found = call.op("Mul", call.b.cast(steps, FLOAT), _float(call, "scale"))
    return call.b.cast(found, call.dtype)


def _outlier_columns(call: Call) -> Value:
    """planish::outlier_columns: bool [channels]."""
    b, rank = call.b, call.rank("x")
    most = call.op("Abs", _float(call, "x"))
    if rank > 1:
        most = call.op("ReduceMax", most, b.ints(list(range(rank - 1))), keepdims=0)
    limit = b.constant(np.float32(call["threshold"]))
    return call.op("GreaterOrEqual", most, limit, dtype=oir.DataType.BOOL)


# ---- products ----


def _int8_product(call: Call) -> Value:
    entry, b = packed_entry(call.b, call["weight"]), call.b
    assert entry is not None
    form = affine_form(entry)
    assert form is not None
    matrix = _Matrix(b, weight_name(b, call["weight"]), form.steps)
    wide: list[Value] = []
    if form.columns is not None:
        wide.append(_kept_product(call, form.columns))
    if call.args.get("outliers") is not None:
        wide.append(_outlier_product(call, matrix))
    bias = call.optional("bias", FLOAT)
    by_tensor = _by_tensor(call, "scale")
    scale = _float(call, "scale")
    inside = bias if by_tensor and not wide else None
    found = _scaled(call, matrix, scale if by_tensor else None, inside)
    if not by_tensor:
        found = call.op("Mul", found, scale)
    for part in [*wide, bias if inside is None else None]:
        found = found if part is None else call.op("Add", found, part)
    return b.cast(found, call.dtype)


class _Matrix:
    """An encoded weight as the right operand [in, out] of an integer product."""

    def __init__(self, b: Builder, name: str, encoded: Encoded) -> None:
        self.b, self.name, self.encoded = b, name, encoded
        out, length = encoded.rows_shape
        self.shape = (length, out)
        self.symmetric = encoded.zero_point is None
        self.middle = 1 << (encoded.format.bits - 1)  # type: ignore[attr-defined]

    def codes(self) -> Value:
        kind = INT8 if self.symmetric else UINT8

        def make() -> oir.Tensor:
            found = self.encoded.codes().t()
            found = (found - self.middle).view(torch.int8) if self.symmetric else found
            return oir.Tensor(numpy_of(found))

        key = ("integer columns", self.name)
        return self.b.once(key, lambda: self.b.lazy(f"{self.name}.int8", kind, self.shape, make))

    def scale(self) -> Value:
        return self._vector("scale", FLOAT, lambda: self.encoded.scale.float().reshape(-1))

    def zero(self) -> Value | None:
        if self.symmetric:
            return None
        return self._vector("zero", UINT8, lambda: _present(self.encoded.zero_point).reshape(-1))

    def sums(self) -> Value:
        """int32 [out]: sums over the inputs of the codes less their zero."""

        def make() -> Tensor:
            codes = self.encoded.codes().to(torch.int32)
            zero = self.encoded.zero_point
            middle = self.middle if zero is None else zero.reshape(-1, 1).to(torch.int32)
            return (codes - middle).sum(1, dtype=torch.int32)

        return self._vector("sums", INT32, make)

    def _vector(self, kind: str, dtype: oir.DataType, make: object) -> Value:
        def tensor() -> oir.Tensor:
            return oir.Tensor(numpy_of(make()))  # type: ignore[operator]

        key, name = (f"integer {kind}", self.name), f"{self.name}.int8_{kind}"
        return self.b.once(key, lambda: self.b.lazy(name, dtype, self.shape[1:], tensor))


def _present(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _scaled(call: Call, matrix: _Matrix, scale: Value | None, bias: Value | None) -> Value:
    """Sums of codes times the weight's scale, and times `scale`, plus bias; float32."""
    b = call.b
    by_row = call["zero"] is not None and not _by_tensor(call, "zero")
    codes = call.value("codes")
    zero = b.constant(np.uint8(_MIDDLE)) if by_row else _zero_code(call)
    if b.options.contrib and not by_row:
        step = b.constant(np.float32(1)) if scale is None else scale
        inputs = [codes, matrix.codes(), step, matrix.scale(), zero, matrix.zero(), bias]
        return b.op("MatMulIntegerToFloat", *inputs, dtype=FLOAT, domain=CONTRIB)
    sums = b.op("MatMulInteger", codes, matrix.codes(), zero, matrix.zero(), dtype=INT32)
    if by_row:
        shift = call.op("Sub", b.cast(_zero_code(call), INT32), b.constant(np.int32(_MIDDLE)))
        sums = call.op("Sub", sums, call.op("Mul", shift, matrix.sums()))
    found = call.op("Mul", b.cast(sums, FLOAT), matrix.scale())
    found = found if scale is None else call.op("Mul", found, scale)
    return found if bias is None else call.op("Add", found, bias)


def _outlier_product(call: Call, matrix: _Matrix) -> Value:
    """x of the outlier columns times their weights, as floats."""
    b, outliers = call.b, call.value("outliers")
    x = b.op("Compress", _float(call, "x"), outliers, axis=call.rank("x") - 1)
    rows = b.op("Compress", matrix.codes(), outliers, axis=0)
    steps = b.cast(rows, FLOAT)
    zero = matrix.zero()
    steps = steps if zero is None else call.op("Sub", steps, b.cast(zero, FLOAT))
    return call.op("MatMul", x, call.op("Mul", steps, matrix.scale()))


def _kept_product(call: Call, columns: Columns) -> Value:
    """Columns that the weight keeps beside its integers, as floats."""
    b, name = call.b, weight_name(call.b, call["weight"])
    places = b.constant(numpy_of(columns.places))
    codes = b.op("Gather", call.value("codes"), places, axis=call.rank("codes") - 1)
    steps = call.op("Sub", b.cast(codes, INT32), b.cast(_zero_code(call), INT32))
    values = call.op("Mul", b.cast(steps, FLOAT), _float(call, "scale"))
    if call.args.get("outliers") is not None:
        x = b.op("Gather", _float(call, "x"), places, axis=call.rank("x") - 1)
        chosen = b.op("Gather", call.value("outliers"), places, axis=0)
        values = call.op("Where", chosen, x, values, dtype=FLOAT)
    kept = columns.values
    shape = (kept.shape[1], kept.shape[0])

    def make() -> oir.Tensor:
        return oir.Tensor(numpy_of(kept.t()))

    stored = b.once(("kept", name), lambda: b.lazy(f"{name}.kept", FLOAT, shape, make))
    return call.op("MatMul", values, stored)


TABLE: Table = {
    "planish.activation_scale": _scale,
    "planish.activation_zero": _zero,
    "planish.quantize": _quantize,
    "planish.dequantize": _dequantize,
    "planish.outlier_columns": _outlier_columns,
    "planish_onnx.int8_product": _int8_product,
}
