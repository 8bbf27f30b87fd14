"""8-bit floats with a scale: fp8-e4m3-channel, fp8-e5m2-tensor, fp8-e4m3-g128 (Micikevicius 2022).

Codes are the bytes of torch.float8_e4m3fn or torch.float8_e5m2; the largest magnitude of what
shares a scale becomes the format's largest finite number, 448 or 57344.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .encoded import Encoded, Family
from .scaled_table import (
    SCALE_PATTERN,
    SIZE_PATTERN,
    ScaledTable,
    Size,
    parsed_scale,
    parsed_size,
)
from .table_format import Table, float_values

Kind = Literal["e4m3", "e5m2"]
DTYPES: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST: dict[str, float] = {"e4m3": 448.0, "e5m2": 57344.0}


def _entries(kind: Kind) -> Table:
    """The finite numbers by code; what e4m3 and e5m2 take for NaN and infinity is NaN here."""
    exponent, mantissa, bias = (4, 3, 7) if kind == "e4m3" else (5, 2, 15)
    found = float_values(exponent, mantissa, bias)
    return tuple(value if abs(value) <= LARGEST[kind] else float("nan") for value in found)


FP8_ENTRIES: dict[str, Table] = {"e4m3": _entries("e4m3"), "e5m2": _entries("e5m2")}


def fp8_codes(scaled: Tensor, kind: str) -> Tensor:
    """uint8 codes of float32 numbers, rounded to nearest even and saturated."""
    largest = LARGEST[kind]
    return scaled.clamp(-largest, largest).to(DTYPES[kind]).view(torch.uint8)


@dataclass(frozen=True)
class Float8(ScaledTable):
    """value = float8(code) * scale."""

    kind: Kind = "e4m3"

    @property
    def name(self) -> str:
        return f"fp8-{self.kind}-{self.suffix}"

    @property
    def code_bits(self) -> int:
        return 8

    @property
    def entries(self) -> Table:
        return FP8_ENTRIES[self.kind]

    @property
    def even_ties(self) -> bool:
        return True

    def ends(self, length: int) -> float:
        return LARGEST[self.kind]

    def fitted(
        self, groups: Tensor, importance: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {"factor": groups.abs().amax(-1) / LARGEST[self.kind]}

    def nearest_codes(self, scaled: Tensor) -> Tensor:
        if scaled.dtype == torch.float32:
            return fp8_codes(scaled, self.kind)
        return super().nearest_codes(scaled)

    def floats(self, encoded: Encoded) -> Tensor:
        """The codes as a float8 tensor of `rows_shape`."""
        return encoded.parts["codes"].view(DTYPES[self.kind])


def _parse(match: re.Match[str]) -> Float8:
    size: Size = parsed_size(match[2])
    kind: Kind = "e4m3" if match[1] == "e4m3" else "e5m2"
    return Float8(size, parsed_scale(match[3]), kind)


FAMILY = Family(
    pattern=rf"fp8-(e4m3|e5m2)-{SIZE_PATTERN}{SCALE_PATTERN}",
    parse=_parse,
    known=tuple(f"fp8-{k}-{s}" for k in ("e4m3", "e5m2") for s in ("channel", "tensor", "g128")),
    grammar="fp8, then e4m3 or e5m2, then tensor, channel or g and the group size, then (if not "
    "float32) the scale's dtype",
)
