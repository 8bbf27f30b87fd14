"""How AWQ checkpoints keep codes: eight outputs to a word, even ones before odd ones.

Source: the `gemm` version of the files that AutoAWQ and llm-awq write (`qweight`, `qzeros`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout_words import WordPacked

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AwqLayout:
    """The tensors of one linear layer, its weight [out, in], 8 dividing out; codes of 4 bits.

    A word holds the outputs 8 j + (0, 2, 4, 6, 1, 3, 5, 7) of one input, lowest bits first.
    """

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 [out, n] (n inputs, or groups for zero points) to int32 [n, out / 8]."""
        by_word = codes.t().unflatten(-1, (-1, 8))[..., list(_ORDER)]
        return WordPacked(4).pack(by_word.flatten(-2))

    def unpack(self, stored: Tensor) -> Tensor:
        """The inverse of `pack`: uint8 [out, n]."""
        codes = WordPacked(4).unpack(stored, 8 * stored.shape[-1]).unflatten(-1, (-1, 8))
        places = torch.empty(8, dtype=torch.long)
        places[list(_ORDER)] = torch.arange(8)
        return codes[..., places].flatten(-2).t().contiguous()
