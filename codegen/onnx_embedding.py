"""Embedding tables of integers in ONNX: only the rows that are read are dequantized."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from ..ir.encoded import Encoded
from ..ir.program import Node
from .onnx_builder import CONTRIB, INT64, Builder, Value, onnx_dtype
from .onnx_packed import (
    affine,
    block_size,
    block_zeros,
    blocks,
    container,
    group_size,
    quantized,
    row_tables,
)
from .onnx_quantized import float_of, kernel_bits
from .onnx_shape_ops import cut
from .onnx_weights import is_matrix_reader, weight_name


def embedding_rows(b: Builder, node: Node, encoded: Encoded, ids: Value) -> Value | None:
    """Rows `ids` [...] of a table [rows, channels]; only those rows are dequantized.

    None where the table is not a matrix grouped along its channels.
    """
    if len(encoded.shape) != 2 or encoded.axis != -1:
        return None
    multiplied = any(is_matrix_reader(user, node) for user in node.users)
    if b.options.contrib and (not multiplied or kernel_bits(b, encoded)):
        bits = 2 if affine(encoded).bits == 2 else container(encoded)
        block = block_size(encoded, bits)
        if block is not None:
            return _block_rows(b, node, encoded, ids, (bits, block))
    flat = b.op("Reshape", ids, b.ints([-1]))
    if container(encoded) == 8:
        rows = _column_rows(b, node, encoded, flat)
    else:
        rows = _nibble_rows(b, node, encoded, flat)
    return _like_ids(b, rows, ids, encoded)


def _like_ids(b: Builder, rows: Value, ids: Value, encoded: Encoded) -> Value:
    lengths = b.op("Concat", b.op("Shape", ids, dtype=INT64), b.ints([encoded.shape[1]]), axis=0)
    return b.cast(b.op("Reshape", rows, lengths), onnx_dtype(encoded.dtype))


def _block_rows(
    b: Builder, node: Node, encoded: Encoded, ids: Value, form: tuple[int, int]
) -> Value:
    """GatherBlockQuantized on the very tensors that MatMulNBits reads, if the table is tied."""
    bits, block = form
    name = weight_name(b, node)
    stored = blocks(b, name, encoded, bits, block)
    scale = b.op("Unsqueeze", b.cast(stored.scale, float_of(encoded)), b.ints([2]))
    inputs = [stored.codes, ids, scale, block_zeros(b, name, encoded, block)]
    more = {"gather_axis": 0, "quantize_axis": 2, "block_size": block, "bits": bits}
    rows = b.op("GatherBlockQuantized", *inputs, domain=CONTRIB, dtype=scale.dtype, **more)
    length = encoded.shape[1]
    padded = -(-length // block) * block
    rows = b.op("Reshape", rows, b.ints([-1, padded]))
    rows = rows if padded == length else cut(b, rows, 1, 0, length)
    return _like_ids(b, rows, ids, encoded)


def _column_rows(b: Builder, node: Node, encoded: Encoded, flat: Value) -> Value:
    """8 bit tables are kept as columns, which a tied output matrix multiplies by as they are."""
    stored = quantized(b, weight_name(b, node), encoded, [-1, 1, 0], "columns")

    def gathered(table: Value) -> Value:
        taken = b.op("Squeeze", b.op("Gather", table, flat, axis=2), b.ints([0]))
        return b.op("Transpose", taken, perm=[1, 0])

    zero = None if stored.zero is None else gathered(stored.zero)
    return _from_codes(b, encoded, gathered(stored.codes), gathered(stored.scale), zero)


def _nibble_rows(b: Builder, node: Node, encoded: Encoded, flat: Value) -> Value:
    """4 bit tables for runtimes whose Gather knows no 4 bit numbers: two codes a byte."""
    length = encoded.shape[1]
    tables = row_tables(b, weight_name(b, node), encoded)
    taken = b.op("Gather", tables.codes, flat, axis=0)
    low = b.op("BitwiseAnd", taken, b.constant(15, oir.DataType.UINT8))
    four = b.constant(4, oir.DataType.UINT8)
    high = b.op("BitShift", taken, four, direction="RIGHT")
    both = [b.op("Unsqueeze", half, b.ints([2])) for half in (low, high)]
    pairs = b.op("Concat", *both, axis=2)
    codes = b.op("Reshape", pairs, b.ints([-1, 2 * (-(-length // 2))]))
    codes = codes if length % 2 == 0 else cut(b, codes, 1, 0, length)
    scale = b.op("Gather", tables.scale, flat, axis=0)
    if tables.zero is None:
        zero = b.constant(1 << (affine(encoded).bits - 1), oir.DataType.UINT8)
    else:
        zero = b.op("Gather", tables.zero, flat, axis=0)
    return _from_codes(b, encoded, codes, scale, zero)


def _from_codes(
    b: Builder, encoded: Encoded, codes: Value, scale: Value, zero: Value | None
) -> Value:
    """(code - zero) * scale for codes [tokens, channels] and parameters [tokens, groups]."""
    kind, length = float_of(encoded), encoded.shape[1]
    group = b.constant(np.arange(length) // group_size(encoded), INT64)
    spread = affine(encoded).groups(length) > 1

    def per_channel(parameter: Value) -> Value:
        wide = b.cast(parameter, kind)
        return b.op("Gather", wide, group, axis=1) if spread else wide

    steps = b.cast(codes, kind)
    if zero is not None:
        is_table = zero.const_value is None
        steps = b.op("Sub", steps, per_channel(zero) if is_table else b.cast(zero, kind))
    return b.op("Mul", steps, per_channel(scale))
