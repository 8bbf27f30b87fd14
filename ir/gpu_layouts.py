"""Layouts of integer codes for GPU kernels that decode a weight in registers.

A matrix unit does not care in which order the summed axis comes, as long as both operands agree.
So codes that share a word lie far apart in the row: each bit field of a tile of words is then a
whole operand, and nothing is moved between registers to put it in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UnsupportedShape, WrongOption

_FIELDS = {2: 8, 3: 16, 4: 4, 8: 2}


@dataclass(frozen=True)
class FieldWords:
    """Codes [N, K] of 2, 3, 4 or 8 bits as bit fields of 16-bit words [blocks, planes, N, run].

    A block covers `fields * run` columns. Field j of word i of a row holds the code of column
    j * run + i of the block. 2, 4 and 8 bits fill a word with 8, 4 and 2 fields, lowest first. 3
    bits take three planes of words: field j < 15 has the bits 3 (j % 5) and up of plane j // 5,
    and the bits of field 15 are the highest bits of the planes, lowest in plane 0.

    run: columns that a field of a tile covers; a multiple of 16. The rows of a tile of words lie
    side by side. Columns past K are filled with the code 0.
    """

    bits: int
    run: int = 32

    def __post_init__(self) -> None:
        if self.bits not in _FIELDS:
            raise WrongOption(
                "no field layout has this width",
                expected="2, 3, 4 or 8 bits",
                found=str(self.bits),
                fix="widen the codes to the next width",
            )
        if self.run < 16 or self.run % 16:
            raise WrongOption(
                "a field covers whole steps of the matrix units",
                expected="a multiple of 16 columns",
                found=str(self.run),
                fix="choose 16, 32 or 64",
            )

    @property
    def fields(self) -> int:
        """Codes of a row that are spread over a word, or over three words of 3-bit codes."""
        return _FIELDS[self.bits]

    @property
    def planes(self) -> int:
        return 3 if self.bits == 3 else 1

    @property
    def block(self) -> int:
        """Columns of a block."""
        return self.fields * self.run

    def blocks(self, length: int) -> int:
        return -(-length // self.block)

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 [N, K], each below 2^bits, to int16 [blocks, planes, N, run]."""
        padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % self.block))
        split = padded.unflatten(1, (-1, self.fields, self.run)).permute(1, 2, 0, 3).int()
        planes = torch.zeros(
            (split.shape[0], self.planes, *split.shape[2:]), dtype=torch.int32, device=codes.device
        )
        for field, (plane, shift) in enumerate(self._places()):
            planes[:, plane] |= split[:, field] << shift
        if self.bits == 3:
            for plane in range(3):
                planes[:, plane] |= (split[:, 15] >> plane & 1) << 15
        return planes.to(torch.int16)

    def unpack(self, stored: Tensor, length: int) -> Tensor:
        """The inverse of `pack`: int16 [blocks, planes, N, run] to uint8 [N, length]."""
        planes = stored.int()
        mask = (1 << self.bits) - 1
        fields = [planes[:, plane] >> shift & mask for plane, shift in self._places()]
        if self.bits == 3:
            fields.append(sum((planes[:, p] >> 15 & 1) << p for p in range(3)))  # type: ignore[arg-type]
        codes = torch.stack(fields, 1).to(torch.uint8)  # [blocks, fields, N, run]
        return codes.permute(2, 0, 1, 3).flatten(1)[:, :length].contiguous()

    def _places(self) -> list[tuple[int, int]]:
        """Plane and lowest bit of each field that lies in one word."""
        per_word = 16 // self.bits
        count = 15 if self.bits == 3 else self.fields
        return [(j // per_word, j % per_word * self.bits) for j in range(count)]


@dataclass(frozen=True)
class TwoOfFour:
    """A matrix [N, K] with at most two nonzeros in every four columns of a row, half of it stored.

    values [tiles, 2, N, run], in the weight's dtype: of group g = tile * run + i of four columns
    the two values kept, in the order of their columns. places: the groups' codes, first column
    plus 4 times second column, as `FieldWords(4, run)` lays [N, groups] out. Groups past the end
    hold zeros.
    """

    run: int = 16

    @property
    def columns(self) -> int:
        """Columns of a block of places: four fields of `run` groups of four."""
        return 4 * 4 * self.run

    def tiles(self, length: int) -> int:
        return 4 * -(-length // self.columns)

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """[N, K] to values and places. Raises UnsupportedShape where four hold more than two."""
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % self.columns))
        groups = padded.unflatten(1, (-1, 4))
        kept = groups != 0
        if bool((kept.sum(-1) > 2).any()):
            raise UnsupportedShape(
                "four columns hold more than two nonzeros",
                expected="at most two nonzeros in every four columns of a row",
                found=f"{int((kept.sum(-1) > 2).sum())} of {kept[..., 0].numel()} groups with more",
                fix="prune the weight to 2:4 first",
            )
        order = torch.sort(kept.to(torch.uint8), dim=-1, descending=True, stable=True).indices
        places = order[..., :2].sort(-1).values
        values = groups.gather(-1, places).unflatten(1, (-1, self.run))
        codes = (places[..., 0] + 4 * places[..., 1]).to(torch.uint8)
        words = FieldWords(4, self.run).pack(codes)
        return values.permute(1, 3, 0, 2).contiguous(), words

    def unpack(self, values: Tensor, places: Tensor, length: int) -> Tensor:
        """The inverse of `pack`: the matrix [N, length]."""
        tiles, _, rows, run = values.shape
        codes = FieldWords(4, run).unpack(places, tiles * run).long()
        at = torch.stack([codes & 3, codes >> 2], -1)
        held = values.permute(2, 0, 3, 1).reshape(rows, tiles * run, 2)
        dense = torch.zeros(rows, tiles * run, 4, dtype=values.dtype, device=values.device)
        return dense.scatter_(-1, at, held).flatten(1)[:, :length].contiguous()
