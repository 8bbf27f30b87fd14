"""Gates in [0, 1] that are exactly 0 or 1 much of the time, and still have a gradient.

The hard concrete distribution of Louizos et al. 2018, "Learning Sparse Neural Networks through L0
Regularization": a binary concrete number (eq. 10), stretched over [GAMMA, ZETA] and clamped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and stretch, as in sec. 4 of the paper."""
_SHIFT = BETA * math.log(-GAMMA / ZETA)
_EDGE = 1e-6


def sampled_gates(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """One draw of every gate, from numbers uniform in [0, 1] of log_alpha's shape (eq. 10, 11)."""
    uniform = uniform.clamp(_EDGE, 1 - _EDGE)
    noise = uniform.log() - (-uniform).log1p()
    return _stretched(torch.sigmoid((noise + log_alpha) / BETA))


def settled_gates(log_alpha: Tensor) -> Tensor:
    """The gates without noise (eq. 13)."""
    return _stretched(torch.sigmoid(log_alpha))


def open_share(log_alpha: Tensor) -> Tensor:
    """The probability of each gate to be more than 0 (eq. 12)."""
    return torch.sigmoid(log_alpha - _SHIFT)


def log_alpha_of(share: float) -> float:
    """Where gates are open with this probability, more than 0 and less than 1."""
    return math.log(share / (1 - share)) + _SHIFT


def _stretched(concrete: Tensor) -> Tensor:
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


__all__ = ["BETA", "GAMMA", "ZETA", "log_alpha_of", "open_share", "sampled_gates", "settled_gates"]
