"""Integer weights in the forms in which ONNX operators take them.

blocks   [out, blocks, bytes]  for MatMulNBits and GatherBlockQuantized: one row is one output
columns  [1, in, out]          for DequantizeLinear in front of MatMul
as it is [..., out, in]        for DequantizeLinear of any other weight
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from ..ir.encoded import Encoded
from ..ir.formats import AffineInt
from ..ir.layouts import BitPacked
from .onnx_builder import Builder, Value, numpy_of, onnx_dtype

BLOCKS = (16, 32, 64, 128, 256)
"""The block sizes that onnxruntime's MatMulNBits has kernels for."""


def affine(encoded: Encoded) -> AffineInt:
    assert isinstance(encoded.format, AffineInt)
    return encoded.format


def container(encoded: Encoded) -> int:
    """Bits in which a code is kept: 4, or 8 for codes of more than 4 bits."""
    return 4 if affine(encoded).bits <= 4 else 8


def group_size(encoded: Encoded) -> int:
    """Values that share a scale; a whole row where it has but one."""
    return affine(encoded).group_size or encoded.rows_shape[-1]


def block_size(encoded: Encoded, bits: int) -> int | None:
    """The MatMulNBits block that stores the weight in the fewest bytes; None if none fits.

    A block must divide the group (whose scale its parts repeat), unless there is one group only.
    """
    length, group = encoded.rows_shape[-1], group_size(encoded)
    scale_bytes = encoded.scale.element_size()

    def row_bytes(block: int) -> float:
        blocks = -(-length // block)
        return blocks * (block * bits / 8 + scale_bytes)

    fitting = [block for block in BLOCKS if group % block == 0 or group >= length]
    return min(fitting, key=row_bytes, default=None)


@dataclass(frozen=True)
class Blocks:
    """The tensors of the blocks form; zero is packed as MatMulNBits wants it."""

    codes: Value
    scale: Value
    zero: Value | None
    bits: int
    block: int


def blocks(b: Builder, name: str, encoded: Encoded, bits: int, block: int) -> Blocks:
    """Store a matrix [out, in], grouped along its rows, in the blocks form."""
    out, length = encoded.rows_shape
    count = -(-length // block)
    uint8 = oir.DataType.UINT8

    def codes() -> oir.Tensor:
        padded = torch.zeros(out, count * block, dtype=torch.uint8)
        padded[:, :length] = encoded.codes() + _raise(encoded, bits)
        return oir.Tensor(numpy_of(BitPacked(bits).pack(padded).reshape(out, count, -1)))

    def scale() -> oir.Tensor:
        return TorchTensor(_of_blocks(encoded, encoded.scale, block).contiguous())

    def zero() -> oir.Tensor:
        points = encoded.zero_point
        assert points is not None
        return oir.Tensor(numpy_of(BitPacked(bits).pack(_of_blocks(encoded, points, block))))

    shape, kind = (out, count, block * bits // 8), onnx_dtype(encoded.scale.dtype)
    zeros = (out, -(-count * bits // 8))
    form = f"{name}.{bits}bit_blocks_{block}"
    return Blocks(
        b.once(form, lambda: b.lazy(f"{name}.codes", uint8, shape, codes)),
        b.once((form, "scale"), lambda: b.lazy(f"{name}.scale", kind, (out, count), scale)),
        None
        if affine(encoded).symmetric
        else b.once((form, "zero"), lambda: b.lazy(f"{name}.zero_point", uint8, zeros, zero)),
        bits,
        block,
    )


def spread_to_nibbles(
    b: Builder, name: str, encoded: Encoded, stored: Blocks
) -> tuple[Value, Value]:
    """The codes and zero points of 2-bit blocks in 4 bits, computed when a session starts."""
    out, length = encoded.rows_shape
    count = -(-length // stored.block)
    uint8 = oir.DataType.UINT8

    def codes() -> Value:
        bytes_ = b.op("Unsqueeze", stored.codes, b.ints([3]))
        two, four = b.constant(2, uint8), b.constant(4, uint8)
        halves = [bytes_, b.op("BitShift", bytes_, four, direction="RIGHT")]
        spread = [
            b.op(
                "BitwiseOr",
                b.op("BitwiseAnd", half, b.constant(3, uint8)),
                b.op(
                    "BitShift",
                    b.op("BitwiseAnd", half, b.constant(12, uint8)),
                    two,
                    direction="LEFT",
                ),
            )
            for half in halves
        ]
        pairs = b.op("Concat", *spread, axis=3)
        return b.op("Reshape", pairs, b.ints([out, count, stored.block // 2]))

    def zeros() -> oir.Tensor:
        points = encoded.zero_point
        assert points is not None
        return oir.Tensor(numpy_of(BitPacked(4).pack(_of_blocks(encoded, points, stored.block))))

    shape = (out, -(-count // 2))

    def zero() -> Value:
        if affine(encoded).symmetric:  # 2 in every nibble
            return b.op("Expand", b.constant([[0x22]], uint8), b.ints(shape))
        return b.lazy(f"{name}.nibble_zeros", uint8, shape, zeros)

    key = (name, "nibbles", stored.block)
    return (
        b.once(key, codes),
        b.once((key, "zero"), zero),
    )


def block_zeros(b: Builder, name: str, encoded: Encoded, block: int) -> Value | None:
    """Zero points [out, blocks, 1], one a byte, as GatherBlockQuantized wants them."""
    if affine(encoded).symmetric:
        return None
    out, length = encoded.rows_shape

    def make() -> oir.Tensor:
        points = encoded.zero_point
        assert points is not None
        return oir.Tensor(numpy_of(_of_blocks(encoded, points, block).unsqueeze(-1)))

    shape = (out, -(-length // block), 1)
    name = f"{name}.zero_point_bytes"
    return b.once(name, lambda: b.lazy(name, oir.DataType.UINT8, shape, make))


def _of_blocks(encoded: Encoded, parts: Tensor, block: int) -> Tensor:
    """[out, groups] of a scale or zero point as [out, blocks]."""
    length = encoded.rows_shape[-1]
    first = torch.arange(0, length, block)
    return parts[:, first // group_size(encoded)]


def _raise(encoded: Encoded, bits: int) -> int:
    """What to add to a symmetric code, whose zero is then in the middle of `bits` bits."""
    fmt = affine(encoded)
    return (1 << (bits - 1)) - (1 << (fmt.bits - 1)) if fmt.symmetric else 0


@dataclass(frozen=True)
class Quantized:
    """The tensors of DequantizeLinear: symmetric codes are signed and need no zero point."""

    codes: Value
    scale: Value
    zero: Value | None
    axis: int
    block: int


def quantized(
    b: Builder, name: str, encoded: Encoded, order: Sequence[int], form: str
) -> Quantized:
    """Store codes and parameters with the axes of `rows_shape` in a new order.

    order: for each axis of the result its place in `rows_shape`, or -1 for a new axis of one.
    """
    rows = encoded.rows_shape
    groups = (*rows[:-1], affine(encoded).groups(rows[-1]))
    symmetric, bits = affine(encoded).symmetric, container(encoded)
    kind = _CODE_TYPES[symmetric, bits]

    def arranged(tensor: Tensor) -> Tensor:
        kept = tensor.permute([place for place in order if place >= 0])
        for axis, place in enumerate(order):
            kept = kept.unsqueeze(axis) if place < 0 else kept
        return kept.contiguous()

    def shaped(shape: Sequence[int]) -> list[int]:
        return [1 if place < 0 else shape[place] for place in order]

    def codes() -> oir.Tensor | oir.PackedTensor:
        found = encoded.codes()
        if symmetric:
            found = (found - (1 << (affine(encoded).bits - 1))).view(torch.int8)
        return integers(arranged(found), kind)

    def zero() -> oir.Tensor | oir.PackedTensor:
        points = encoded.zero_point
        assert points is not None
        return integers(arranged(points), kind)

    def scale() -> oir.Tensor:
        return TorchTensor(arranged(encoded.scale))

    dtype = onnx_dtype(encoded.scale.dtype)
    key = (name, form)
    return Quantized(
        b.once((key, "codes"), lambda: b.lazy(f"{name}.{form}", kind, shaped(rows), codes)),
        b.once(
            (key, "scale"), lambda: b.lazy(f"{name}.{form}_scale", dtype, shaped(groups), scale)
        ),
        None
        if symmetric
        else b.once(
            (key, "zero"), lambda: b.lazy(f"{name}.{form}_zero", kind, shaped(groups), zero)
        ),
        list(order).index(len(rows) - 1),
        group_size(encoded),
    )


_CODE_TYPES = {
    (True, 4): oir.DataType.INT4,
    (True, 8): oir.DataType.INT8,
    (False, 4): oir.DataType.UINT4,
    (False, 8): oir.DataType.UINT8,
}


def integers(tensor: Tensor, kind: oir.DataType) -> oir.Tensor | oir.PackedTensor:
    """Codes as a tensor of `kind`, of 4 or 8 bits."""
    if kind.bitwidth == 8:
        return oir.Tensor(numpy_of(tensor), dtype=kind)
    nibbles = tensor.flatten().view(torch.uint8) & 15
    if nibbles.numel() % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    pairs = numpy_of(nibbles[0::2] | (nibbles[1::2] << 4))
    return oir.PackedTensor(np.ascontiguousarray(pairs), kind, shape=list(tensor.shape))


@dataclass(frozen=True)
class RowTables:
    """A table [rows, channels] by rows: two codes a byte, lowest first; parameters by group."""

    codes: Value
    scale: Value
    zero: Value | None


def row_tables(b: Builder, name: str, encoded: Encoded) -> RowTables:
    """Store a table of codes of up to 4 bits so that an operator that copies bytes can read it."""
    count, length = encoded.rows_shape
    groups, uint8 = affine(encoded).groups(length), oir.DataType.UINT8

    def codes() -> oir.Tensor:
        return oir.Tensor(numpy_of(BitPacked(4).pack(encoded.codes())))

    def zero() -> oir.Tensor:
        points = encoded.zero_point
        assert points is not None
        return oir.Tensor(numpy_of(points))

    kind, half = onnx_dtype(encoded.scale.dtype), -(-length // 2)
    key = (name, "rows")
    return RowTables(
        b.once((key, "codes"), lambda: b.lazy(f"{name}.rows", uint8, (count, half), codes)),
        b.once(
            (key, "scale"),
            lambda: b.lazy(
                f"{name}.rows_scale", kind, (count, groups), lambda: TorchTensor(encoded.scale)
            ),
        ),
        None
        if affine(encoded).symmetric
        else b.once(
            (key, "zero"), lambda: b.lazy(f"{name}.rows_zero", uint8, (count, groups), zero)
        ),
    )
