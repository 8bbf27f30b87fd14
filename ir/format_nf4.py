"""NF4 and FP4 of QLoRA: 4-bit codes by blocks, nf4, nf4-plain, fp4-g128 (Dettmers et al. 2023).

NF4's entries are the averaged quantiles of a Gaussian (app. E of the paper gives the 16 numbers);
FP4's are those of bitsandbytes: a sign, two bits of exponent and one of mantissa, over 12.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .double_quantization import kept_maxima, quantized_scales, restored_scales
from .encoded import Family, Stored
from .group_format import Parameters
from .table_format import Table, TableFormat, kept_factor, with_doubt

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = (*(value / 12 for value in _FP4), *(-value / 12 for value in _FP4))


@dataclass(frozen=True)
class Blockwise4(TableFormat):
    """value = table[code] * largest magnitude of the block, blocks along the grouped axis.

    table: "nf4" or "fp4". group_size: values of a block. double: the maxima are 8-bit codes too,
    as in QLoRA (0.127 bits a weight at blocks of 64 in place of 0.5); codes are rounded by the
    exact maxima. A matrix [out, in] whose rows are whole blocks decodes to the same bits as with
    bitsandbytes, which lets blocks run on into the next row (its CPU library looks the codes of
    maxima up in a coarser way and may miss the nearest by a hair).
    """

    shared_parts: ClassVar[frozenset[str]] = frozenset({"second", "offset"})
    as_fitted: ClassVar[bool] = True
    table: Literal["nf4", "fp4"] = "nf4"
    group_size: int = 64
    double: bool = True

    @property
    def name(self) -> str:
        size = "" if self.group_size == 64 else f"-g{self.group_size}"
        return f"{self.table}{size}{'' if self.double else '-plain'}"

    @property
    def rows_apart(self) -> bool:  # type: ignore[override]
        return not self.double

    @property
    def groups_apart(self) -> bool:  # type: ignore[override]
        return not self.double

    @property
    def code_bits(self) -> int:
        return 4

    @property
    def entries(self) -> Table:
        return NF4 if self.table == "nf4" else FP4

    def ends(self, length: int) -> float:
        return 1.0

    def grouping(self, length: int) -> int:
        return min(self.group_size, length)

    def fitted(
        self, groups: Tensor, importance: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {"factor": groups.abs().amax(-1)}

    def rounded(self, groups: Tensor, parameters: Parameters) -> Tensor:
        factor = parameters["factor"].to(groups.dtype)
        near = torch.where(factor.abs() < 1e-38, torch.full_like(factor, 1e-38), factor)
        return self.nearest_codes((groups * (1.0 / near).unsqueeze(-1)).clamp_(-1, 1))

    def keep(self, parameters: Parameters, dtype: torch.dtype) -> dict[str, Tensor]:
        factor = parameters["factor"]
        if self.double:
            return quantized_scales(factor)
        return {"scale": kept_factor(factor, torch.float32)}

    def restore(self, parts: Parameters, count: int, groups: int) -> dict[str, Tensor]:
        return restored_scales(parts) if self.double else with_doubt(parts["scale"])

    def parameters_stored(
        self, rows: tuple[int, ...], groups: int, dtype: torch.dtype
    ) -> dict[str, Stored]:
        if not self.double:
            return {"scale": (torch.float32, (*rows, groups))}
        second = kept_maxima(math.prod(rows) * groups)
        return {
            "scale": (torch.uint8, (*rows, groups)),
            "second": (torch.float32, (second,)),
            "offset": (torch.float32, (1,)),
        }


def _parse(match: re.Match[str]) -> Blockwise4:
    table: Literal["nf4", "fp4"] = "nf4" if match[1] == "nf4" else "fp4"
    return Blockwise4(table, int(match[2] or 64), not match[3])


FAMILY = Family(
    pattern=r"(nf4|fp4)(?:-g([1-9]\d*))?(-plain)?",
    parse=_parse,
    known=("nf4", "nf4-plain", "fp4", "fp4-plain"),
    grammar="nf4 or fp4, then (if not 64) g and the block size, then plain for float32 maxima",
)
