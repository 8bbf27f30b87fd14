"""Codebooks by k-means: kmeans4-tensor, kmeans3-channel-f16, kmeans4-g128-f16.

Lloyd's iterations from entries spread evenly over the range (Han et al. 2016, Deep Compression,
sec. 3); by importance, the weighted means (Kim et al. 2023, SqueezeLLM, sec. 4.1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .encoded import Encoded, Family, Stored
from .errors import WrongOption
from .format_affine import SCALE_DTYPES
from .group_format import Blocks, GroupFormat, Parameters
from .lloyd import lloyd_groups, lloyd_whole, spread_evenly
from .scaled_table import SIZE_PATTERN, Size, parsed_size

_SORTED = 1 << 23
"""Up to so many values a whole weight is sorted; more are gone through at each iteration."""


@dataclass(frozen=True)
class KMeans(GroupFormat):
    """value = table[code], a sorted table of 2^bits entries for each group, channel or tensor.

    table_dtype: of the entries as they are stored.
    """

    bits: int
    size: Size = "tensor"
    table_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise WrongOption("bits out of range", expected="1 to 8", found=str(self.bits))

    @property
    def name(self) -> str:
        size = f"g{self.size}" if isinstance(self.size, int) else self.size
        short = next(name for name, dtype in SCALE_DTYPES.items() if dtype == self.table_dtype)
        return f"kmeans{self.bits}-{size}{'' if short == 'f32' else '-' + short}"

    @property
    def group_size(self) -> int | None:
        return self.size if isinstance(self.size, int) else None

    @property
    def rows_apart(self) -> bool:  # type: ignore[override]
        return self.size != "tensor"

    @property
    def groups_apart(self) -> bool:  # type: ignore[override]
        return self.size != "tensor"

    @property
    def shared_parts(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"table"} if self.size == "tensor" else ())

    @property
    def code_bits(self) -> int:
        return self.bits

    def grouping(self, length: int) -> int:
        return min(self.group_size or length, length)

    def fit(self, blocks: Blocks, importance: Tensor | None, dtype: torch.dtype) -> Parameters:
        if self.size != "tensor":
            return GroupFormat.fit(self, blocks, importance, dtype)
        if importance is None and sum(groups.numel() for groups in blocks()) <= _SORTED:
            flat = torch.cat([groups.flatten() for groups in blocks()]).view(1, 1, -1)
            return {"table": lloyd_groups(flat, None, 1 << self.bits)[0, 0]}
        ends = [(float(groups.amin()), float(groups.amax())) for groups in blocks()]
        low, high = min(end for end, _ in ends), max(end for _, end in ends)
        table = spread_evenly(torch.tensor(low), torch.tensor(high), 1 << self.bits)
        return {"table": lloyd_whole(blocks, importance, table)}

    def fitted(
        self, groups: Tensor, importance: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {"table": lloyd_groups(groups, importance, 1 << self.bits)}

    def keep(self, parameters: Parameters, dtype: torch.dtype) -> dict[str, Tensor]:
        table = parameters["table"]
        largest = torch.finfo(self.table_dtype).max
        whole = table if table.dim() == 1 or self.size != "tensor" else table[0, 0]
        return {"table": whole.clamp(-largest, largest).to(self.table_dtype)}

    def restore(self, parts: Parameters, count: int, groups: int) -> dict[str, Tensor]:
        table = parts["table"]
        table = table if table.dtype == torch.float64 else table.float()
        return {"table": table.expand(count, groups, -1) if table.dim() == 1 else table}

    def rounded(self, groups: Tensor, parameters: Parameters) -> Tensor:
        table = parameters["table"].to(groups.dtype)
        middles = (table[..., :-1] + table[..., 1:]) / 2
        if self.size == "tensor":
            codes = torch.bucketize(groups.contiguous(), middles[0, 0].contiguous(), out_int32=True)
        else:
            codes = torch.searchsorted(middles.contiguous(), groups.contiguous(), out_int32=True)
        return codes.to(torch.uint8)

    def values(self, codes: Tensor, parameters: Parameters, dtype: torch.dtype) -> Tensor:
        table = parameters["table"].to(dtype)
        if self.size == "tensor":
            return table[0, 0].index_select(0, codes.flatten().int()).view(codes.shape)
        return table.gather(-1, codes.long())

    def bound(self, codes: Tensor, parameters: Parameters, length: int) -> Tensor:
        """Half the gap to a neighbour; infinite at both ends, beyond which nothing is kept."""
        table = parameters["table"].double()
        gaps = table.diff(dim=-1) / 2
        gaps = torch.nn.functional.pad(gaps, (1, 1), value=float("inf"))
        cell = torch.maximum(gaps[..., :-1], gaps[..., 1:])
        return cell.gather(-1, codes.long())

    def parameters_stored(
        self, rows: tuple[int, ...], groups: int, dtype: torch.dtype
    ) -> dict[str, Stored]:
        lead = () if self.size == "tensor" else (*rows, groups)
        return {"table": (self.table_dtype, (*lead, 1 << self.bits))}

    def table(self, encoded: Encoded) -> Tensor:
        """The entries [2^bits], or [*rows_shape[:-1], groups, 2^bits]."""
        return encoded.parts["table"]


def _parse(match: re.Match[str]) -> KMeans:
    dtype = SCALE_DTYPES[match[3][1:]] if match[3] else torch.float32
    return KMeans(int(match[1]), parsed_size(match[2]), dtype)


FAMILY = Family(
    pattern=rf"kmeans([1-8])-{SIZE_PATTERN}(-f64|-b?f16)?",
    parse=_parse,
    known=("kmeans4-tensor", "kmeans4-channel-f16", "kmeans3-channel-f16", "kmeans8-tensor"),
    grammar="kmeans1 to kmeans8, then tensor, channel or g and the group size, then (if not "
    "float32) the entries' dtype",
)
