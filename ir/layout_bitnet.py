"""How BitNet b1.58 checkpoints keep ternary codes: four rows to a row of bytes.

Source: transformers' `bitnet` integration, as in the files of microsoft/bitnet-b1.58-2B-4T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BitnetLayout:
    """Codes 0, 1, 2 (for -1, 0, 1) of a weight [out, in], 4 dividing out.

    Byte [r, i] holds the rows r, r + out/4, r + 2 out/4 and r + 3 out/4 of input i, lowest first.
    """

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 [out, in] to uint8 [out / 4, in]."""
        quarters = codes.unflatten(0, (4, -1))
        packed = quarters[0].clone()
        for place in range(1, 4):
            packed |= quarters[place] << (2 * place)
        return packed

    def unpack(self, stored: Tensor) -> Tensor:
        """The inverse of `pack`: uint8 [out, in]."""
        return torch.cat([(stored >> (2 * place)) & 3 for place in range(4)])
