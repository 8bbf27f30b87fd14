"""The grid of a static activation scale: what a range of values becomes, and rounding to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .activation_ops import STEPS


@dataclass(frozen=True)
class ActivationGrid:
    """A scale and, unless symmetric, the int8 code of zero. Floats as float32 holds them."""

    scale: float
    zero: int | None

    @classmethod
    def of(cls, low: float, high: float, symmetric: bool) -> ActivationGrid:
        """The grid whose ends are `low` and `high`, widened to hold 0."""
        low, high = min(low, 0.0), max(high, 0.0)
        if symmetric:
            return cls(_float32(max(-low, high) / 127), None)
        scale = _float32((high - low) / STEPS)
        return cls(scale, max(-128, min(127, round(-low / (scale or 1.0)) - 128)))

    def rounded(self, values: Tensor) -> Tensor:
        """The values on the grid, in their own dtype."""
        zero, lowest = self.zero or 0, -127 if self.zero is None else -128
        steps = torch.round(values / (self.scale or 1.0)) + zero
        return (steps.clamp(lowest, 127) - zero) * self.scale


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()
