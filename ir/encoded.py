"""A weight held in a number format: what every format must answer, and the tensors it stores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class Format(ABC):
    """A number format for weights. Subclasses are frozen dataclasses, so equal options are equal.

    A weight is [..., out, in]; the format groups values along one axis (the one that a matmul
    sums over). Stored parts always have that axis last, whatever its place in the weight.
    """

    rows_apart: ClassVar[bool] = False
    """Whether every stored part of a weight [out, in] is a tensor [out, ...], a row's own."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that `parse_format` reads back, as used in recipes and metadata."""

    @abstractmethod
    def encode(self, weight: Tensor, axis: int = -1, *, where: str = "") -> Encoded:
        """Round `weight` to this format; `where` names the weight in errors."""

    @abstractmethod
    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        """The values that the stored parts stand for, in the weight's own shape."""

    @abstractmethod
    def codes(self, encoded: Encoded) -> Tensor:
        """The unsigned codes, uint8, group axis last."""

    @abstractmethod
    def scale(self, encoded: Encoded) -> Tensor:
        """The factor of each group [..., groups], in the format's scale dtype."""

    @abstractmethod
    def zero_point(self, encoded: Encoded) -> Tensor | None:
        """The code of zero in each group [..., groups], uint8; None where it is implied."""

    @abstractmethod
    def worst_error(self, encoded: Encoded) -> Tensor:
        """Upper bound of |weight - decode|, float64, in the weight's own shape."""


@dataclass(frozen=True, eq=False, repr=False)
class Encoded:
    """A weight in a number format.

    shape, dtype: of the weight as the model knows it; axis: the grouped axis, counted from the
    end (-1 or below); parts: the stored tensors by name, their group axis last.
    """

    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int
    parts: Mapping[str, Tensor]

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """The shape with the group axis moved last: what `codes()` has."""
        axis = self.axis % len(self.shape)
        return (*self.shape[:axis], *self.shape[axis + 1 :], self.shape[axis])

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The approximated weight, in its own shape and (unless told) its own dtype."""
        return self.format.decode(self, dtype or self.dtype)

    def codes(self) -> Tensor:
        """The unsigned codes, uint8, of shape `rows_shape`."""
        return self.format.codes(self)

    @property
    def scale(self) -> Tensor:
        """[*rows_shape[:-1], groups]."""
        return self.format.scale(self)

    @property
    def zero_point(self) -> Tensor | None:
        """uint8 [*rows_shape[:-1], groups]; None for a symmetric format."""
        return self.format.zero_point(self)

    def worst_error(self) -> Tensor:
        """Elementwise upper bound of |weight - decode()|, float64, in the weight's shape."""
        return self.format.worst_error(self)

    def nbytes(self) -> int:
        """Bytes of all stored parts."""
        return sum(part.nbytes for part in self.parts.values())

    def bits_per_weight(self) -> float:
        """Stored bits for one value, scales and zero points included."""
        return 8 * self.nbytes() / math.prod(self.shape)

    def __eq__(self, other: object) -> bool:
        """Equal format, shape, dtype and axis, and parts equal bit for bit."""
        if not isinstance(other, Encoded):
            return NotImplemented
        mine = (self.format, self.shape, self.dtype, self.axis, self.parts.keys())
        theirs = (other.format, other.shape, other.dtype, other.axis, other.parts.keys())
        return mine == theirs and all(
            part.dtype == other.parts[name].dtype and torch.equal(part, other.parts[name])
            for name, part in self.parts.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        axis = "" if self.axis == -1 else f", axis={self.axis}"
        return (
            f"Encoded({self.format.name}, {dtype}{list(self.shape)}{axis}, "
            f"{self.bits_per_weight():.2f} bits a weight)"
        )
