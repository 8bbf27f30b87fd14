"""The storage that CPU kernels stream: codes of 16 rows side by side, as an invertible pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UnsupportedShape, WrongOption

LANES = 16


@dataclass(frozen=True)
class Interleaved:
    """Codes [N, K] in tiles of 16 rows, so that one load brings the same column of 16 rows.

    A tile holds its groups one after the other, each a run of 16 words of 32 bits (one a row) for
    every 4, 8 or 16 columns of 8, 4 or 2 bits. Column 4j + b of a word lies in its byte b, at bit
    j * width: shifted by that and masked, the bytes are four neighbours, as instructions for dot
    products of bytes want them. A group's last word is filled with zeros. Widths other than 2, 4
    and 8 are widened (`width`) without changing a value. N is filled to whole tiles of rows.
    """

    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise WrongOption("bits out of range", expected="2 to 8", found=str(self.bits))

    @property
    def width(self) -> int:
        """Stored bits of a code: 2, 4 or 8."""
        return next(w for w in (2, 4, 8) if w >= self.bits)

    def sizes(self, length: int) -> list[int]:
        """The lengths of the groups of a row of `length` codes."""
        size = min(self.group_size or length, length)
        return [min(size, length - start) for start in range(0, length, size)]

    def tile_bytes(self, length: int) -> int:
        """Bytes of a tile of 16 rows."""
        return LANES * sum(self._row_bytes(size) for size in self.sizes(length))

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 [N, K], each below 2^bits, to uint8 [tiles, tile_bytes(K)]."""
        if codes.dim() != 2 or codes.numel() == 0:
            raise UnsupportedShape(
                "only a matrix that is not empty can be interleaved",
                expected="[N, K]",
                found=str(list(codes.shape)),
                fix="leave this weight dense",
            )
        wide = codes + (self._centre - (1 << (self.bits - 1)))
        missing = -codes.shape[0] % LANES
        wide = torch.nn.functional.pad(wide, (0, 0, 0, missing), value=self._centre)
        tiles = wide.view(-1, LANES, codes.shape[1])
        return torch.cat([self._pack_groups(part) for part in self._runs(tiles)], dim=1)

    def unpack(self, stored: Tensor, rows: int, length: int) -> Tensor:
        """The inverse of `pack`: uint8 [rows, length]."""
        sizes = self.sizes(length)
        whole, rest = self._split(sizes)
        at = LANES * whole * self._row_bytes(sizes[0])
        parts = [self._unpack_groups(stored[:, :at], whole, sizes[0])]
        if rest:
            parts.append(self._unpack_groups(stored[:, at:], 1, rest))
        codes = torch.cat(parts, dim=2).reshape(-1, length)[:rows]
        return codes - (self._centre - (1 << (self.bits - 1)))

    def pack_groups(self, per_group: Tensor) -> Tensor:
        """Scales or zero points [N, groups] to [tiles, groups, 16]; rows past N are zero."""
        padded = torch.nn.functional.pad(per_group, (0, 0, 0, -per_group.shape[0] % LANES))
        return padded.view(-1, LANES, per_group.shape[1]).transpose(1, 2).contiguous()

    def unpack_groups(self, stored: Tensor, rows: int) -> Tensor:
        """The inverse of `pack_groups`: [rows, groups]."""
        return stored.transpose(1, 2).reshape(-1, stored.shape[1])[:rows].contiguous()

    @property
    def _centre(self) -> int:
        return 1 << (self.width - 1)

    def _row_bytes(self, size: int) -> int:
        """Bytes of one row of a group of `size` codes."""
        return 4 * -(-size // (32 // self.width))

    @staticmethod
    def _split(sizes: list[int]) -> tuple[int, int]:
        """How many groups have the full size, and the length of a shorter last one (0: none)."""
        short = sizes[-1] != sizes[0]
        return len(sizes) - short, sizes[-1] if short else 0

    def _runs(self, tiles: Tensor) -> list[Tensor]:
        """[tiles, 16, groups, size] of the full groups, and of the short one if there is one."""
        sizes = self.sizes(tiles.shape[2])
        whole, rest = self._split(sizes)
        full = tiles[:, :, : whole * sizes[0]].unflatten(2, (whole, sizes[0]))
        return [full, tiles[:, :, -rest:].unsqueeze(2)] if rest else [full]

    def _pack_groups(self, groups: Tensor) -> Tensor:
        """uint8 [tiles, 16, groups, size] to bytes [tiles, ...]."""
        per = 32 // self.width
        padded = torch.nn.functional.pad(groups, (0, -groups.shape[3] % per))
        fields = padded.unflatten(3, (-1, per // 4, 4))
        packed = fields[..., 0, :].clone()
        for j in range(1, per // 4):
            packed |= fields[..., j, :] << (j * self.width)
        return packed.permute(0, 2, 3, 1, 4).flatten(1)

    def _unpack_groups(self, stored: Tensor, groups: int, size: int) -> Tensor:
        """The inverse of `_pack_groups`: [tiles, 16, groups * size]."""
        per, mask = 32 // self.width, (1 << self.width) - 1
        packed = stored.reshape(stored.shape[0], groups, -1, LANES, 4).permute(0, 3, 1, 2, 4)
        fields = [(packed >> (j * self.width)) & mask for j in range(per // 4)]
        return torch.stack(fields, dim=-2).flatten(3)[..., :size].flatten(2)
