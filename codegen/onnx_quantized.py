"""Reading integer weights in ONNX: matrix products, and whole weights for everything else.

With profile "ort", MatMulNBits multiplies by 2 and 4 bit codes, and by 8 bit codes when
activations are rounded to 8 bits too; measured on onnxruntime 1.31.1 its 8 bit kernel for float
activations is 20 times slower than float32 for one token. So is its 2 bit kernel, but 100 times
slower than that for 4 bits: 2 bit codes are spread to 4 bits when a session starts. Everything
else dequantizes: three axes
in front of the product keep onnxruntime from fusing the pair into a MatMulNBits that rounds the
activations to 8 bits, which is its default for the two-axis form.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as oir

from ..ir.encoded import Encoded
from ..ir.program import Node
from .onnx_builder import CONTRIB, DOUBLE, FLOAT, Builder, Value, onnx_dtype
from .onnx_packed import (
    affine,
    block_size,
    blocks,
    container,
    quantized,
    spread_to_nibbles,
)
from .onnx_weights import weight_name


def kernel_bits(b: Builder, encoded: Encoded) -> int | None:
    """The code width under which MatMulNBits takes the weight; None: it should not."""
    if not b.options.contrib or len(encoded.shape) != 2:
        return None
    bits = 2 if affine(encoded).bits == 2 else container(encoded)
    if bits == 8 and b.options.activations == "float":
        return None
    return bits if block_size(encoded, bits) else None


def matrix_product(b: Builder, node: Node, encoded: Encoded, x: Value, bias: Value | None) -> Value:
    """x [..., in] times the transpose of `encoded`, whose rows_shape is [out, in], plus bias."""
    bits = kernel_bits(b, encoded)
    if bits is not None:
        return _nbits_product(b, node, encoded, bits, x, bias)
    product = b.op("MatMul", x, b.cast(_columns(b, node, encoded), x.dtype or FLOAT))
    return product if bias is None else b.op("Add", product, bias)


def _nbits_product(
    b: Builder, node: Node, encoded: Encoded, bits: int, x: Value, bias: Value | None
) -> Value:
    block = block_size(encoded, bits)
    assert block is not None
    stored = blocks(b, weight_name(b, node), encoded, bits, block)
    out, length = encoded.rows_shape
    scale = b.cast(stored.scale, x.dtype or FLOAT)
    codes, zero = stored.codes, stored.zero
    if bits == 2 and b.options.activations == "float":
        bits = 4
        codes, zero = spread_to_nibbles(b, weight_name(b, node), encoded, stored)
    return b.op(
        "MatMulNBits",
        *[x, codes, scale, zero, None, bias],
        domain=CONTRIB,
        K=length,
        N=out,
        bits=bits,
        block_size=block,
        accuracy_level=4 if b.options.activations == "int8" else 1,
    )


def _columns(b: Builder, node: Node, encoded: Encoded) -> Value:
    """The weight as a float matrix [in, out], dequantized when it is read."""
    name = weight_name(b, node)

    def make() -> Value:
        wide = _dequantized(b, name, encoded, [-1, 1, 0], "columns")
        return b.op("Squeeze", wide, b.ints([0]))

    return b.once(("columns", name), make)


def _dequantized(b: Builder, name: str, encoded: Encoded, order: list[int], form: str) -> Value:
    stored = quantized(b, name, encoded, order, form)
    scale = b.cast(stored.scale, float_of(encoded))
    inputs = [stored.codes, scale, stored.zero]
    more: dict[str, Any] = {"axis": stored.axis, "block_size": stored.block}
    return b.op("DequantizeLinear", *inputs, dtype=scale.dtype, **more)


def float_of(encoded: Encoded) -> oir.DataType:
    """The dtype to compute in: the weight's own, but at least float32."""
    own = onnx_dtype(encoded.dtype)
    return own if own == DOUBLE else FLOAT


def dequantized_weight(b: Builder, node: Node, encoded: Encoded) -> Value:
    """The whole weight in its own shape and dtype, stored as integers."""
    name, rank = weight_name(b, node), len(encoded.shape)
    axis = encoded.axis % rank
    order = [*range(axis), rank - 1, *range(axis, rank - 1)]
    missing = max(0, 3 - rank)
    order = [-1] * missing + order

    def make() -> Value:
        wide = _dequantized(b, name, encoded, order, "integers")
        flat = b.op("Squeeze", wide, b.ints(list(range(missing)))) if missing else wide
        return b.cast(flat, onnx_dtype(encoded.dtype))

    return b.once(("dequantized", name), make)
