"""Table formats with one floating-point scale a group, a channel or a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .encoded import Stored
from .errors import UnsupportedGroupSize
from .format_affine import SCALE_DTYPES
from .group_format import Blocks, GroupFormat, Parameters
from .table_format import TableFormat, kept_factor, with_doubt

Size = int | Literal["channel", "tensor"]
SIZE_PATTERN = r"(tensor|channel|g[1-9]\d*)"
SCALE_PATTERN = r"(-f64|-b?f16)?"


@dataclass(frozen=True)
class ScaledTable(TableFormat):
    """size: values along the grouped axis that share a scale; "channel": all; "tensor": one scale
    for the whole weight, kept once a row, so that rows stay apart. scale_dtype: of the scales.
    """

    size: Size = "channel"
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if isinstance(self.size, int) and self.size < 1:
            raise UnsupportedGroupSize(
                "a group must hold at least one value",
                expected='a positive number, "channel" or "tensor"',
                found=str(self.size),
                fix="use 32, 64 or 128",
            )

    @property
    def suffix(self) -> str:
        """The end of the name: size, and scale dtype if it is not float32."""
        size = f"g{self.size}" if isinstance(self.size, int) else self.size
        names = [short for short, dtype in SCALE_DTYPES.items() if dtype == self.scale_dtype]
        return size if names == ["f32"] else "-".join([size, *names])

    @property
    def group_size(self) -> int | None:
        """As `AffineInt.group_size`: None where a whole row shares a scale."""
        return self.size if isinstance(self.size, int) else None

    @property
    def rows_apart(self) -> bool:  # type: ignore[override]
        return True

    @property
    def groups_apart(self) -> bool:  # type: ignore[override]
        return self.size != "tensor"

    def grouping(self, length: int) -> int:
        return min(self.group_size or length, length)

    def of_tensor(self, factor: Tensor) -> Tensor:
        """One factor for a weight whose rows would have `factor` [rows, 1]."""
        return factor.amax()

    def fit(self, blocks: Blocks, importance: Tensor | None, dtype: torch.dtype) -> Parameters:
        found = GroupFormat.fit(self, blocks, importance, dtype)
        if self.size != "tensor":
            return found
        factor = found["factor"]
        return {"factor": self.of_tensor(factor).expand_as(factor)}

    def keep(self, parameters: Parameters, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"scale": kept_factor(parameters["factor"], self.scale_dtype).contiguous()}

    def restore(self, parts: Parameters, count: int, groups: int) -> dict[str, Tensor]:
        return with_doubt(parts["scale"])

    def parameters_stored(
        self, rows: tuple[int, ...], groups: int, dtype: torch.dtype
    ) -> dict[str, Stored]:
        return {"scale": (self.scale_dtype, (*rows, groups))}


def parsed_size(text: str) -> Size:
    """The size in a name: tensor, channel, or g and a number."""
    if text.startswith("g"):
        return int(text[1:])
    return "tensor" if text == "tensor" else "channel"


def parsed_scale(text: str | None) -> torch.dtype:
    """The scale dtype at the end of a name."""
    return SCALE_DTYPES[text[1:]] if text else torch.float32


__all__ = ["SCALE_PATTERN", "SIZE_PATTERN", "ScaledTable", "Size", "parsed_scale", "parsed_size"]
