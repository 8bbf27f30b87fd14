"""Codes of which two in every four are not zero, stored in half: int4-g64-sym+2:4.

The codes that stay lie side by side in the base's bits, beside them the places of each group of
four (`format_two_four`); scales and zero points are the base's. Of 4 bits a value 3 are left, of 8
bits 5: a place costs one bit for each value. Every reader gets the base's codes again by `spread`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .encoded import Encoded, Family, Format, Stored
from .errors import WrongOption
from .format_affine import AffineInt
from .format_two_four import PLACES, Compressed
from .layouts import BitPacked
from .weight_blocks import check_weight, row_slices

CODES = "codes"


@dataclass(frozen=True)
class CompressedCodes(Format):
    """base: of the values; keep of every `of` neighbours may be other than zero.

    parts: codes uint8 of the kept codes [..., groups of four * keep], packed; places as in
    `Compressed`; scale and zero_point as in the base.
    """

    base: AffineInt
    keep: int = 2
    of: int = 4

    rows_apart: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.base.bits < 3:
            raise WrongOption(
                "codes of two bits are no smaller beside their places",
                expected="a base of 3 bits or more",
                found=self.base.name,
                fix="keep the base format",
            )

    @property
    def pattern(self) -> Compressed:
        """How places are stored."""
        return Compressed(self.keep, self.of)

    @property
    def name(self) -> str:
        return f"{self.base.name}+{self.pattern.name}"

    @property
    def group_size(self) -> int | None:
        """That of the base, which decides which widths fit."""
        return self.base.group_size

    def grouping(self, length: int) -> int:
        return self.base.grouping(length)

    def stored(self, shape: Sequence[int], axis: int, dtype: torch.dtype) -> dict[str, Stored]:
        parts = self.base.stored(shape, axis, dtype)
        rows = list(shape)
        length = rows.pop(axis)
        codes = self._packing.stored(self._kept_count(length))
        places = self.pattern.packing.stored(self.pattern.groups(length))
        return {
            **parts,
            CODES: (torch.uint8, (*rows, codes)),
            PLACES: (torch.uint8, (*rows, places)),
        }

    @property
    def _packing(self) -> BitPacked:
        return BitPacked(self.base.bits)

    def _kept_count(self, length: int) -> int:
        return self.pattern.groups(length) * self.keep

    def encode(self, weight: Tensor, axis: int = -1, *, where: str = "") -> Encoded:
        """The largest magnitudes of every group of four stay, rounded by the base.

        Raises NonFiniteWeight, ScaleOverflow, UnsupportedShape.
        """
        check_weight(weight, axis, where)
        masked = self.pattern.encode(weight, axis, where=where)
        found = self.base.encode(masked.decode(), axis, where=where)
        return self._compressed(found, masked.parts[PLACES])

    def holds(self, encoded: Encoded) -> bool:
        """Whether a weight in the base format has the pattern, so that nothing is lost."""
        codes, zeros = self._rows(encoded), self._zeros(encoded)
        length = codes.shape[1]
        for at in row_slices(len(codes), length):
            other = (codes[at] != self._of_columns(zeros[at], length)).to(torch.uint8)
            padded = torch.nn.functional.pad(other, (0, -length % self.of))
            groups = padded.unflatten(1, (-1, self.of))
            if bool((groups.sum(-1) > self.keep).any()):
                return False
        return True

    def compressed(self, encoded: Encoded) -> Encoded:
        """A weight in the base format, of each group the codes furthest from zero."""
        codes, zeros = self._rows(encoded), self._zeros(encoded)
        places = list[Tensor]()
        for at in row_slices(len(codes), codes.shape[1]):
            centre = self._of_columns(zeros[at], codes.shape[1])
            steps = codes[at].to(torch.int16) - centre.to(torch.int16)
            _, columns = self.pattern.kept(steps.float())
            places.append(self.pattern.packing.pack(self.pattern.place_codes(columns)))
        lead = encoded.rows_shape[:-1]
        return self._compressed(encoded, torch.cat(places).reshape(*lead, -1))

    def _compressed(self, encoded: Encoded, places: Tensor) -> Encoded:
        codes, zeros = self._rows(encoded), self._zeros(encoded)
        length, kept = codes.shape[1], list[Tensor]()
        found = replace(encoded, format=self, parts={**encoded.parts, PLACES: places})
        for at in row_slices(len(codes), length):
            centre = self._of_columns(zeros[at], length)
            filled = torch.cat((codes[at], centre[:, -1:].expand(-1, -length % self.of)), 1)
            chosen = filled.unflatten(1, (-1, self.of)).gather(-1, self._columns(found, at))
            kept.append(self._packing.pack(chosen.flatten(1)))
        packed = torch.cat(kept).reshape(*encoded.rows_shape[:-1], -1)
        return replace(found, parts={**found.parts, CODES: packed})

    def spread(self, encoded: Encoded) -> Encoded:
        """The same weight in the base format: the codes at their places, zeros between them."""
        length = encoded.rows_shape[-1]
        parts = {name: part for name, part in encoded.parts.items() if name != PLACES}
        found = replace(encoded, format=self.base, parts=parts)
        zeros, codes = self._zeros(found), list[Tensor]()
        kept = encoded.parts[CODES].reshape(len(zeros), -1)
        for at in row_slices(len(zeros), length):
            chosen = self._packing.unpack(kept[at], self._kept_count(length))
            columns = self._columns(encoded, at)
            centre = self._of_columns(zeros[at], length)
            dense = torch.cat((centre, centre[:, -1:].expand(-1, -length % self.of)), 1)
            groups = dense.unflatten(1, (-1, self.of)).contiguous()
            groups.scatter_(-1, columns, chosen.unflatten(1, (-1, self.keep)))
            codes.append(self._packing.pack(groups.flatten(1)[:, :length].contiguous()))
        parts[CODES] = torch.cat(codes).reshape(*encoded.rows_shape[:-1], -1)
        return replace(found, parts=parts)

    def _columns(self, encoded: Encoded, at: slice) -> Tensor:
        """int64 [rows, groups of four, keep]: where the kept codes belong."""
        groups = self.pattern.groups(encoded.rows_shape[-1])
        packed = encoded.parts[PLACES]
        packed = packed.reshape(-1, packed.shape[-1])[at]
        table = self.pattern.columns().to(packed.device)
        return table[self.pattern.packing.unpack(packed, groups).int()]

    def _rows(self, encoded: Encoded) -> Tensor:
        """The base's codes uint8 [rows, length]."""
        return self.base.codes(encoded).reshape(-1, encoded.rows_shape[-1])

    def _zeros(self, encoded: Encoded) -> Tensor:
        """The code of zero, uint8 [rows, groups of the base]."""
        zero = self.base.zero_point(encoded)
        groups = self.base.groups(encoded.rows_shape[-1])
        if zero is not None:
            return zero.reshape(-1, groups)
        scale = self.base.scale(encoded).reshape(-1, groups)
        return torch.full_like(scale, 1 << (self.base.bits - 1), dtype=torch.uint8)

    def _of_columns(self, of_groups: Tensor, length: int) -> Tensor:
        """[rows, groups] for each column, [rows, length]."""
        return of_groups.repeat_interleave(self.grouping(length), 1)[:, :length]

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        return self.spread(encoded).decode(dtype)

    def worst_error(self, encoded: Encoded) -> Tensor:
        """The base's; where nothing stayed, no more than the least of its group that did."""
        spread = self.spread(encoded)
        bound = spread.worst_error().movedim(encoded.axis, -1)
        values = spread.decode(torch.float64).movedim(encoded.axis, -1).abs() + bound
        length = bound.shape[-1]
        rows, tops = bound.reshape(-1, length), values.reshape(-1, length)
        padding = (0, -length % self.of)
        groups = torch.nn.functional.pad(rows, padding).unflatten(1, (-1, self.of))
        tops = torch.nn.functional.pad(tops, padding).unflatten(1, (-1, self.of))
        columns = self._columns(encoded, slice(0, len(rows)))
        least = tops.gather(-1, columns).amin(-1, keepdim=True).expand_as(tops)
        stayed = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, columns, value=True)
        found = torch.where(stayed, groups, torch.maximum(groups, least))
        found = found.flatten(1)[:, :length].reshape(bound.shape)
        return found.movedim(-1, encoded.axis).contiguous()

    def codes(self, encoded: Encoded) -> Tensor:
        return self.base.codes(self.spread(encoded))

    def scale(self, encoded: Encoded) -> Tensor:
        return self.base.scale(encoded)

    def zero_point(self, encoded: Encoded) -> Tensor | None:
        return self.base.zero_point(encoded)


def with_zeros(encoded: Encoded) -> Encoded:
    """The weight in the base format if it is stored in half, else as it is."""
    fmt = encoded.format
    return fmt.spread(encoded) if isinstance(fmt, CompressedCodes) else encoded


def _parse(match: re.Match[str]) -> CompressedCodes:
    from .formats import parse_format

    base = parse_format(match[1])
    assert isinstance(base, AffineInt)
    keep, of = map(int, match[2].split(":"))
    return CompressedCodes(base, keep, of)


FAMILY = Family(
    pattern=r"(int[3-8]-[^+]+)\+(2:4|4:8)",
    parse=_parse,
    known=("int4-g64-sym+2:4", "int8-channel-sym+2:4"),
    grammar="int3 to int8 as without it, then +2:4 or +4:8",
)
