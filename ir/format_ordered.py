"""An affine integer format whose groups hold inputs that lie apart, as GPTQ's act-order leaves it.

The codes are stored in the order of the groups; `order` says which column of the weight each
stored column is. Decoding puts the columns back; `order_columns` moves the order to the input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .encoded import Encoded, Family, Format, Stored
from .format_affine import FAMILY as AFFINE
from .format_affine import AffineInt


@dataclass(frozen=True)
class Ordered(Format):
    """weight[..., order[j]] = (code[..., j] - zero_point) * scale, groups along j as `inner` says.

    parts: those of `inner`, and order int32 [length of the grouped axis], a permutation.
    """

    shared_parts: ClassVar[frozenset[str]] = frozenset({"order"})
    inner: AffineInt

    @property
    def name(self) -> str:
        return f"{self.inner.name}-ordered"

    def grouping(self, length: int) -> int:
        return self.inner.grouping(length)

    def stored(self, shape: Sequence[int], axis: int, dtype: torch.dtype) -> dict[str, Stored]:
        return {**self.inner.stored(shape, axis, dtype), "order": (torch.int32, (shape[axis],))}

    def encode(self, weight: Tensor, axis: int = -1, *, where: str = "") -> Encoded:
        """Groups of neighbouring columns: the order changes nothing."""
        plain = self.inner.encode(weight, axis, where=where)
        order = torch.arange(weight.shape[axis], dtype=torch.int32, device=weight.device)
        return _with_parts(plain, self, {**plain.parts, "order": order})

    def plain(self, encoded: Encoded) -> Encoded:
        """The same columns in stored order: a weight of the format `inner`."""
        kept = {name: part for name, part in encoded.parts.items() if name != "order"}
        return _with_parts(encoded, self.inner, kept)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        stored = self.plain(encoded).decode(dtype)
        return stored.index_select(encoded.axis, _places(encoded))

    def codes(self, encoded: Encoded) -> Tensor:
        """In the weight's order of columns."""
        return self.inner.codes(self.plain(encoded)).index_select(-1, _places(encoded))

    def scale(self, encoded: Encoded) -> Tensor:
        return encoded.parts["scale"]

    def zero_point(self, encoded: Encoded) -> Tensor | None:
        return self.inner.zero_point(self.plain(encoded))

    def worst_error(self, encoded: Encoded) -> Tensor:
        return self.plain(encoded).worst_error().index_select(encoded.axis, _places(encoded))


def _places(encoded: Encoded) -> Tensor:
    """Where each column of the weight is stored: the inverse of `order`."""
    return torch.argsort(encoded.parts["order"].long())


def _with_parts(encoded: Encoded, fmt: Format, parts: Mapping[str, Tensor]) -> Encoded:
    return Encoded(fmt, encoded.shape, encoded.dtype, encoded.axis, parts)


def _parse(found: re.Match[str]) -> Format:
    inner = re.fullmatch(AFFINE.pattern, found[0].removesuffix("-ordered"))
    assert inner is not None
    fmt = AFFINE.parse(inner)
    assert isinstance(fmt, AffineInt)
    return Ordered(fmt)


FAMILY = Family(
    pattern=rf"(?:{AFFINE.pattern})-ordered",
    parse=_parse,
    known=("int4-g128-sym-ordered", "int4-g128-asym-ordered"),
    grammar="the name of an integer format, then -ordered: groups of columns that lie apart",
)
