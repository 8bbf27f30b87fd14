"""What Triton's interpreter computes wrongly, computed as a GPU does.

Triton 3.9 computes bfloat16 on its bits as if they were integers, cuts float32 to bfloat16 short,
converts fp8 wrongly, and calls math.erf for every element.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .interpreter_numbers import (
    FP8,
    Array,
    bf16_bits,
    bf16_bits_once,
    bf16_values,
    fp8_bits,
    fp8_values,
    tf32_values,
)

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)

Replacement = tuple[Any, str, Callable[..., Any]]
"""A class of the interpreter, the name of its method, and what is called with the old method."""


class Arithmetic:
    """Replacements of the interpreter's methods that compute.

    A handle of bfloat16 holds bits in uint16; they are decoded, computed on and encoded. tf32:
    tl.dot of float32 cuts its operands where the kernel does not ask for "ieee".
    """

    def __init__(self, module: Any, tf32: bool) -> None:
        self._module, self._tf32 = module, tf32
        self._tl: Any = importlib.import_module("triton.language")

    def replacements(self) -> list[Replacement]:
        builder = self._module.InterpreterBuilder
        return [
            *((builder, f"{name}_op", self._operation) for name in ("binary", "unary", "ternary")),
            (builder, "create_fma", self._fma),
            (builder, "create_erf", self._erf),
            (builder, "cast_impl", self._cast),
            (builder, "create_fp_to_fp", self._float_to_float),
            (builder, "create_dot", self._dot),
            (builder, "create_atomic_rmw", self._atomic),
            (self._module.ReduceOps, "sum", self._sum),
            (self._module.ReduceOps, "min_max", self._min_max),
            (self._module.ScanOps, "cumsum", self._cumulated),
            (self._module.ScanOps, "cumprod", self._cumulated),
        ]

    def _is_bf16(self, handle: Any) -> bool:
        return handle.dtype.scalar == self._tl.bfloat16 and handle.data.dtype == np.uint16

    def _floats(self, handle: Any) -> Array:
        """The values of a handle, as floats if they are of a format that numpy lacks."""
        if self._is_bf16(handle):
            return bf16_values(handle.data)
        name = handle.dtype.scalar.name
        return fp8_values(handle.data, name) if name in FP8 else handle.data

    def _handle(self, values: Array, dtype: Any) -> Any:
        """Values as a handle; truth values always as int1, whatever was compared."""
        tl = self._tl
        if values.dtype == np.bool_:
            return self._module.TensorHandle(values, tl.int1)
        encoded = bf16_bits(values) if dtype.scalar == tl.bfloat16 else values
        return self._module.TensorHandle(encoded, dtype.scalar)

    def _operation(self, original: Any, builder: Any, *operands: Any) -> Any:
        *handles, function = operands
        if function is np.where or function in _BITWISE or not self._is_bf16(handles[-1]):
            result = original(builder, *operands)
            if result.data.dtype == np.bool_:
                return self._handle(result.data, result.dtype)
            return result
        return self._handle(function(*map(self._floats, handles)), handles[-1].dtype)

    def _fma(self, original: Any, builder: Any, x: Any, y: Any, z: Any) -> Any:
        if not self._is_bf16(z):
            return original(builder, x, y, z)
        a, b, c = (self._floats(handle).astype(np.float64) for handle in (x, y, z))
        return self._module.TensorHandle(bf16_bits_once(a * b + c), z.dtype.scalar)

    def _erf(self, original: Any, builder: Any, x: Any) -> Any:
        """By torch: the interpreter's own calls math.erf for every element."""
        exact = torch.from_numpy(x.data.astype(np.float64)).erf().numpy()
        return self._module.TensorHandle(exact.astype(x.data.dtype), x.dtype.scalar)

    def _cast(self, original: Any, builder: Any, source: Any, wanted: Any) -> Any:
        if wanted.scalar == self._tl.bfloat16:
            return self._handle(self._floats(source).astype(np.float32), wanted)
        if self._is_bf16(source):
            source = self._handle(self._floats(source), self._tl.float32)
            if wanted.scalar == self._tl.float32:
                return source
        return original(builder, source, wanted)

    def _float_to_float(
        self, original: Any, builder: Any, source: Any, wanted: Any, rounding: Any
    ) -> Any:
        down = rounding is not None and "RTNE" not in str(rounding)
        name = wanted.scalar.name
        if down or source.dtype.scalar == self._tl.float64:
            return original(builder, source, wanted, rounding)
        values = self._floats(source).astype(np.float32)
        if name in FP8:
            return self._module.TensorHandle(fp8_bits(values, name), wanted.scalar)
        if name in ("fp32", "fp16", "bf16"):
            return self._cast_from_float32(values, wanted)
        return original(builder, source, wanted, rounding)

    def _cast_from_float32(self, values: Array, wanted: Any) -> Any:
        values = values.astype(np.float16) if wanted.scalar.name == "fp16" else values
        return self._handle(values, wanted)

    def _dot(
        self, original: Any, builder: Any, a: Any, b: Any, sums: Any, precision: Any, most: Any
    ) -> Any:
        left, right = self._floats(a), self._floats(b)
        if left.dtype == np.float32 and "IEEE" not in str(precision) and self._cuts_to_tf32(a):
            left, right = tf32_values(left), tf32_values(right)
        product = np.matmul(left, right, dtype=sums.data.dtype) + sums.data
        return self._module.TensorHandle(product, sums.dtype.scalar)

    def _cuts_to_tf32(self, operand: Any) -> bool:
        return self._tf32 and operand.dtype.scalar == self._tl.float32

    def _decoded(self, tensor: Any) -> Any:
        handle = self._handle(self._floats(tensor.handle), self._tl.float32)
        kind = tensor.type.with_element_ty(self._tl.float32)
        return self._tl.core.tensor(handle, kind)

    def _encoded(self, tensor: Any) -> Any:
        handle = self._handle(tensor.handle.data, self._tl.bfloat16)
        shape = [int(size) for size in tensor.shape]
        dtype = self._tl.bfloat16
        return self._tl.core.tensor(handle, self._tl.block_type(dtype, shape) if shape else dtype)

    def _sum(self, original: Any, reduction: Any, tensor: Any) -> Any:
        if not self._is_bf16(tensor.handle):
            return original(reduction, tensor)
        return self._encoded(original(reduction, self._decoded(tensor)))

    def _cumulated(self, original: Any, scan: Any, tensor: Any) -> Any:
        if not self._is_bf16(tensor.handle):
            return original(scan, tensor)
        return [self._encoded(part) for part in original(scan, self._decoded(tensor))]

    def _min_max(
        self,
        original: Any,
        reduction: Any,
        given: Any,
        val_reduce_op: Any,
        idx_reduce_op: Any = None,
    ) -> Any:
        tensor = given[0] if isinstance(given, tuple) else given
        narrow = self._is_bf16(tensor.handle)
        tensor = self._decoded(tensor) if narrow else tensor
        value = _ignoring_nan(val_reduce_op) if val_reduce_op else None
        index = _ignoring_nan(idx_reduce_op) if idx_reduce_op else None
        found = original(reduction, tensor, value, index)
        if not narrow:
            return found
        if isinstance(found, tuple):
            return self._encoded(found[0]), found[1]
        return self._encoded(found) if value else found

    def _atomic(
        self,
        original: Any,
        builder: Any,
        kind: Any,
        pointers: Any,
        value: Any,
        mask: Any,
        *how: Any,
    ) -> Any:
        """Of bfloat16, sums only, one lane after the other, as lanes may meet at one address."""
        if not self._is_bf16(value):
            return original(builder, kind, pointers, value, mask, *how)
        if "FADD" not in str(kind):
            raise NotImplementedError(f"atomic {kind} of bfloat16 in the interpreter")
        handle, shape = self._module.TensorHandle, pointers.data.shape
        before = np.zeros(shape, dtype=np.uint16)
        for place in np.argwhere(np.broadcast_to(mask.data, shape)):
            at = tuple(place)
            pointer = handle(pointers.data[at].reshape(1), pointers.dtype)
            before[at] = builder.create_load(pointer, None, False).data[0]
            total = bf16_values(before[at].reshape(1)) + bf16_values(value.data[at].reshape(1))
            builder.create_store(pointer, self._handle(total, value.dtype), None)
        return handle(before, value.dtype.scalar)


def _ignoring_nan(function: Callable[..., Any]) -> Callable[..., Any]:
    """np.nanmax and its kin, for slices of nothing but NaN too: NaN, and index 0."""
    index = function in (np.nanargmax, np.nanargmin)
    worst = -np.inf if function in (np.nanmax, np.nanargmax) else np.inf
    plain = {np.nanmax: np.max, np.nanmin: np.min, np.nanargmax: np.argmax, np.nanargmin: np.argmin}

    def reduced(values: Array, **options: Any) -> Any:
        if not np.issubdtype(values.dtype, np.floating):
            return plain[function](values, **options)
        nan = np.isnan(values)
        found = plain[function](np.where(nan, values.dtype.type(worst), values), **options)
        if index:
            return found
        nothing = nan.all(axis=options.get("axis"), keepdims=options.get("keepdims", False))
        return np.where(nothing, values.dtype.type(np.nan), found)

    return reduced
