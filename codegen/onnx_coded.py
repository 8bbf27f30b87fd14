"""Weights coded by a table in ONNX: the file holds small codes, and they are decoded when read.

entries = Gather(table, codes); weight = entries * factor of the group. All of it depends on stored
tensors alone, so onnxruntime computes it once, when a session starts: small on disk, dense in
memory.
"""

from __future__ import annotations

import math

import onnx_ir as oir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from ..ir.affine import grouped
from ..ir.double_quantization import EVERY, dynamic_map
from ..ir.encoded import Encoded
from ..ir.format_fp8 import DTYPES, Float8
from ..ir.format_gobo import Gobo
from ..ir.format_kmeans import KMeans
from ..ir.format_mx import Microscaled, NvFp4
from ..ir.format_nf4 import Blockwise4
from ..ir.format_two_four import Compressed
from ..ir.sparse_rows import VALUES, places
from ..ir.table_format import TableFormat
from .onnx_builder import DOUBLE, FLOAT, INT32, INT64, Builder, Value, onnx_dtype
from .onnx_compressed import expanded
from .onnx_packed import integers


def coded_weight(b: Builder, name: str, encoded: Encoded) -> Value | None:
    """The weight in its own shape and dtype, decoded from codes; None for other formats."""
    fmt = encoded.format
    work = DOUBLE if encoded.dtype == torch.float64 else FLOAT
    match fmt:
        case Gobo():
            found = _with_outliers(b, name, encoded, _entries(b, name, encoded, fmt.bits), work)
        case KMeans():
            found = b.cast(_entries(b, name, encoded, fmt.bits), work)
        case TableFormat():
            found = _scaled(b, name, encoded, fmt, work)
        case Compressed():
            found = expanded(b, name, encoded, fmt, work)
        case _:
            return None
    return b.cast(_in_place(b, encoded, found), onnx_dtype(encoded.dtype))


def _rows(encoded: Encoded) -> int:
    return math.prod(encoded.rows_shape[:-1])


def _groups(encoded: Encoded) -> tuple[int, int]:
    """How many groups a row has, and their size."""
    length = encoded.rows_shape[-1]
    size = encoded.format.grouping(length)
    return -(-length // size), size


def _codes(b: Builder, name: str, encoded: Encoded, bits: int) -> Value:
    """Codes int32 [rows, groups, group]; short groups are filled up."""
    count, size = _groups(encoded)
    kind = oir.DataType.UINT4 if bits <= 4 else oir.DataType.UINT8
    shape = (_rows(encoded), count, size)

    def make() -> oir.Tensor | oir.PackedTensor:
        flat = encoded.codes().reshape(shape[0], -1)
        return integers(grouped(flat, size), kind)

    return b.cast(b.lazy(f"{name}.codes", kind, shape, make), INT32)


def _entries(b: Builder, name: str, encoded: Encoded, bits: int) -> Value:
    """The numbers of the table [rows, groups, group] that codes stand for."""
    fmt = encoded.format
    if isinstance(fmt, TableFormat):
        table = b.constant([0.0 if v != v else v for v in fmt.entries], FLOAT)
        return b.op("Gather", table, _codes(b, name, encoded, bits), dtype=FLOAT)
    kept = encoded.parts["table"]
    flat = kept.reshape(-1)
    stored = b.lazy(f"{name}.table", onnx_dtype(kept.dtype), flat.shape, lambda: _tensor(flat))
    codes = _codes(b, name, encoded, bits)
    if kept.dim() > 1:  # a table for each group, one behind the other
        count, _ = _groups(encoded)
        last = _rows(encoded) * count * kept.shape[-1]
        ends = [b.constant(end, INT32) for end in (0, last, kept.shape[-1])]
        starts = b.op("Reshape", b.op("Range", *ends), b.ints([-1, count, 1]))
        codes = b.op("Add", codes, starts)
    return b.op("Gather", stored, codes, dtype=stored.dtype)


def _scaled(b: Builder, name: str, encoded: Encoded, fmt: TableFormat, work: oir.DataType) -> Value:
    if isinstance(fmt, Float8):
        kind = onnx_dtype(DTYPES[fmt.kind])
        count, size = _groups(encoded)
        shape = (_rows(encoded), count, size)
        codes = encoded.codes().reshape(shape[0], -1)

        def make() -> oir.Tensor:
            return _tensor(grouped(codes, size).view(DTYPES[fmt.kind]))

        entries = b.cast(b.lazy(f"{name}.codes", kind, shape, make), work)
    else:
        entries = b.cast(_entries(b, name, encoded, fmt.code_bits), work)
    factor = b.cast(_factor(b, name, encoded), work)
    return b.op("Mul", entries, b.op("Unsqueeze", factor, b.ints([2])))


def _factor(b: Builder, name: str, encoded: Encoded) -> Value:
    """The factors [rows, groups] in the narrowest form that keeps them."""
    fmt, shape = encoded.format, (_rows(encoded), _groups(encoded)[0])
    if isinstance(fmt, Blockwise4) and fmt.double:
        return _doubly_quantized(b, name, encoded, shape)
    kept = encoded.parts["scale"].reshape(shape)
    if isinstance(fmt, Microscaled):  # powers of two have a place in bfloat16
        kept = fmt.factors(encoded).reshape(shape).bfloat16()
    if isinstance(fmt, NvFp4):
        kept = kept.view(torch.float8_e4m3fn).half()
    kind = onnx_dtype(kept.dtype)
    stored = b.lazy(f"{name}.scale", kind, shape, lambda: _tensor(kept))
    if isinstance(fmt, NvFp4):
        whole = b.constant(encoded.parts["whole"].numpy())
        return b.op("Mul", b.cast(stored, FLOAT), whole)
    return stored


def _doubly_quantized(b: Builder, name: str, encoded: Encoded, shape: tuple[int, int]) -> Value:
    """map[code] * second + offset, by 256 codes in a row."""
    codes = encoded.parts["scale"].reshape(-1)
    second = encoded.parts["second"]
    blocks = len(second)

    def make() -> oir.Tensor:
        padded = torch.nn.functional.pad(codes, (0, blocks * EVERY - len(codes)))
        return _tensor(padded.view(blocks, EVERY))

    uint8 = oir.DataType.UINT8
    stored = b.lazy(f"{name}.scale", uint8, (blocks, EVERY), make)
    table = b.constant(dynamic_map().numpy())
    found = b.op("Gather", table, b.cast(stored, INT32), dtype=FLOAT)
    maxima = b.lazy(
        f"{name}.scale_maxima", FLOAT, (blocks, 1), lambda: _tensor(second.unsqueeze(1))
    )
    found = b.op("Mul", found, maxima)
    found = b.op("Add", found, b.constant(encoded.parts["offset"].numpy()))
    flat = b.op("Reshape", found, b.ints([-1]))
    first = b.op("Slice", flat, b.ints([0]), b.ints([len(codes)]))
    return b.op("Reshape", first, b.ints(shape))


def _with_outliers(
    b: Builder, name: str, encoded: Encoded, body: Value, work: oir.DataType
) -> Value:
    """The body [rows, 1, length] with the weight's own values at the outliers' places."""
    length = encoded.rows_shape[-1]
    where = places(encoded.parts, length).to(torch.int32)
    values = encoded.parts[VALUES]
    count = (len(values),)
    at = b.lazy(f"{name}.outlier_places", INT32, count, lambda: _tensor(where))
    kept = b.lazy(f"{name}.outliers", onnx_dtype(values.dtype), count, lambda: _tensor(values))
    flat = b.op("Reshape", b.cast(body, work), b.ints([-1]))
    found = b.op("ScatterElements", flat, b.cast(at, INT64), b.cast(kept, work), axis=0)
    return b.op("Reshape", found, b.ints([_rows(encoded), 1, length]))


def _in_place(b: Builder, encoded: Encoded, groups: Value) -> Value:
    """[rows, groups, group] in the weight's own shape."""
    rows, length = encoded.rows_shape, encoded.rows_shape[-1]
    count, size = _groups(encoded)
    flat = b.op("Reshape", groups, b.ints([_rows(encoded), count * size]))
    if count * size != length:
        flat = b.op("Slice", flat, b.ints([0]), b.ints([length]), b.ints([1]))
    whole = b.op("Reshape", flat, b.ints(rows))
    rank = len(rows)
    axis = encoded.axis % rank
    order = [*range(axis), rank - 1, *range(axis, rank - 1)]
    return whole if axis == rank - 1 else b.op("Transpose", whole, perm=order)


def _tensor(tensor: Tensor) -> oir.Tensor:
    return TorchTensor(tensor.contiguous())


__all__ = ["coded_weight"]
