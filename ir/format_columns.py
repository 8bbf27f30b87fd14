"""A base format and a few input columns in 16 bits: int3-g64-sym+columns1%.

Keeping the 1% of columns that meet the largest activations restores most of the accuracy (Lin et
al. 2023, AWQ, sec. 3.1, table 1). The base sees zeros in their place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .composite_format import (
    base_of,
    check_finite,
    counted,
    half_dtype,
    halves,
    percent,
    rounding_of,
)
from .encoded import Encoded, Family, Format, Stored
from .errors import WrongOption
from .weight_blocks import check_weight

PLACES, VALUES = "kept_columns", "kept_values"
_BESIDE = frozenset({PLACES, VALUES})


@dataclass(frozen=True)
class WithColumns(Format):
    """base: of all other columns. fraction: of the columns along the grouped axis that are kept.

    parts: those of the base; kept_columns int32 [kept], in order; kept_values [..., kept] in
    float16 (bfloat16 for such a weight).
    """

    base: Format
    fraction: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 0.5:
            raise WrongOption(
                "the share of kept columns is out of range",
                expected="more than 0, at most 50%",
                found=percent(self.fraction),
                fix="use 1%",
            )

    @property
    def shared_parts(self) -> frozenset[str]:  # type: ignore[override]
        return self.base.shared_parts | frozenset({PLACES})

    @property
    def name(self) -> str:
        return f"{self.base.name}+columns{percent(self.fraction)}"

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
        rows = list(shape)
        count = counted(self.fraction, rows.pop(axis))
        values: Stored = (half_dtype(dtype), (*rows, count))
        return {**kept, PLACES: (torch.int32, (count,)), VALUES: values}

    def encode(self, weight: Tensor, axis: int = -1, *, where: str = "") -> Encoded:
        """The columns of the largest norms."""
        return self.encode_by(weight, None, axis, where=where)

    def encode_by(
        self, weight: Tensor, importance: Tensor | None, axis: int = -1, *, where: str = ""
    ) -> Encoded:
        """The columns of the largest `importance` [length], or of the largest norms."""
        check_weight(weight, axis, where)
        rows = weight.detach().movedim(axis, -1)
        matrix = rows.reshape(-1, rows.shape[-1])
        check_finite(matrix, where)
        size = torch.linalg.vector_norm(matrix.float(), dim=0) if importance is None else importance
        count = counted(self.fraction, rows.shape[-1])
        chosen = torch.topk(size, count, sorted=False).indices.sort().values
        kept = halves(rows[..., chosen].contiguous(), weight.dtype, where)
        rest = weight.detach().index_fill(axis, chosen, 0)
        found = self.base.encode(rest, axis, where=where)
        beside = {PLACES: chosen.to(torch.int32), VALUES: kept}
        return Encoded(self, found.shape, found.dtype, found.axis, {**found.parts, **beside})

    def rest(self, encoded: Encoded) -> Encoded:
        """What is kept in the base format."""
        return base_of(encoded, self.base, _BESIDE)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        values = encoded.parts[VALUES].to(dtype)
        return self._filled(encoded, self.rest(encoded).decode(dtype), values)

    def worst_error(self, encoded: Encoded) -> Tensor:
        bound = rounding_of(encoded.parts[VALUES])
        return self._filled(encoded, self.rest(encoded).worst_error(), bound)

    def _filled(self, encoded: Encoded, rest: Tensor, values: Tensor) -> Tensor:
        places = encoded.parts[PLACES].long()
        return rest.index_copy_(encoded.axis, places, values.movedim(-1, encoded.axis))


def _parse(match: re.Match[str]) -> WithColumns:
    from .formats import parse_format

    return WithColumns(parse_format(match[1]), float(match[2]) / 100)


FAMILY = Family(
    pattern=r"(.+)\+columns(\d+(?:\.\d+)?|\d*\.\d+)%",
    parse=_parse,
    known=("int4-g64-sym+columns1%", "int3-g64-sym+columns1%"),
    grammar="any format, then +columns and a percentage",
)
