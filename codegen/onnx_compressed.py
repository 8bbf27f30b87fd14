"""2:4 and 4:8 weights in ONNX: the file holds half of the values, and a session spreads them out.

dense[column] = sum over the kept values of value * (1 where the code puts it, else 0): exact, and
of stored tensors alone, so onnxruntime computes it once, when a session starts.
"""

from __future__ import annotations

import math

import onnx_ir as oir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from ..ir.encoded import Encoded
from ..ir.format_two_four import VALUES, Compressed
from .onnx_builder import INT32, Builder, Value, onnx_dtype
from .onnx_packed import integers


def expanded(b: Builder, name: str, encoded: Encoded, fmt: Compressed, work: oir.DataType) -> Value:
    """[rows, groups, of], columns past the end included."""
    rows, groups = math.prod(encoded.rows_shape[:-1]), fmt.groups(encoded.rows_shape[-1])
    kind = oir.DataType.UINT4 if fmt.of == 4 else oir.DataType.UINT8

    def places() -> oir.Tensor | oir.PackedTensor:
        return integers(encoded.codes().reshape(rows, groups), kind)

    codes = b.cast(b.lazy(f"{name}.places", kind, (rows, groups), places), INT32)
    kept = encoded.parts[VALUES].reshape(rows, groups, fmt.keep)
    found: Value | None = None
    for number in range(fmt.keep):
        column = kept[..., number : number + 1].contiguous()
        stored = b.lazy(
            f"{name}.values_{number}",
            onnx_dtype(column.dtype),
            column.shape,
            lambda column=column: TorchTensor(column),
        )
        spread = _spread(b, fmt, number)
        place = b.cast(b.op("Gather", spread, codes, dtype=oir.DataType.UINT8), work)
        term = b.op("Mul", b.cast(stored, work), place)
        found = term if found is None else b.op("Add", found, term)
    assert found is not None
    return found


def _spread(b: Builder, fmt: Compressed, number: int) -> Value:
    """uint8 [codes, of]: 1 in the column of a code's value of this number."""
    places = torch.nn.functional.one_hot(fmt.columns()[:, number], fmt.of)
    return b.constant(places.to(torch.uint8).numpy())


__all__ = ["expanded"]
