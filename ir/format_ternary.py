"""Ternary and binary weights: ternary-tensor, ternary-g128, binary-channel.

ternary: -1, 0, 1 times the mean magnitude (Ma et al. 2024, BitNet b1.58, sec. 2: RoundClip of
W / mean |W|, one scale a tensor). binary: the sign times the mean magnitude, the least-squares
choice (Rastegari et al. 2016, XNOR-Net, eq. 6).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .encoded import Family
from .group_format import Packing
from .layouts import BitPacked, TritPacked
from .scaled_table import (
    SCALE_PATTERN,
    SIZE_PATTERN,
    ScaledTable,
    parsed_scale,
    parsed_size,
)
from .table_format import Table


@dataclass(frozen=True)
class Signs(ScaledTable):
    """value = (code - 1) * scale, five ternary codes a byte; binary: (2 * code - 1) * scale.

    scale: the mean magnitude of what shares it. Zero goes to the lower code of a binary format.
    """

    binary: bool = False

    @property
    def name(self) -> str:
        return f"{'binary' if self.binary else 'ternary'}-{self.suffix}"

    @property
    def code_bits(self) -> int:
        return 1 if self.binary else 2

    @property
    def packing(self) -> Packing:
        return BitPacked(1) if self.binary else TritPacked()

    @property
    def entries(self) -> Table:
        return (-1.0, 1.0) if self.binary else (-1.0, 0.0, 1.0)

    @property
    def even_ties(self) -> bool:
        """RoundClip rounds a half to zero, which is even though its code is not."""
        return False

    def nearest_codes(self, scaled: Tensor) -> Tensor:
        if self.binary:
            return (scaled > 0).to(torch.uint8)
        return scaled.round().clamp_(-1, 1).add_(1).to(torch.uint8)

    def ends(self, length: int) -> float:
        """A group's largest magnitude is at most the sum of all, its mean times its size."""
        return float("inf") if self.size == "tensor" else float(self.grouping(length))

    def of_tensor(self, factor: Tensor) -> Tensor:
        return factor.double().mean().to(factor.dtype)

    def fitted(
        self, groups: Tensor, importance: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """With importance: its weighted mean, for the sign's least squares."""
        size = groups.abs()
        if importance is None:
            return {"factor": size.mean(-1)}
        weights = importance.to(size.dtype) + torch.finfo(size.dtype).tiny
        return {"factor": (size * weights).sum(-1) / weights.sum(-1)}


def _parse(match: re.Match[str]) -> Signs:
    return Signs(parsed_size(match[2]), parsed_scale(match[3]), match[1] == "binary")


FAMILY = Family(
    pattern=rf"(ternary|binary)-{SIZE_PATTERN}{SCALE_PATTERN}",
    parse=_parse,
    known=tuple(f"{k}-{s}" for k in ("ternary", "binary") for s in ("tensor", "channel", "g128")),
    grammar="ternary or binary, then tensor, channel or g and the group size, then (if not "
    "float32) the scale's dtype",
)
