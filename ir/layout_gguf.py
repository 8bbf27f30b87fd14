"""The quantized blocks of GGUF files as codes, scales and offsets, and back for three of them.

Source: ggml's block formats, as the `gguf` package describes them (names and numbers of types).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_SUPER = 256


@dataclass(frozen=True)
class Blocks:
    """The numbers that rows of blocks stand for.

    codes: uint8 [rows, length]. scale, offset: [rows, groups]. A value is code * scale + offset,
    or (code - 2^(bits-1)) * scale where offset is None. six: of super-blocks whose scales and
    offsets are 6-bit codes [rows, groups] times two float16 numbers [rows, blocks]: those four.
    """

    bits: int
    group_size: int
    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None
    six: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


@dataclass(frozen=True)
class GgufLayout:
    """One block type: `length` values in `nbytes` bytes. pack is None where we only read."""

    name: str
    length: int
    nbytes: int
    unpack_blocks: Callable[[Tensor], Blocks]
    pack_blocks: Callable[[Tensor, list[Tensor]], Tensor] | None = None

    def unpack(self, stored: Tensor) -> Blocks:
        """uint8 [rows, blocks * nbytes] to codes and scales of the rows."""
        return self.unpack_blocks(stored.unflatten(-1, (-1, self.nbytes)))

    def pack(self, codes: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """codes uint8 [rows, n], scale and offset float16 [rows, blocks] to uint8 [rows, bytes]."""
        assert self.pack_blocks is not None
        blocks = codes.unflatten(-1, (-1, self.length))
        halves = [_bytes(part) for part in (scale, offset) if part is not None]
        return self.pack_blocks(blocks, halves).flatten(1)


def _halves(part: Tensor) -> Tensor:
    """uint8 [rows, blocks, 2 n] as float16 [rows, blocks, n]."""
    return part.contiguous().view(torch.float16)


def _bytes(scale: Tensor) -> Tensor:
    """float16 [rows, blocks] as uint8 [rows, blocks, 2]."""
    return scale.contiguous().unsqueeze(-1).view(torch.uint8)


def _nibbles(part: Tensor, run: int) -> Tensor:
    """uint8 [rows, blocks, n]: of each `run` bytes first the low halves, then the high ones."""
    runs = part.unflatten(-1, (-1, 1, run))
    return torch.cat([runs & 15, runs >> 4], dim=-2).flatten(-3)


def _bits_of(part: Tensor, run: int, step: int) -> Tensor:
    """Of each `run` bytes the fields of `step` bits, all lowest ones first: [..., n * 8 / step]."""
    runs = part.unflatten(-1, (-1, 1, run))
    fields = [(runs >> at) & ((1 << step) - 1) for at in range(0, 8, step)]
    return torch.cat(fields, dim=-2).flatten(-3)


def _fifth_bits(part: Tensor) -> Tensor:
    """uint8 [rows, blocks, 4], a bit for each of 32 codes, to uint8 [rows, blocks, 32]."""
    return torch.stack([(part >> at) & 1 for at in range(8)], dim=-1).flatten(-2)


def _q4_0(blocks: Tensor) -> Blocks:
    codes = _nibbles(blocks[..., 2:], 16)
    return Blocks(4, 32, codes.flatten(1), _halves(blocks[..., :2]).flatten(1))


def _pack_nibbles(codes: Tensor, halves: list[Tensor]) -> Tensor:
    return torch.cat([*halves, codes[..., :16] | codes[..., 16:] << 4], dim=-1)


def _q4_1(blocks: Tensor) -> Blocks:
    scale, offset = _halves(blocks[..., :4]).unbind(-1)
    return Blocks(4, 32, _nibbles(blocks[..., 4:], 16).flatten(1), scale, offset)


def _q5_0(blocks: Tensor) -> Blocks:
    codes = _nibbles(blocks[..., 6:], 16) | _fifth_bits(blocks[..., 2:6]) << 4
    return Blocks(5, 32, codes.flatten(1), _halves(blocks[..., :2]).flatten(1))


def _q5_1(blocks: Tensor) -> Blocks:
    scale, offset = _halves(blocks[..., :4]).unbind(-1)
    codes = _nibbles(blocks[..., 8:], 16) | _fifth_bits(blocks[..., 4:8]) << 4
    return Blocks(5, 32, codes.flatten(1), scale, offset)


def _q8_0(blocks: Tensor) -> Blocks:
    codes = blocks[..., 2:] ^ 128  # two's complement to codes with 128 for zero
    return Blocks(8, 32, codes.flatten(1), _halves(blocks[..., :2]).flatten(1))


def _pack_q8_0(codes: Tensor, halves: list[Tensor]) -> Tensor:
    return torch.cat([*halves, codes ^ 128], dim=-1)


def _six_bit_pairs(part: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes as the eight scales and the eight minima of a super-block, of 6 bits each."""
    first, second, rest = part.split(4, dim=-1)
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], dim=-1)
    minima = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], dim=-1)
    return scales, minima


def _super_offsets(
    d: Tensor, scales: Tensor, minima: Tensor, bits: int, group: int, codes: Tensor
) -> Blocks:
    """d float16 [rows, blocks, 2]: the factors of the scales and of the minima.

    Their products have at most 17 significant bits, so float32 holds them exactly.
    """
    scale = d[..., :1].float() * scales.float()
    offset = -(d[..., 1:].float() * minima.float())
    most, least = d.unbind(-1)
    six = (scales.flatten(1), minima.flatten(1), most, least) if group == 32 else None
    return Blocks(bits, group, codes.flatten(1), scale.flatten(1), offset.flatten(1), six)


def _q2_k(blocks: Tensor) -> Blocks:
    packed, codes, d = blocks[..., :16], blocks[..., 16:80], _halves(blocks[..., 80:])
    return _super_offsets(d, packed & 15, packed >> 4, 2, 16, _bits_of(codes, 32, 2))


def _q4_k(blocks: Tensor) -> Blocks:
    scales, minima = _six_bit_pairs(blocks[..., 4:16])
    codes = _nibbles(blocks[..., 16:], 32)
    return _super_offsets(_halves(blocks[..., :4]), scales, minima, 4, 32, codes)


def _q5_k(blocks: Tensor) -> Blocks:
    scales, minima = _six_bit_pairs(blocks[..., 4:16])
    codes = _nibbles(blocks[..., 48:], 32) | _bits_of(blocks[..., 16:48], 32, 1) << 4
    return _super_offsets(_halves(blocks[..., :4]), scales, minima, 5, 32, codes)


def _q3_k(blocks: Tensor) -> Blocks:
    codes = _bits_of(blocks[..., 32:96], 32, 2) | _bits_of(blocks[..., :32], 32, 1) << 2
    low, high = blocks[..., 96:104], blocks[..., 104:108]
    sixteen = _nibbles(low, 8) | _bits_of(high, 4, 2) << 4
    scale = _halves(blocks[..., 108:]).float() * (sixteen.float() - 32)
    return Blocks(3, 16, codes.flatten(1), scale.flatten(1))


def _q6_k(blocks: Tensor) -> Blocks:
    codes = _nibbles(blocks[..., :128], 64) | _bits_of(blocks[..., 128:192], 32, 2) << 4
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float()
    scale = _halves(blocks[..., 208:]).float() * scales
    return Blocks(6, 16, codes.flatten(1), scale.flatten(1))


LAYOUTS: dict[int, GgufLayout] = {
    2: GgufLayout("Q4_0", 32, 18, _q4_0, _pack_nibbles),
    3: GgufLayout("Q4_1", 32, 20, _q4_1, _pack_nibbles),
    6: GgufLayout("Q5_0", 32, 22, _q5_0),
    7: GgufLayout("Q5_1", 32, 24, _q5_1),
    8: GgufLayout("Q8_0", 32, 34, _q8_0, _pack_q8_0),
    10: GgufLayout("Q2_K", _SUPER, 84, _q2_k),
    11: GgufLayout("Q3_K", _SUPER, 110, _q3_k),
    12: GgufLayout("Q4_K", _SUPER, 144, _q4_k),
    13: GgufLayout("Q5_K", _SUPER, 176, _q5_k),
    14: GgufLayout("Q6_K", _SUPER, 210, _q6_k),
}
"""By ggml's number of the type."""
