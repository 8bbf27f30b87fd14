"""What one adapter does to one weight: the change, and the spot of the weight that it meets.

Values are computed in `wide_dtype`: float32 for a weight of half precision, else the weight's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spot:
    """A weight as the program reads it.

    axis: the one that matmuls sum over, -1: [out, in], -2: [in, out]; None where none reads it.
    table: whether rows are looked up.
    """

    name: str
    shape: tuple[int, ...]
    axis: int | None = None
    table: bool = False


class Change(ABC):
    """A change of one weight."""

    @abstractmethod
    def misfit(self, spot: Spot) -> str | None:
        """Why the tensors do not fit the weight; None if they do."""

    @abstractmethod
    def apply(self, weight: Tensor, base: Tensor, spot: Spot) -> Tensor:
        """The changed weight. weight: as earlier adapters left it; base: before all of them."""


class Delta(Change):
    """A change that adds a delta, which does not depend on the weight."""

    @abstractmethod
    def delta(self, spot: Spot, dtype: torch.dtype) -> Tensor:
        """What is added, in the weight's own shape."""

    def apply(self, weight: Tensor, base: Tensor, spot: Spot) -> Tensor:
        return weight + self.delta(spot, weight.dtype)


@dataclass(frozen=True)
class Replace(Change):
    """The adapter holds the whole weight: modules_to_save, trained biases, tuned norms."""

    value: Tensor

    def misfit(self, spot: Spot) -> str | None:
        return unlike(spot, self.value.shape)

    def apply(self, weight: Tensor, base: Tensor, spot: Spot) -> Tensor:
        return self.value.to(weight.dtype)


@dataclass(frozen=True)
class ReplaceRows(Change):
    """The adapter holds some rows of a table: trainable tokens."""

    rows: tuple[int, ...]
    value: Tensor

    def misfit(self, spot: Spot) -> str | None:
        if len(spot.shape) != 2 or tuple(self.value.shape) != (len(self.rows), spot.shape[1]):
            wanted = [len(self.rows), *spot.shape[1:]]
            return f"rows are {list(self.value.shape)}, expected {wanted}"
        if self.rows and not -1 < min(self.rows) <= max(self.rows) < spot.shape[0]:
            return f"row {max(self.rows)} of a table of {spot.shape[0]}"
        return None

    def apply(self, weight: Tensor, base: Tensor, spot: Spot) -> Tensor:
        at = torch.tensor(self.rows, dtype=torch.long)
        return weight.index_copy(0, at, self.value.to(weight.dtype))


@dataclass(frozen=True)
class Added(Delta):
    """A stored delta, times a factor: BitFit, the bias of a LoRA branch."""

    value: Tensor
    factor: float = 1.0

    def misfit(self, spot: Spot) -> str | None:
        return unlike(spot, self.value.shape)

    def delta(self, spot: Spot, dtype: torch.dtype) -> Tensor:
        return self.value.to(dtype) * self.factor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight of this dtype is changed."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def unlike(spot: Spot, shape: torch.Size | tuple[int, ...]) -> str | None:
    if tuple(shape) == spot.shape:
        return None
    return f"is {list(shape)}, but the base's is {list(spot.shape)}"


__all__ = ["Added", "Change", "Delta", "Replace", "ReplaceRows", "Spot", "unlike", "wide_dtype"]
