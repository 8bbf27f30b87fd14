"""Weights of which two in every four stay, stored in half: 2:4, and 4:8 likewise.

The values that stay lie side by side, in the weight's own dtype and in the order of their columns;
beside them a group's places: for 2:4 two bits for each value (Mishra et al. 2021, sec. 3.1), for
4:8 a bit for each column. A weight that has the pattern is stored exactly; of another the largest
magnitudes of each group stay. No scale, no codes: nothing else is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .affine import non_finite
from .encoded import Encoded, Family, Format, Stored
from .layouts import BitPacked
from .sparsity_patterns import largest
from .weight_blocks import check_weight, row_blocks, row_slices

VALUES, PLACES = "values", "places"
"""values [..., groups * keep] in the weight's dtype; places uint8 [..., bytes]."""


@dataclass(frozen=True)
class Compressed(Format):
    """keep of every `of` neighbours along the summed axis; columns past the end hold zeros.

    A code of 2:4 is first + 4 * second column, in four bits; of 4:8 bit i tells of column i.
    """

    keep: int = 2
    of: int = 4

    rows_apart: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{self.keep}:{self.of}"

    @property
    def packing(self) -> BitPacked:
        """How the groups' codes lie in bytes."""
        return BitPacked(self.of)

    def groups(self, length: int) -> int:
        return -(-length // self.of)

    def grouping(self, length: int) -> int:
        return self.of

    def stored(self, shape: Sequence[int], axis: int, dtype: torch.dtype) -> dict[str, Stored]:
        rows = list(shape)
        groups = self.groups(rows.pop(axis))
        return {
            VALUES: (dtype, (*rows, groups * self.keep)),
            PLACES: (torch.uint8, (*rows, self.packing.stored(groups))),
        }

    def encode(self, weight: Tensor, axis: int = -1, *, where: str = "") -> Encoded:
        """Keep the largest magnitudes of every group; of equal ones the first.

        Raises NonFiniteWeight, UnsupportedShape.
        """
        check_weight(weight, axis, where)
        rows = weight.detach().movedim(axis, -1)
        lead = rows.shape[:-1]
        values, codes = list[Tensor](), list[Tensor]()
        for _, block in row_blocks(rows):
            if not bool(block.isfinite().all()):
                raise non_finite(block.unsqueeze(1), where)
            kept, places = self.kept(block)
            values.append(kept.flatten(1))
            codes.append(self.packing.pack(self.place_codes(places)))
        parts = {
            VALUES: torch.cat(values).reshape(*lead, -1),
            PLACES: torch.cat(codes).reshape(*lead, -1),
        }
        from_end = axis if axis < 0 else axis - weight.dim()
        return Encoded(self, tuple(weight.shape), weight.dtype, from_end, parts)

    def kept(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows [n, length] what stays and its columns, [n, groups, keep] each, in order."""
        groups = torch.nn.functional.pad(rows, (0, -rows.shape[1] % self.of))
        groups = groups.unflatten(1, (-1, self.of))
        mask = largest(groups.abs().flatten(0, 1), self.keep).view(groups.shape)
        # stable: of equal flags the first column comes first
        order = torch.sort(mask.to(torch.uint8), dim=-1, descending=True, stable=True).indices
        places = order[..., : self.keep]
        return groups.gather(-1, places), places

    def place_codes(self, places: Tensor) -> Tensor:
        """What is stored of places [n, groups, keep]: uint8 [n, groups]."""
        if self.of == 4:
            return (places[..., 0] + 4 * places[..., 1]).to(torch.uint8)
        return (1 << places).sum(-1).to(torch.uint8)

    def columns(self) -> Tensor:
        """int64 [codes, keep]: the columns that a code tells; 0 for a code that is none."""
        table = torch.zeros(1 << self.of, self.keep, dtype=torch.int64)
        for places in torch.combinations(torch.arange(self.of), self.keep):
            table[int(self.place_codes(places[None, None]))] = places
        return table

    def codes(self, encoded: Encoded) -> Tensor:
        """uint8 [..., groups]."""
        return self.packing.unpack(encoded.parts[PLACES], self.groups(encoded.rows_shape[-1]))

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        out = torch.empty(encoded.rows_shape, dtype=dtype, device=encoded.parts[VALUES].device)
        flat = out.view(-1, encoded.rows_shape[-1])
        for at, values, places in self._walk(encoded):
            flat[at] = self._placed(values.to(dtype), places, torch.zeros((), dtype=dtype), flat)
        return out.movedim(-1, encoded.axis).contiguous()

    def worst_error(self, encoded: Encoded) -> Tensor:
        """Nothing where a value stayed; elsewhere it was no larger than the least that did."""
        device = encoded.parts[VALUES].device
        out = torch.empty(encoded.rows_shape, dtype=torch.float64, device=device)
        flat = out.view(-1, encoded.rows_shape[-1])
        for at, values, places in self._walk(encoded):
            least = values.double().abs().amin(-1, keepdim=True)
            exact = torch.zeros_like(values, dtype=torch.float64)
            flat[at] = self._placed(exact, places, least, flat)
        return out.movedim(-1, encoded.axis).contiguous()

    def _walk(self, encoded: Encoded) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """By blocks of rows: values and places [rows, groups, keep]."""
        length = encoded.rows_shape[-1]
        groups = self.groups(length)
        values = encoded.parts[VALUES].reshape(-1, groups, self.keep)
        packed = encoded.parts[PLACES].reshape(len(values), -1)
        columns = self.columns().to(packed.device)
        for at in row_slices(len(values), length):
            yield at, values[at], columns[self.packing.unpack(packed[at], groups).int()]

    def _placed(self, values: Tensor, places: Tensor, rest: Tensor, like: Tensor) -> Tensor:
        """[rows, length]: values at their places, `rest` (by group) at the others."""
        dense = rest.expand(*values.shape[:2], self.of).contiguous()
        return dense.scatter(-1, places, values).flatten(1)[:, : like.shape[1]]


FAMILY = Family(
    pattern=r"(2):(4)|(4):(8)",
    parse=lambda match: Compressed(2, 4) if match[1] else Compressed(4, 8),
    known=("2:4", "4:8"),
    grammar="2:4 or 4:8",
)
