"""A base format and a few outliers in 16 bits, by rows: int4-g64-sym+sparse0.5%.

What is taken out is zero to the base, so groups are not stretched by it (Dettmers et al. 2023,
SpQR, sec. 3.2; Kim et al. 2023, SqueezeLLM, sec. 4.2). An outlier costs 32 bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .composite_format import (
    back,
    base_of,
    check_finite,
    counted,
    half_dtype,
    halves,
    percent,
    rounding_of,
    rows_of,
)
from .encoded import Encoded, Family, Format, Stored
from .errors import WrongOption
from .sparse_rows import COLUMNS, PARTS, POINTERS, VALUES, column_dtype, largest, places, sparse
from .weight_blocks import check_weight


@dataclass(frozen=True)
class WithOutliers(Format):
    """base: of all values but the outliers. fraction: of the values that are outliers."""

    base: Format
    fraction: float = 0.005

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 0.5:
            raise WrongOption(
                "the share of outliers is out of range",
                expected="more than 0, at most 50%",
                found=percent(self.fraction),
                fix="use 0.5%",
            )

    @property
    def shared_parts(self) -> frozenset[str]:  # type: ignore[override]
        return self.base.shared_parts | PARTS

    @property
    def name(self) -> str:
        return f"{self.base.name}+sparse{percent(self.fraction)}"

    @property
    def group_size(self) -> int | None:
        """That of the base, which decides which widths fit."""
        return getattr(self.base, "group_size", None)

    def grouping(self, length: int) -> int:
        return self.base.grouping(length)

    def stored(
        self, shape: Sequence[int], axis: int, dtype: torch.dtype
    ) -> dict[str, Stored] | None:
        kept = self.base.stored(shape, axis, dtype)
        if kept is None:
            return None
        count, length = counted(self.fraction, math.prod(shape)), shape[axis]
        return {
            **kept,
            POINTERS: (torch.int32, (math.prod(shape) // length + 1,)),
            COLUMNS: (column_dtype(length), (count,)),
            VALUES: (half_dtype(dtype), (count,)),
        }

    def encode(self, weight: Tensor, axis: int = -1, *, where: str = "") -> Encoded:
        """The outliers are the largest magnitudes of the whole weight."""
        return self.encode_by(weight, None, axis, where=where)

    def encode_by(
        self, weight: Tensor, importance: Tensor | None, axis: int = -1, *, where: str = ""
    ) -> Encoded:
        """The outliers are the largest of importance * value^2.

        importance: [length of the grouped axis], not negative, for example the mean square of the
        inputs; None: magnitudes alone.
        """
        check_weight(weight, axis, where)
        rows = rows_of(weight, axis)
        check_finite(rows, where)
        chosen = largest(rows, importance, counted(self.fraction, rows.numel()))
        kept = sparse(rows, chosen, rows.dtype)
        kept[VALUES] = halves(kept[VALUES], weight.dtype, where)
        rows.view(-1)[chosen] = 0
        rest = self.base.encode(back(rows, weight.shape, axis), axis, where=where)
        return Encoded(self, rest.shape, rest.dtype, rest.axis, {**rest.parts, **kept})

    def rest(self, encoded: Encoded) -> Encoded:
        """What is kept in the base format."""
        return base_of(encoded, self.base, PARTS)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        values = encoded.parts[VALUES].to(dtype)
        return self._scattered(encoded, self.rest(encoded).decode(dtype), values)

    def worst_error(self, encoded: Encoded) -> Tensor:
        bound = rounding_of(encoded.parts[VALUES])
        return self._scattered(encoded, self.rest(encoded).worst_error(), bound)

    def _scattered(self, encoded: Encoded, rest: Tensor, values: Tensor) -> Tensor:
        rows = rows_of(rest, encoded.axis)
        rows.view(-1)[places(encoded.parts, rows.shape[1])] = values
        return back(rows, encoded.shape, encoded.axis)


def _parse(match: re.Match[str]) -> WithOutliers:
    from .formats import parse_format

    return WithOutliers(parse_format(match[1]), float(match[2]) / 100)


FAMILY = Family(
    pattern=r"(.+)\+sparse(\d+(?:\.\d+)?|\d*\.\d+)%",
    parse=_parse,
    known=("int4-g64-sym+sparse0.5%", "int3-g64-sym+sparse0.5%"),
    grammar="any format, then +sparse and a percentage",
)
