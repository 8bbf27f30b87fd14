"""An encoded linear layer as checkpoint formats see it: codes, scales, zero points, order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ..ir.encoded import Encoded
from ..ir.errors import UnsupportedByTarget
from ..ir.format_ordered import Ordered
from ..ir.format_two_four_codes import with_zeros
from ..ir.formats import AffineInt
from ..ir.weights import Entry


@dataclass(frozen=True)
class Layer:
    """A weight [out, in] on an integer grid; nothing is unpacked before it is asked for.

    group_size: None for one scale an output. symmetric: zero is the middle of the codes.
    """

    name: str
    entry: Encoded
    affine: AffineInt

    @property
    def path(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def bits(self) -> int:
        return self.affine.bits

    @property
    def group_size(self) -> int | None:
        size = self.affine.group_size
        return None if size is None or size >= self.shape[1] else size

    @property
    def symmetric(self) -> bool:
        return self.affine.symmetric

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in], whichever way round the model keeps it."""
        rows = self.entry.rows_shape
        return rows[0], rows[1]

    @property
    def groups(self) -> int:
        return self.affine.groups(self.shape[1])

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.entry.scale.dtype

    @property
    def ordered(self) -> bool:
        return isinstance(self.entry.format, Ordered)

    def codes(self) -> Tensor:
        """uint8 [out, in], in the weight's own order of columns."""
        return self.entry.codes()

    def scale(self) -> Tensor:
        """[out, groups]."""
        return self.entry.scale

    def zero_point(self) -> Tensor:
        """uint8 [out, groups], also where it is implied."""
        stored = self.entry.zero_point
        if stored is not None:
            return stored
        return torch.full((self.shape[0], self.groups), 1 << (self.bits - 1), dtype=torch.uint8)

    def group_of(self) -> Tensor:
        """int32 [in]: the group of each column."""
        length = self.shape[1]
        plain = torch.arange(length, dtype=torch.int32) // (self.group_size or length)
        if not self.ordered:
            return plain
        groups = torch.empty_like(plain)
        groups[self.entry.parts["order"].long()] = plain
        return groups


def affine_layer(name: str, entry: Entry) -> Layer | None:
    """The layer of a weight [out, in] on an integer grid along its inputs, or None."""
    if not isinstance(entry, Encoded) or len(entry.shape) != 2:
        return None
    entry = with_zeros(entry)
    fmt = entry.format.inner if isinstance(entry.format, Ordered) else entry.format
    return Layer(name, entry, fmt) if isinstance(fmt, AffineInt) else None


def refuse_layer(target: str, layer: str, entry: Entry, expected: str, fix: str) -> NoReturn:
    """Raise UnsupportedByTarget for a layer that a checkpoint format has no way to hold."""
    kept = entry.format.name if isinstance(entry, Encoded) else str(entry.dtype)
    raise UnsupportedByTarget(
        f"target {target} cannot hold the codes of {layer}",
        where=layer,
        expected=expected,
        found=f"{kept} {list(entry.shape)}",
        fix=fix,
    )
