"""How GPTQ checkpoints keep codes: words down the inputs, zero points along the outputs.

Source: the files that GPTQ-for-LLaMa, AutoGPTQ and GPTQModel write (`qweight`, `qzeros`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout_words import WordPacked


@dataclass(frozen=True)
class GptqLayout:
    """The tensors of one linear layer, its weight [out, in].

    version 1 stores each zero point less one (modulo 2^bits); version 2 stores it as it is.
    """

    bits: int
    version: int = 1

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 [out, in] to int32 [in * bits / 32, out]; 32 must divide in * bits."""
        return WordPacked(self.bits).pack(codes).t().contiguous()

    def unpack(self, stored: Tensor) -> Tensor:
        """The inverse of `pack`: uint8 [out, in]."""
        words = stored.t().contiguous()
        return WordPacked(self.bits).unpack(words, words.shape[-1] * 32 // self.bits)

    def pack_zero_points(self, zero_points: Tensor) -> Tensor:
        """uint8 [out, groups] to int32 [groups, ceil(out * bits / 32)]."""
        stored = (zero_points.to(torch.int16) - self._less) & self._mask
        return WordPacked(self.bits).pack(stored.to(torch.uint8).t().contiguous())

    def unpack_zero_points(self, stored: Tensor, rows: int) -> Tensor:
        """The inverse of `pack_zero_points`: uint8 [out, groups]; rows is out."""
        codes = WordPacked(self.bits).unpack(stored, rows).to(torch.int16)
        return ((codes + self._less) & self._mask).to(torch.uint8).t().contiguous()

    @property
    def _less(self) -> int:
        return 1 if self.version == 1 else 0

    @property
    def _mask(self) -> int:
        return (1 << self.bits) - 1
