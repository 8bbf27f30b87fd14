"""Number formats that numpy lacks, and roundings that it does not do: bfloat16, fp8, fused adds.

All functions take and return arrays; bfloat16 and fp8 values are raw bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_HALF = np.uint32(0x7FFF)
_ONE, _SIXTEEN = np.uint32(1), np.uint32(16)
_LOW = np.uint64((1 << 28) - 1)


def from_bf16(bits: Array) -> Array:
    """uint16 to float32, exactly."""
    return (bits.astype(np.uint32) << _SIXTEEN).view(np.float32)


def to_bf16(values: Array) -> Array:
    """float32 to uint16, to nearest even; NaN becomes 0x7FFF as on the GPU."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + _HALF + ((bits >> _SIXTEEN) & _ONE)) >> _SIXTEEN).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def to_odd(values: Array, dtype: type[Any] = np.float32) -> Array:
    """A narrower float rounded to odd: a second rounding then errs no more than one would.

    (Boldo and Melquiond 2008: round to odd, then to nearest, is correct with two spare bits.)
    """
    near = values.astype(dtype)
    back = near.astype(values.dtype)
    even = (near.view(f"u{near.itemsize}") & 1) == 0
    wrong = even & (back != values) & np.isfinite(near)
    if wrong.any():
        toward = np.where(values > back, np.inf, -np.inf).astype(dtype)
        near = np.where(wrong, np.nextafter(near, toward), near)
    return near


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, float16 or widened bfloat16 values, as float64 rounded to odd.

    The product of two float32 is exact in float64; the sum is corrected where its rounding could
    decide the next one, which is where its last 28 bits vanish.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    doubtful = (total.view(np.uint64) & _LOW) == 0
    if not doubtful.any():
        return total
    part = total - product
    error = (product - (total - part)) + (c - part)
    wrong = doubtful & (error != 0) & np.isfinite(error)
    if not wrong.any():
        return total
    return np.where(wrong, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def _fp8_values(exponent: int, mantissa: int, bias: int, codes: int) -> Array:
    """The magnitudes of the first `codes` codes of a small float, ascending, float32."""
    code = np.arange(codes)
    power, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
    normal = np.ldexp(1.0 + fraction / (1 << mantissa), power - bias)
    small = np.ldexp(fraction / (1 << mantissa), 1 - bias)
    return np.where(power > 0, normal, small).astype(np.float32)


class SmallFloat:
    """fp8 or fp4 in the OCP formats: sign, then codes whose magnitudes ascend.

    Micikevicius et al. 2022 (FP8 Formats for Deep Learning), table 1; OCP MX 1.0 for e2m1.
    """

    def __init__(self, exponent: int, mantissa: int, bias: int, finite: int, infinite: bool):
        self.bits = 1 + exponent + mantissa
        self.sign = 1 << (self.bits - 1)
        self.finite = _fp8_values(exponent, mantissa, bias, finite)
        table = np.full(self.sign, np.nan, np.float32)
        table[:finite] = self.finite
        if infinite:
            table[finite] = np.inf
        self.table = np.concatenate([table, -table])
        self.middle = (self.finite[1:].astype(np.float64) + self.finite[:-1]) / 2

    def widen(self, codes: Array) -> Array:
        """Codes to float32, exactly."""
        return self.table[codes]

    def narrow(self, values: Array) -> Array:
        """float32 to codes, to nearest even, saturating at the largest finite magnitude."""
        magnitude = np.abs(values)
        low = np.searchsorted(self.middle, magnitude, "left")
        high = np.searchsorted(self.middle, magnitude, "right")
        code = np.where(low % 2 == 0, low, high) | np.where(np.signbit(values), self.sign, 0)
        return np.where(np.isnan(values), self.sign - 1, code).astype(np.uint8)


E4M3 = SmallFloat(4, 3, 7, 127, False)
E5M2 = SmallFloat(5, 2, 15, 124, True)
E2M1 = SmallFloat(2, 1, 1, 8, False)
SMALL_FLOATS = {"e4m3": E4M3, "e5m2": E5M2, "e2m1": E2M1}
