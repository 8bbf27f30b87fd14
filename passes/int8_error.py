"""The squared output error of a product whose input and weights are rounded to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

_TOP = 127


def int8_error(
    rows: Tensor, weight: Tensor, factors: Tensor, largest: Tensor, by_token: bool
) -> float:
    """Summed over tokens and outputs, with `factors` [in] moved from the input to the weight.

    rows: float32 [tokens, in]; weight: float32 [out, in], rounded by row; largest: [in], max|X_j|
    over all tokens, which fixes the one step of all activations unless each token has its own.
    """
    factors = factors.to(rows.dtype)
    smoothed, heavy = rows / factors, weight * factors
    if by_token:
        step = smoothed.abs().amax(-1, keepdim=True) / _TOP
    else:
        step = (largest / factors).amax() / _TOP
    wanted = rows @ weight.t()
    found = rounded(smoothed, step) @ rounded(heavy, heavy.abs().amax(-1, keepdim=True) / _TOP).t()
    return float((found - wanted).square().sum(dtype=torch.float64))


def rounded(values: Tensor, step: Tensor) -> Tensor:
    """Values at the nearest multiple of a step, at most 127 of them; zeros where it is 0."""
    step = torch.where(step > 0, step, torch.ones_like(step))
    return (values / step).round_().clamp_(-_TOP, _TOP) * step
