"""GOBO: a small codebook for the Gaussian body of a weight, outliers exact (Zadeh et al. 2020).

Outliers are the values whose log-probability under the layer's Gaussian is below -4 (sec. 4.1);
the others take the nearest of 2^bits centroids, which start as the means of equally filled bins
and move until the sum of distances stops to fall (sec. 4.2, algorithm 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .composite_format import back, check_finite, rows_of
from .encoded import Encoded, Family, Format, Stored
from .errors import WrongOption
from .layouts import BitPacked
from .sparse_rows import COLUMNS, PARTS, POINTERS, VALUES, column_dtype, places, sparse
from .weight_blocks import check_weight

_LOG_PROBABILITY = -4.0
_ITERATIONS = 50


@dataclass(frozen=True)
class Gobo(Format):
    """value = table[code], or the weight's own value for an outlier.

    parts: codes, table float32 [2^bits], and the outliers by rows, in the weight's dtype.
    """

    shared_parts: ClassVar[frozenset[str]] = PARTS | {"table"}
    bits: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise WrongOption("bits out of range", expected="1 to 8", found=str(self.bits))

    @property
    def name(self) -> str:
        return f"gobo{self.bits}"

    def stored(self, shape: Sequence[int], axis: int, dtype: torch.dtype) -> dict[str, Stored]:
        rows = list(shape)
        length = rows.pop(axis)
        return {
            "codes": (torch.uint8, (*rows, BitPacked(self.bits).stored(length))),
            "table": (torch.float32, (1 << self.bits,)),
            POINTERS: (torch.int32, (math.prod(rows) + 1,)),
            COLUMNS: (column_dtype(length), (-1,)),
            VALUES: (dtype, (-1,)),
        }

    def encode(self, weight: Tensor, axis: int = -1, *, where: str = "") -> Encoded:
        check_weight(weight, axis, where)
        rows = rows_of(weight, axis)
        check_finite(rows, where)
        body = _is_body(rows)
        table = _centroids(rows[body], 1 << self.bits)
        codes = torch.bucketize(rows.float(), (table[:-1] + table[1:]) / 2, out_int32=True)
        packed = BitPacked(self.bits).pack(codes.to(torch.uint8))
        lead = weight.movedim(axis, -1).shape[:-1]
        chosen = (~body).reshape(-1).nonzero().flatten()
        parts = {"codes": packed.reshape(*lead, -1), "table": table}
        parts |= sparse(rows, chosen, weight.dtype)
        from_end = axis if axis < 0 else axis - weight.dim()
        return Encoded(self, tuple(weight.shape), weight.dtype, from_end, parts)

    def codes(self, encoded: Encoded) -> Tensor:
        return BitPacked(self.bits).unpack(encoded.parts["codes"], encoded.rows_shape[-1])

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        codes = self.codes(encoded)
        table = encoded.parts["table"].to(dtype)
        rows = table.index_select(0, codes.flatten().int()).view(-1, codes.shape[-1])
        rows.view(-1)[places(encoded.parts, rows.shape[1])] = encoded.parts[VALUES].to(dtype)
        return back(rows, encoded.shape, encoded.axis)

    def worst_error(self, encoded: Encoded) -> Tensor:
        """Zero for outliers; infinite for the end codes, beyond which nothing is kept."""
        codes = self.codes(encoded)
        gaps = encoded.parts["table"].double().diff() / 2
        gaps = torch.nn.functional.pad(gaps, (1, 1), value=float("inf"))
        cell = torch.maximum(gaps[:-1], gaps[1:])
        # The entry itself is rounded to the weight's dtype.
        cell = cell + encoded.parts["table"].double().abs() * torch.finfo(encoded.dtype).eps
        rows = cell[codes.flatten().int()].view(-1, codes.shape[-1])
        rows.view(-1)[places(encoded.parts, rows.shape[1])] = 0
        return back(rows, encoded.shape, encoded.axis)


def _is_body(rows: Tensor) -> Tensor:
    """Which values are no outliers; all of a weight without spread."""
    wide = rows.double()
    mean, spread = wide.mean(), wide.std(correction=0)
    if not bool(spread > 0):
        return torch.ones_like(rows, dtype=torch.bool)
    # log p = -((w - mean) / spread)^2 / 2 - log(spread sqrt(2 pi))
    allowed = -2 * (_LOG_PROBABILITY + torch.log(spread) + math.log(2 * math.pi) / 2)
    # A weight of a large scale has no density above the threshold: its middle is the body still.
    reach = allowed.clamp(min=9.0)
    return ((wide - mean) / spread).square() <= reach


def _centroids(body: Tensor, count: int) -> Tensor:
    """Sorted centroids float32 [count] of the values of least mean distance found."""
    ordered = body.double().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    edges = torch.linspace(0, len(ordered), count + 1).round().long()
    table = _means(sums, edges, ordered)
    best, least = table, float("inf")
    for _ in range(_ITERATIONS):
        middles = (table[:-1] + table[1:]) / 2
        inner = torch.searchsorted(ordered, middles, right=True)
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(ordered))])
        error = float((ordered - table.repeat_interleave(edges.diff())).abs().sum())
        if error >= least:
            break
        best, least = table, error
        table = _means(sums, edges, ordered, table)
    return best.float()


def _means(sums: Tensor, edges: Tensor, ordered: Tensor, before: Tensor | None = None) -> Tensor:
    """The mean of each run of ordered values; of an empty one what was there before."""
    count = edges.diff()
    if before is None:
        before = ordered[edges[:-1].clamp(max=len(ordered) - 1)]
    found = sums[edges].diff() / count.clamp(min=1)
    return torch.where(count > 0, found, before).cummax(0).values


def _parse(match: re.Match[str]) -> Gobo:
    return Gobo(int(match[1]))


FAMILY = Family(
    pattern=r"gobo([1-8])",
    parse=_parse,
    known=("gobo3", "gobo4"),
    grammar="gobo and the bits of a code",
)
