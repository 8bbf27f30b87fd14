"""A weight held in a number format: what every format must answer, and the tensors it stores."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .errors import UnsupportedFormat
from .grid import Grid

Stored = tuple[torch.dtype, tuple[int, ...]]
"""The dtype and shape of a stored part; a size of -1 depends on the weight's values."""


class Format(ABC):
    """A number format for weights. Subclasses are frozen dataclasses, so equal options are equal.

    A weight is [..., out, in]; the format groups values along one axis (the one that a matmul
    sums over). Stored parts always have that axis last, whatever its place in the weight.
    """

    rows_apart: ClassVar[bool] = False
    """Whether every stored part of a weight [out, in] is a tensor [out, ...], a row's own."""

    groups_apart: ClassVar[bool] = True
    """Whether the grid of a group depends on that group's values alone, so that `grid` may be
    asked group by group; else it must see all rows and groups of a weight at once."""

    shared_parts: ClassVar[frozenset[str]] = frozenset()
    """Stored parts that are the whole weight's, not [*rows_shape[:-1], ...]."""

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
    def worst_error(self, encoded: Encoded) -> Tensor:
        """Upper bound of |weight - decode|, float64, in the weight's own shape.

        Infinite where a format cuts values off and does not keep how far.
        """

    def grouping(self, length: int) -> int:
        """How many neighbours of a row of `length` values share their parameters."""
        return length

    def stored(
        self, shape: Sequence[int], axis: int, dtype: torch.dtype
    ) -> dict[str, Stored] | None:
        """The parts of a weight of this shape and dtype; None if only encoding tells."""
        return None

    def bits_per_weight(
        self, shape: Sequence[int], axis: int = -1, dtype: torch.dtype = torch.float32
    ) -> float:
        """Stored bits for one value of a weight of this shape and dtype, without encoding it."""
        parts = self.stored(shape, axis, dtype)
        if parts is None or any(-1 in sizes for _, sizes in parts.values()):
            return self.encode(torch.ones(1, shape[axis], dtype=dtype)).bits_per_weight()
        bits = sum(8 * kind.itemsize * math.prod(sizes) for kind, sizes in parts.values())
        return bits / math.prod(shape)

    def grid(
        self,
        groups: Tensor,
        importance: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        where: str = "",
    ) -> Grid:
        """Fix the parameters of groups [rows, groups, group] of float32 or float64 values.

        importance: [groups, group], not negative: how much an error counts there; formats that can
        choose their parameters by it do. dtype: of the weight, if another than that of `groups`.
        where: names the weight in errors. A short last group is filled with its last value
        (`affine.grouped`), at importance 0. Raises UnsupportedFormat where there is no grid.
        """
        raise UnsupportedFormat(
            f"{self.name} has no grid that is fixed before its values are rounded",
            where=where,
            fix="use round-to-nearest for this format, or a group-wise format such as int4-g64-sym",
        )

    def nearest(self, grid: Grid, values: Tensor) -> Tensor:
        """See `Grid.nearest`."""
        raise self._lacks("a grid")

    def encode_on(
        self, weight: Tensor, grid: Grid, axis: int = -1, *, dtype: torch.dtype | None = None
    ) -> Encoded:
        """Encode with given parameters; exact for values that lie on the grid already.

        weight: in its own shape, grouped along `axis`; grid: of all its rows and groups.
        dtype: that the encoded weight shall have (default: the grid's).
        """
        raise self._lacks("a grid")

    def codes(self, encoded: Encoded) -> Tensor:
        """The unsigned codes, uint8, group axis last."""
        raise self._lacks("codes")

    def scale(self, encoded: Encoded) -> Tensor:
        """The factor of each group [..., groups], in the format's scale dtype."""
        raise self._lacks("scales")

    def zero_point(self, encoded: Encoded) -> Tensor | None:
        """The code of zero in each group [..., groups], uint8; None where it is implied."""
        raise self._lacks("zero points")

    def _lacks(self, what: str) -> UnsupportedFormat:
        return UnsupportedFormat(f"the format {self.name} has no {what}")


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


@dataclass(frozen=True)
class Family:
    """Formats that one file declares.

    pattern: of all their names; parse: the format of a match; known: the usual names, for people;
    grammar: how names are built, in words.
    """

    pattern: str
    parse: Callable[[re.Match[str]], Format]
    known: tuple[str, ...]
    grammar: str
