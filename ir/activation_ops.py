"""Operations of quantized activations: scales found at run time, int8 codes, and their values.

Defined as in `ops`: schema, shape rule and reference in one function. Codes are int8: symmetric
ones from -127 to 127, those with a zero point from -128 to 127 (as uint8 codes, each less 128).
Everything is computed in float32 (float64 for a float64 x); rounding is to nearest, ties to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import _define

PER = ("tensor", "token")
STEPS = 255
"""Steps between the lowest and the highest code with a zero point."""


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _range(x: Tensor, per: str) -> tuple[Tensor, Tensor]:
    """Lowest and highest value, widened to hold 0: [..., 1] by token, [1] of the whole tensor."""
    wide = _wide(x)
    if per == "token":
        low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    else:
        low, high = wide.amin().reshape(1), wide.amax().reshape(1)
    return low.clamp_max(0), high.clamp_min(0)


def _activation_scale(x: Tensor, per: str, symmetric: bool = True) -> Tensor:
    """The step between neighbouring codes for what x holds now.

    per: "token" gives one for each row [..., 1], "tensor" one for all [1]. symmetric: the largest
    magnitude over 127; else the range, widened to hold 0, over 255 (Jacob et al. 2018, sec. 3).
    A NaN or infinity in x makes its values NaN.
    """
    if symmetric:
        sizes = _wide(x).abs()
        most = sizes.amax(-1, keepdim=True) if per == "token" else sizes.amax().reshape(1)
        return most / 127
    low, high = _range(x, per)
    return (high - low) / STEPS


_define(
    "activation_scale(Tensor x, str per, bool symmetric=True) -> Tensor",
    _activation_scale,
)


def _activation_zero(x: Tensor, scale: Tensor, per: str) -> Tensor:
    """The code of 0, int32 of scale's shape, that puts x's lowest value on the code -128."""
    low, _ = _range(x, per)
    step = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (torch.round(-low / step) - 128).clamp(-128, 127).to(torch.int32)


_define("activation_zero(Tensor x, Tensor scale, str per) -> Tensor", _activation_zero)


def _quantize(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """int8 codes round(x / scale) + zero, held within the codes there are.

    x: [..., channels]; scale, zero (int32): broadcast against x. A scale of 0 (a row of zeros)
    counts as 1. Values past the ends take the code at the end.
    """
    wide = _wide(x)
    scale = scale.to(wide.dtype)
    steps = torch.round(wide / torch.where(scale == 0, torch.ones_like(scale), scale))
    if zero is None:
        return steps.clamp(-127, 127).to(torch.int8)
    return (steps + zero).clamp(-128, 127).to(torch.int8)


_define("quantize(Tensor x, Tensor scale, Tensor? zero=None) -> Tensor", _quantize)


def _dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None = None, *, dtype: torch.dtype
) -> Tensor:
    """(codes - zero) * scale, rounded once to `dtype`. codes: int8 [..., channels]."""
    wide = torch.promote_types(torch.promote_types(scale.dtype, dtype), torch.float32)
    steps = codes.to(wide) if zero is None else codes.to(wide) - zero
    return (steps * scale.to(wide)).to(dtype)


_define(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero=None, *, ScalarType dtype) -> Tensor",
    _dequantize,
)


def _outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """bool [channels]: whether any row of x reaches `threshold` in magnitude in that column."""
    return (x.abs() >= threshold).flatten(0, -2).any(0)


_define("outlier_columns(Tensor x, float threshold) -> Tensor", _outlier_columns)


def _round_regular(x: Tensor, threshold: float) -> Tensor:
    """x with all columns but the outliers rounded to int8, by row (Dettmers et al. 2022, eq. 8).

    Outlier columns are those in which any row reaches `threshold`; they keep x's dtype and count
    as zeros for the scales of the others. x: [..., channels]. Returns the shape and dtype of x.
    """
    outliers = _outlier_columns(x, threshold)
    regular = torch.where(outliers, torch.zeros_like(x), x)
    scale = _activation_scale(regular, "token")
    rounded = _dequantize(_quantize(regular, scale), scale, dtype=x.dtype)
    return torch.where(outliers, x, rounded)


_define("round_regular(Tensor x, float threshold) -> Tensor", _round_regular)
