"""Microscaling: mxfp4, mxfp6-e2m3, mxfp6-e3m2, mxfp8, mxfp8-e5m2 and nvfp4.

mx: blocks of 32 small floats with a power of two (OCP Microscaling Formats v1.0, sec. 5 and 6):
the largest power of two in the block over the element's largest power. nvfp4: blocks of 16 with an
e4m3 scale, and one float32 for the whole weight, so that the largest scale becomes 448.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .encoded import Family, Stored
from .format_fp8 import FP8_ENTRIES, fp8_codes
from .group_format import Blocks, GroupFormat, Parameters
from .table_format import Table, TableFormat, float_values

E2M1 = float_values(2, 1, 1)
ELEMENTS: dict[str, tuple[Table, int]] = {
    "mxfp4": (E2M1, 2),
    "mxfp6-e2m3": (float_values(2, 3, 1), 2),
    "mxfp6-e3m2": (float_values(3, 2, 3), 4),
    "mxfp8": (FP8_ENTRIES["e4m3"], 8),
    "mxfp8-e5m2": (FP8_ENTRIES["e5m2"], 15),
}
"""The numbers by code, and the exponent of the largest, by format (OCP v1.0, table 1)."""


def power_codes(largest: Tensor, top: int) -> Tensor:
    """e8m0 codes uint8 (exponent + 127) for blocks whose largest magnitudes these are (sec. 6.3).

    0 to 254: a block of zeros, or of numbers too small, takes the least power.
    """
    exponent = torch.frexp(largest.clamp_min(2.0**-126)).exponent - 1 - top
    return (exponent + 127).clamp(0, 254).to(torch.uint8)


def powers(codes: Tensor) -> Tensor:
    """The powers of two of e8m0 codes, float64; 255 is NaN."""
    exact = torch.pow(2.0, codes.to(torch.float64) - 127)
    return torch.where(codes == 255, torch.nan, exact)


class SmallFloats(TableFormat):
    """What mx and nvfp4 share: blocks along the grouped axis, ties to the even code."""

    @property
    def even_ties(self) -> bool:
        return True

    @property
    def code_bits(self) -> int:
        return (len(self.entries) - 1).bit_length()


@dataclass(frozen=True)
class Microscaled(SmallFloats):
    """value = element(code) * 2^(scale - 127). kind: one of `ELEMENTS`.

    Magnitudes between the largest element and the next power of two saturate, as the standard says.
    """

    rows_apart: ClassVar[bool] = True
    kind: str = "mxfp4"

    @property
    def name(self) -> str:
        return self.kind

    @property
    def entries(self) -> Table:
        return ELEMENTS[self.kind][0]

    @property
    def group_size(self) -> int:
        return 32

    def grouping(self, length: int) -> int:
        return min(32, length)

    def ends(self, length: int) -> float:
        return 2.0 ** (ELEMENTS[self.kind][1] + 1)

    def nearest_codes(self, scaled: Tensor) -> Tensor:
        if self.code_bits == 8 and scaled.dtype == torch.float32:
            return fp8_codes(scaled, "e5m2" if self.kind == "mxfp8-e5m2" else "e4m3")
        return super().nearest_codes(scaled)

    def fitted(
        self, groups: Tensor, importance: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        top = ELEMENTS[self.kind][1]
        return {"factor": powers(power_codes(groups.abs().amax(-1), top)).to(groups.dtype)}

    def keep(self, parameters: Parameters, dtype: torch.dtype) -> dict[str, Tensor]:
        exponent = torch.frexp(parameters["factor"]).exponent - 1
        return {"scale": (exponent + 127).clamp(0, 254).to(torch.uint8)}

    def restore(self, parts: Parameters, count: int, groups: int) -> dict[str, Tensor]:
        factor = powers(parts["scale"]).float()
        return {"factor": factor, "doubt": torch.zeros_like(factor)}

    def parameters_stored(
        self, rows: tuple[int, ...], groups: int, dtype: torch.dtype
    ) -> dict[str, Stored]:
        return {"scale": (torch.uint8, (*rows, groups))}


@dataclass(frozen=True)
class NvFp4(SmallFloats):
    """value = e2m1(code) * e4m3(scale) * whole.

    whole: largest magnitude of the weight / (6 * 448), float32; scale: of a block's largest
    magnitude / 6 / whole, rounded to nearest.
    """

    shared_parts: ClassVar[frozenset[str]] = frozenset({"whole"})
    groups_apart: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "nvfp4"

    @property
    def entries(self) -> Table:
        return E2M1

    @property
    def group_size(self) -> int:
        return 16

    def grouping(self, length: int) -> int:
        return min(16, length)

    def ends(self, length: int) -> float:
        return 6.0

    def fitted(
        self, groups: Tensor, importance: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {"factor": groups.abs().amax(-1) / 6}

    def fit(self, blocks: Blocks, importance: Tensor | None, dtype: torch.dtype) -> Parameters:
        found = GroupFormat.fit(self, blocks, importance, dtype)
        return {**found, "whole": found["factor"].amax() / 448}

    def keep(self, parameters: Parameters, dtype: torch.dtype) -> dict[str, Tensor]:
        factor = parameters["factor"]
        whole = parameters.get("whole")
        whole = (factor.abs().amax() / 448 if whole is None else whole).float().reshape(1)
        step = torch.where(whole == 0, torch.ones_like(whole), whole)
        # A block that is not all zeros keeps the smallest scale, else its values would vanish.
        least = torch.where(factor == 0, 0.0, 2.0**-9)
        scaled = torch.maximum(factor / step, least).float()
        return {"scale": fp8_codes(scaled, "e4m3"), "whole": whole}

    def restore(self, parts: Parameters, count: int, groups: int) -> dict[str, Tensor]:
        scale = parts["scale"].view(torch.float8_e4m3fn).float()
        whole = parts["whole"].double()
        spacing = torch.maximum(scale * 2.0**-3, torch.full_like(scale, 2.0**-9))
        doubt = torch.where(scale == 0, 0.0, spacing.double() / 2 * whole)
        return {"factor": scale * parts["whole"], "doubt": doubt}

    def parameters_stored(
        self, rows: tuple[int, ...], groups: int, dtype: torch.dtype
    ) -> dict[str, Stored]:
        return {"scale": (torch.uint8, (*rows, groups)), "whole": (torch.float32, (1,))}


def _parse(match: re.Match[str]) -> SmallFloats:
    return NvFp4() if match[0] == "nvfp4" else Microscaled(match[0])


FAMILY = Family(
    pattern="nvfp4|" + "|".join(ELEMENTS),
    parse=_parse,
    known=(*ELEMENTS, "nvfp4"),
    grammar="mxfp4, mxfp6-e2m3, mxfp6-e3m2, mxfp8, mxfp8-e5m2 or nvfp4",
)
