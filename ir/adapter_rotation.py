"""OFT: the inputs of a layer are turned by an orthogonal matrix of blocks, W becomes W R^T.

Each block is made of a skew-symmetric matrix Q by the Cayley transform (I - Q) (I + Q)^-1 (Qiu et
al. 2023, sec. 3.3), or by the first terms of its Neumann series (Qiu et al. 2025, sec. 4.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter_change import Change, Spot


@dataclass(frozen=True)
class Rotated(Change):
    """values: above the diagonal of each Q, [blocks, size (size - 1) / 2].

    terms: of the series, 0 for the transform itself. shared: one block stands for all. radius:
    within which Q stays (COFT), 0 for any.
    """

    values: Tensor
    terms: int
    shared: bool = False
    radius: float = 0.0

    @property
    def size(self) -> int:
        """Rows of a block."""
        return (1 + math.isqrt(1 + 8 * self.values.shape[1])) // 2

    def misfit(self, spot: Spot) -> str | None:
        if len(spot.shape) != 2 or spot.axis == -2 or (spot.table and spot.axis is None):
            return "OFT turns the inputs of a weight [out, in] of a linear layer"
        size, blocks = self.size, len(self.values)
        if size * (size - 1) // 2 != self.values.shape[1]:
            return f"{self.values.shape[1]} values are no upper half of a block"
        fits = spot.shape[1] % size == 0 if self.shared else blocks * size == spot.shape[1]
        if not fits or (self.shared and blocks != 1):
            return f"{blocks} blocks of {size} inputs, but the base's is {list(spot.shape)}"
        return None

    def apply(self, weight: Tensor, base: Tensor, spot: Spot) -> Tensor:
        blocks = self._blocks(weight.dtype)
        count = spot.shape[1] // self.size
        matrix = torch.block_diag(*(blocks[0 if self.shared else n] for n in range(count)))
        return (matrix @ weight.t()).t()

    def _blocks(self, dtype: torch.dtype) -> Tensor:
        """R by blocks [blocks, size, size]."""
        skew = self._skew(self._near(self.values.to(dtype)))
        one = torch.eye(self.size, dtype=dtype).expand_as(skew)
        if not self.terms:
            return torch.linalg.solve(one + skew, one - skew, left=False)
        # I + 2 Q + 2 Q^2 + ... and the last power once, which for PEFT is never below the third
        last = max(3, self.terms - 1)
        factors = {1: [], 2: [2.0]}.get(self.terms, [2.0] * (last - 1) + [1.0])
        found, power = one.clone(), one
        for degree, factor in enumerate(factors):
            power = torch.bmm(power, skew) if degree else skew
            found = found.add(power, alpha=factor)
        return found

    def _skew(self, values: Tensor) -> Tensor:
        rows, columns = torch.triu_indices(self.size, self.size, 1)
        upper = values.new_zeros(len(values), self.size, self.size)
        upper[:, rows, columns] = values
        return upper - upper.transpose(-2, -1)

    def _near(self, values: Tensor) -> Tensor:
        """Of a block further away than the radius, the nearest one within."""
        if not self.radius:
            return values
        limit = self.radius / torch.sqrt(torch.tensor(len(values)))
        length = torch.norm(self._skew(values), dim=(1, 2), keepdim=True)
        rows, columns = torch.triu_indices(self.size, self.size, 1)
        scaled = limit * (self._skew(values) / length)
        return torch.where(length.squeeze(2) <= limit, values, scaled[:, rows, columns])


__all__ = ["Rotated"]
