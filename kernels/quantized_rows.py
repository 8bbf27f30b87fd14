"""Quantization of rows to int8 or fp8 codes in plain torch, as every kernel here rounds."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The magnitude of the largest code: of symmetric int8, and of fp8 e4m3."""


def code_dtype(codes: str) -> torch.dtype:
    return torch.int8 if codes == "int8" else torch.float8_e4m3fn


def quantized_twin(x: Tensor, scale: Tensor | None, codes: str) -> tuple[Tensor, Tensor]:
    """(codes [..., columns], steps [..., 1] or the scale given): round(x / step), ties to even.

    Computed in float32 (float64 for a float64 x). A dynamic step is the row's largest magnitude
    over the largest code; a step of zero counts as one, so a row of zeros has codes of zero.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    most = LARGEST[codes]
    if scale is None:
        shape = (*x.shape[:-1], 1)
        scale = x.abs().amax(-1, keepdim=True) / most if x.shape[-1] else x.new_zeros(shape)
    step = torch.where(scale == 0, torch.ones_like(scale), scale)
    held = (x / step).clamp(-most, most)
    return (held.round() if codes == "int8" else held).to(code_dtype(codes)), scale


def asymmetric_twin(
    x: Tensor, scale: Tensor | None, zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(int8 codes, steps, zeros): round(x / step) + zero, -128 to 127, so that 0 has a code.

    A dynamic step is the row's range, widened to hold 0, over 255 (Jacob et al. 2018, sec. 3).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale is None:
        low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
        scale = (high - low) / 255
        zero = (-128 - low / torch.where(scale == 0, torch.ones_like(scale), scale)).round()
        zero = zero.clamp(-128, 127).to(torch.int32)
    assert zero is not None, "a static scale comes with its zero point"
    step = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = ((x / step).round() + zero).clamp(-128, 127).to(torch.int8)
    return codes, scale, zero


def code_why_not(arch: str, scale: Tensor | None, codes: str) -> str | None:
    if codes not in LARGEST:
        return f"there are no codes {codes!r}"
    if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32):
        return "its static scale is not one float32 number"
    return fp8_why_not(arch) if codes == "fp8" else None


def fp8_why_not(arch: str) -> str | None:
    """fp8 e4m3 as the Open Compute Project defines it; gfx942 computes in another variant."""
    if arch.startswith("gfx"):
        return f"{arch} has no fp8 e4m3 with infinities left out (OCP), only the variant fnuz"
    if int(arch.split("_")[1]) < 89:
        return f"{arch} has no fp8; it takes sm_89 or later"
    return None
