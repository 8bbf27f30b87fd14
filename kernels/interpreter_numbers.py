"""Numbers that numpy does not have, by their bits: bfloat16, fp8 and tf32, rounded as GPUs do.

Rounding is to nearest, ties to even. fp8 conversions saturate (PTX cvt.rn.satfinite).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]

_NAN = 0x7FC0

FP8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
"""torch's dtypes by Triton's names."""


def bf16_bits(values: Array) -> Array:
    """float32 to the bits of bfloat16, uint16; every NaN becomes the one quiet NaN."""
    values = np.asarray(values, dtype=np.float32, order="C")
    bits = values.view(np.uint32)
    half_less_one, last = np.uint32(0x7FFF), (bits >> np.uint32(16)) & np.uint32(1)
    with np.errstate(over="ignore"):  # only NaN patterns wrap around
        rounded = ((bits + half_less_one + last) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(_NAN), rounded)


def bf16_bits_once(values: Array) -> Array:
    """float64 to the bits of bfloat16, rounded once: on the way through float32 to odd.

    An odd last bit says "not exact", so that the second rounding meets no false tie
    (Boldo and Melquiond 2008).
    """
    values = np.asarray(values, dtype=np.float64, order="C")
    near = values.astype(np.float32)
    bits = near.view(np.uint32).copy()
    away = np.abs(near.astype(np.float64)) > np.abs(values)
    inexact = np.isfinite(values) & (near.astype(np.float64) != values)
    bits = np.where(inexact & away, bits - np.uint32(1), bits)
    return bf16_bits(np.where(inexact, bits | np.uint32(1), bits).view(np.float32))


def bf16_values(bits: Array) -> Array:
    """The bits of bfloat16 to float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def fp8_bits(values: Array, name: str) -> Array:
    """float32 to the bits of an fp8 format, uint8; beyond its range the largest value."""
    dtype = FP8[name]
    given = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    largest = torch.finfo(dtype).max
    held = torch.where(given.isnan(), given, given.clamp(-largest, largest))
    return held.to(dtype).view(torch.uint8).numpy()


def fp8_values(bits: Array, name: str) -> Array:
    """The bits of an fp8 format to float32, exactly."""
    given = torch.from_numpy(np.ascontiguousarray(bits, dtype=np.uint8))
    return given.view(FP8[name]).to(torch.float32).numpy()


def tf32_values(values: Array) -> Array:
    """float32 as a tensor core reads it for tf32: of the fraction ten bits, the rest is ignored.

    Triton 3.9 gives mma and wgmma the float32 as it is, without cvt.rna.tf32.f32.
    """
    values = np.asarray(values, dtype=np.float32, order="C")
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
