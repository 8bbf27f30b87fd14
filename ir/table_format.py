"""Formats whose codes are places in one fixed table of numbers: value = table[code] * factor.

Small floats, quantiles of a Gaussian, signs: they differ in the table and in how a group's factor
is found. The numbers are divided by the factor and rounded to the nearest entry.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .affine import half_spacing, scale_overflow, smallest
from .encoded import Encoded
from .group_format import GroupFormat, Parameters

Table = tuple[float, ...]


class TableFormat(GroupFormat):
    """parameters: factor [rows, groups]; doubt likewise: how far it may lie from the fitted one.

    entries: the table, NaN where a code is none; ends: largest magnitude of a weight over its
    group's fitted factor, infinity if it is not known.
    """

    @property
    @abstractmethod
    def entries(self) -> Table: ...

    @property
    def even_ties(self) -> bool:
        """Whether a number in the middle goes to the even code, else to the lower value."""
        return False

    @abstractmethod
    def ends(self, length: int) -> float: ...

    def rounded(self, groups: Tensor, parameters: Parameters) -> Tensor:
        return self.nearest_codes(groups / _divisor(parameters["factor"].to(groups.dtype)))

    def nearest_codes(self, scaled: Tensor) -> Tensor:
        """The codes uint8 of the nearest entries."""
        middles, order = _search(self.entries, self.even_ties, scaled.dtype)
        places = torch.bucketize(scaled.contiguous(), middles.to(scaled.device), out_int32=True)
        return order.to(scaled.device).index_select(0, places.flatten()).view(scaled.shape)

    def values(self, codes: Tensor, parameters: Parameters, dtype: torch.dtype) -> Tensor:
        table = torch.tensor(self.entries, dtype=dtype, device=codes.device)
        found = table.index_select(0, codes.flatten().int()).view(codes.shape)
        return found.mul_(parameters["factor"].to(dtype).unsqueeze(-1))

    def bound(self, codes: Tensor, parameters: Parameters, length: int) -> Tensor:
        factor = parameters["factor"].double().abs().unsqueeze(-1)
        doubt = parameters["doubt"].double().unsqueeze(-1)
        places = codes.long()
        cell, last = (part.to(codes.device)[places] for part in _cells(self.entries))
        size = torch.tensor(self.entries, dtype=torch.float64).abs().to(codes.device)[places]
        if self.as_fitted:
            return torch.where(factor + doubt == 0, 0.0, cell * (factor + doubt) + size * doubt)
        inside, reach = cell * factor, self.ends(length)
        beyond = torch.nan_to_num((reach - size) * factor, 0.0) + (reach * doubt).nan_to_num(0.0)
        bound = torch.where(last, torch.maximum(inside, beyond), inside)
        return torch.where(factor == 0, 0.0, bound)

    def factors(self, encoded: Encoded) -> Tensor:
        """The factor of each group [*rows_shape[:-1], groups], float32 or float64."""
        found = self.parameters_of(encoded)["factor"]
        return found.reshape(*encoded.rows_shape[:-1], found.shape[1])

    def scale(self, encoded: Encoded) -> Tensor:
        return self.factors(encoded)


def kept_factor(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Factors rounded to `dtype`, none of them vanishing; raises ScaleOverflow."""
    kept = exact.to(dtype)
    if bool(torch.isinf(kept).any()):
        raise scale_overflow(exact, dtype, "")
    vanished = (kept == 0) & (exact != 0)
    return torch.where(vanished, (exact.sign() * smallest(dtype)).to(dtype), kept)


def with_doubt(factor: Tensor) -> dict[str, Tensor]:
    """The parameters of stored factors [rows, groups], which were rounded to their dtype."""
    doubt = half_spacing(factor.double().abs(), factor.dtype)
    doubt = torch.where(factor == 0, 0.0, doubt)
    wide = factor if factor.dtype == torch.float64 else factor.float()
    return {"factor": wide, "doubt": doubt}


def float_values(exponent_bits: int, mantissa_bits: int, bias: int) -> Table:
    """All values of a small float by its bits, sign highest; no code is infinite or NaN."""
    found: list[float] = []
    for code in range(1 << (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        part = mantissa / (1 << mantissa_bits)
        found.append(
            2.0 ** (exponent - bias) * (1 + part) if exponent else 2.0 ** (1 - bias) * part
        )
    return (*found, *(-value for value in found))


def _divisor(factor: Tensor) -> Tensor:
    return torch.where(factor == 0, torch.ones_like(factor), factor).unsqueeze(-1)


def _sorted(entries: Sequence[float]) -> list[tuple[float, int]]:
    """(value, code) by value; of two codes of one value (zeros) the lower."""
    kept: dict[float, int] = {}
    for code, value in enumerate(entries):
        if value == value:
            kept.setdefault(value + 0.0, code)
    return sorted(kept.items())


@cache
def _search(entries: Table, even_ties: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The middles between entries, and the codes of the entries in order.

    A number goes up if it is greater than the middle; where a tie goes up the middle is a hair
    lower.
    """
    pairs = _sorted(entries)
    order = torch.tensor([code for _, code in pairs], dtype=torch.uint8)
    table = torch.tensor([value for value, _ in pairs], dtype=dtype)
    middles = (table[:-1] + table[1:]) / 2
    if even_ties:
        below = torch.nextafter(middles, torch.full_like(middles, -torch.inf))
        middles = torch.where(order[1:] % 2 == 0, below, middles)
    return middles, order


@cache
def _cells(entries: Table) -> tuple[Tensor, Tensor]:
    """By code: how far a number may lie from its entry between the ends, and if it is an end."""
    pairs = _sorted(entries)
    cell = torch.zeros(len(entries), dtype=torch.float64)
    last = torch.zeros(len(entries), dtype=torch.bool)
    for place, (value, _) in enumerate(pairs):
        gaps = [abs(pairs[at][0] - value) for at in (place - 1, place + 1) if 0 <= at < len(pairs)]
        for code in (code for code, entry in enumerate(entries) if entry == value):
            cell[code] = max(gaps) / 2
            last[code] = place in (0, len(pairs) - 1)
    return cell, last


__all__ = ["Table", "TableFormat", "float_values", "kept_factor", "with_doubt"]
