"""Codes in 32-bit words, as checkpoints keep them, from the lowest bit of the first word on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layouts import BitPacked


@dataclass(frozen=True)
class WordPacked:
    """Codes of `bits` bits (1 to 8) along the last axis in int32 words.

    Code i occupies bits [i * bits, (i + 1) * bits) of its row, words counted from the lowest bit
    of the first, so that a code may lie in two words; the last word is filled with zeros. spaced:
    32 // bits codes to a word instead, the bits left over in each being zero.
    """

    bits: int
    spaced: bool = False

    def words(self, length: int) -> int:
        """Words of a row of `length` codes."""
        if self.spaced:
            return -(-length // (32 // self.bits))
        return -(-length * self.bits // 32)

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 [..., length], each below 2^bits, to int32 [..., words(length)]."""
        words = self.words(codes.shape[-1])
        if not self.spaced:
            return _as_words(BitPacked(self.bits).pack(codes), words)
        per = 32 // self.bits
        padded = torch.nn.functional.pad(codes, (0, words * per - codes.shape[-1]))
        return _as_words(BitPacked(self.bits).pack(padded.unflatten(-1, (words, per))), 1).flatten(
            -2
        )

    def unpack(self, stored: Tensor, length: int) -> Tensor:
        """int32 [..., words(length)] to uint8 [..., length]: the inverse of `pack`."""
        packed = BitPacked(self.bits)
        if not self.spaced:
            rows = stored.contiguous().view(torch.uint8)
            return packed.unpack(rows[..., : packed.stored(length)], length)
        per = 32 // self.bits
        rows = stored.contiguous().unsqueeze(-1).view(torch.uint8)
        codes = packed.unpack(rows[..., : packed.stored(per)], per)
        return codes.flatten(-2)[..., :length].contiguous()


def _as_words(rows: Tensor, words: int) -> Tensor:
    """uint8 [..., bytes], filled up to whole words, as int32 [..., words]."""
    missing = 4 * words - rows.shape[-1]
    padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    return padded.clone(memory_format=torch.contiguous_format).view(torch.int32)
