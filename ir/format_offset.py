"""Integers with a float offset a group: int4-g32-offset-f16, int4-g32-offset-k.

value = code * scale + offset: GGUF's Q4_1 and, with 6-bit scales and offsets that share two float16
numbers among 8 groups, its Q4_K and Q5_K; HQQ's real-valued zero points are offsets too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .affine import half_spacing
from .encoded import Encoded, Family, Stored
from .errors import UnsupportedGroupSize, WrongOption
from .format_affine import SCALE_DTYPES
from .group_format import GroupFormat, Parameters
from .layouts import BitPacked
from .offset_search import least_squares
from .table_format import kept_factor

SUPER = 8
"""Groups that share the two float16 numbers of the k form."""
_SIX = BitPacked(6)


@dataclass(frozen=True)
class AffineOffset(GroupFormat):
    """bits: 2 to 8. group_size: None takes a whole row. scale_dtype: of scales and offsets.

    k: scales are d * 6-bit codes, offsets -least * 6-bit codes, so never positive; a group's range
    then begins at or below zero.
    """

    rows_apart: ClassVar[bool] = True
    bits: int
    group_size: int | None = 32
    scale_dtype: torch.dtype = torch.float32
    k: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise WrongOption("bits out of range", expected="2 to 8", found=str(self.bits))
        if self.group_size is not None and self.group_size < 1:
            raise UnsupportedGroupSize(
                "a group must hold at least one value",
                expected="a positive number, or None for one scale a channel",
                found=str(self.group_size),
                fix="use 32, 64, 128 or None",
            )

    @property
    def name(self) -> str:
        size = "channel" if self.group_size is None else f"g{self.group_size}"
        short = next(name for name, dtype in SCALE_DTYPES.items() if dtype == self.scale_dtype)
        last = ["k"] if self.k else [] if short == "f32" else [short]
        return "-".join([f"int{self.bits}", size, "offset", *last])

    @property
    def groups_apart(self) -> bool:  # type: ignore[override]
        return not self.k

    @property
    def code_bits(self) -> int:
        return self.bits

    def grouping(self, length: int) -> int:
        return min(self.group_size or length, length)

    def fitted(
        self, groups: Tensor, importance: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The range of each group; with importance the line of least squares."""
        low, high = groups.amin(-1), groups.amax(-1)
        if self.k:
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / ((1 << self.bits) - 1)
        flat = scale == 0
        if importance is not None:
            scale, low = least_squares(self, groups, importance, scale, low)
        if not self.k:
            # A constant is its own offset; any step will do.
            scale = torch.where(flat, low.abs() + (low == 0), scale)
        return {"scale": scale, "offset": low}

    def keep(self, parameters: Parameters, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.k:
            return _packed_supers(_supers(parameters["scale"], parameters["offset"]))
        names = ("scale", "offset")
        return {name: kept_factor(parameters[name], self.scale_dtype) for name in names}

    def restore(self, parts: Parameters, count: int, groups: int) -> dict[str, Tensor]:
        return _from_supers(parts, groups) if self.k else _from_floats(parts)

    def rounded(self, groups: Tensor, parameters: Parameters) -> Tensor:
        scale, offset = (parameters[n].to(groups.dtype).unsqueeze(-1) for n in ("scale", "offset"))
        step = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes = (groups - offset).div_(step).round_().clamp_(0, (1 << self.bits) - 1)
        return codes.to(torch.uint8)

    def values(self, codes: Tensor, parameters: Parameters, dtype: torch.dtype) -> Tensor:
        scale, offset = (parameters[name].to(dtype).unsqueeze(-1) for name in ("scale", "offset"))
        return codes.to(dtype).mul_(scale).add_(offset)

    def bound(self, codes: Tensor, parameters: Parameters, length: int) -> Tensor:
        names = ("scale", "offset", "scale_doubt", "offset_doubt")
        scale, offset, cut, shift = (parameters[n].double().unsqueeze(-1) for n in names)
        top, size = (1 << self.bits) - 1, scale.abs()
        inside = (size / 2).expand(codes.shape)
        bound = torch.where(codes == 0, torch.maximum(inside, shift), inside)
        bound = torch.where(codes == top, torch.maximum(inside, shift + top * cut), bound)
        bound = torch.where(size == 0, shift + top * cut, bound)
        # Offset and steps may cancel: what both were rounded by is no part of the value.
        return bound + (offset.abs() + top * size) * 2.0**-22

    def parameters_stored(
        self, rows: tuple[int, ...], groups: int, dtype: torch.dtype
    ) -> dict[str, Stored]:
        if not self.k:
            floats: Stored = (self.scale_dtype, (*rows, groups))
            return {"scale": floats, "offset": floats}
        codes: Stored = (torch.uint8, (*rows, _SIX.stored(groups)))
        halves: Stored = (torch.float16, (*rows, -(-groups // SUPER)))
        return {"scale": codes, "offset": codes, "most": halves, "least": halves}

    def scale(self, encoded: Encoded) -> Tensor:
        return self._of_groups(encoded, "scale")

    def offset(self, encoded: Encoded) -> Tensor:
        """The offset of each group [*rows_shape[:-1], groups], float32 or float64."""
        return self._of_groups(encoded, "offset")

    def _of_groups(self, encoded: Encoded, name: str) -> Tensor:
        found = self.parameters_of(encoded)[name]
        return found.reshape(*encoded.rows_shape[:-1], found.shape[1])


def _from_floats(parts: Parameters) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in ("scale", "offset"):
        kept = parts[name]
        found[name] = kept if kept.dtype == torch.float64 else kept.float()
        found[f"{name}_doubt"] = half_spacing(kept.double().abs(), kept.dtype)
    return found


def _supers(scale: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """6-bit codes [rows, groups] and the float16 numbers [rows, supers] they are multiples of."""
    found: dict[str, Tensor] = {}
    for name, whole, values in (("scale", "most", scale), ("offset", "least", -offset)):
        missing = -values.shape[1] % SUPER
        padded = torch.nn.functional.pad(values.clamp(min=0), (0, missing))
        largest = padded.unflatten(1, (-1, SUPER)).amax(-1)
        unit = kept_factor(largest / 63, torch.float16)
        step = torch.where(unit == 0, torch.ones_like(unit), unit).to(values.dtype)
        steps = step.repeat_interleave(SUPER, 1)[:, : values.shape[1]]
        codes = (values / steps).round_().clamp_(0, 63)
        least = (values > 0) if name == "scale" else torch.zeros_like(values, dtype=torch.bool)
        found[name] = torch.where(least, codes.clamp(min=1), codes).to(torch.uint8)
        found[whole] = unit
    return found


def _packed_supers(parts: Parameters) -> dict[str, Tensor]:
    packed = {name: _SIX.pack(parts[name]) for name in ("scale", "offset")}
    return {**packed, "most": parts["most"], "least": parts["least"]}


def _from_supers(parts: Parameters, groups: int) -> dict[str, Tensor]:
    """Scales and offsets are products of a float16 number and a 6-bit code: exact in float32."""
    found: dict[str, Tensor] = {}
    for name, whole, sign in (("scale", "most", 1.0), ("offset", "least", -1.0)):
        codes = _SIX.unpack(parts[name], groups).float()
        unit = parts[whole].float().repeat_interleave(SUPER, 1)[:, :groups]
        found[name] = sign * codes * unit
        spacing = 63 * half_spacing(unit.double(), torch.float16)
        near = unit.double() * torch.where((codes == 1) & (name == "scale"), 1.0, 0.5)
        found[f"{name}_doubt"] = near + spacing
    return found


def _parse(match: re.Match[str]) -> AffineOffset:
    size = None if match[2] == "channel" else int(match[2][1:])
    last = match[3][1:] if match[3] else "f32"
    if last == "k":
        return AffineOffset(int(match[1]), size, k=True)
    return AffineOffset(int(match[1]), size, SCALE_DTYPES[last])


FAMILY = Family(
    pattern=r"int([2-8])-(channel|g[1-9]\d*)-offset(-f64|-b?f16|-k)?",
    parse=_parse,
    known=(
        "int4-g32-offset",
        "int4-g32-offset-f16",
        "int4-g32-offset-k",
        "int5-g32-offset-k",
        "int3-g64-offset-f16",
        "int4-g64-offset-f16",
    ),
    grammar="int2 to int8, then channel or g and the group size, then offset, then (if not "
    "float32) f16 or bf16, or k for 6-bit scales and offsets",
)
