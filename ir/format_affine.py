"""Integers on an affine grid, by group or by channel: int4-g64-sym, int8-channel-asym-f32."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .affine import affine_bound, affine_parameters, grouped, ungrouped
from .affine_search import best_parameters
from .encoded import Encoded, Family, Format, Stored
from .errors import UnsupportedGroupSize, WrongOption
from .grid import Grid
from .layouts import BitPacked
from .weight_blocks import check_weight, compute_dtype, row_blocks, row_slices

SCALE_DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}
"""The dtypes of scales by their names in a format's name."""


@dataclass(frozen=True)
class AffineInt(Format):
    """value = (code - zero_point) * scale, with unsigned codes of `bits` bits (2 to 8).

    group_size: values that share a scale along the grouped axis, the last group may be shorter;
        None: one scale a channel.
    symmetric: zero_point is 2^(bits-1) everywhere and not stored; otherwise a code for each group,
        so that zero is always a value of the grid.
    scale_dtype: None takes the weight's own dtype.
    code_range: "full" puts the value of largest magnitude, with its sign, on the code
        -2^(bits-1), so that a scale may be negative; "narrow" uses -(2^(bits-1)-1) to
        2^(bits-1)-1 with a positive scale. None takes "full" below 8 bits and "narrow" at 8.
        On SmolLM2-135M (groups of 64, mean SQNR over layers) full against narrow gave 7.7 / 2.8 dB
        at 2 bits, 13.8 / 11.5 at 3, 20.0 / 18.8 at 4, 26.0 / 25.4 at 5, 32.0 / 31.8 at 6, and
        44.13 / 44.14 at 8.

    Rounds to nearest, ties to even. Groups of one constant are exact if the scale dtype holds it.
    Encoding a decoded weight again changes nothing if symmetric (and no scale is subnormal); with
    zero points it may move values by a step, and `encode_with` the first grid does not.
    """

    rows_apart: ClassVar[bool] = True
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: torch.dtype | None = None
    code_range: Literal["narrow", "full"] | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise WrongOption(
                "bits out of range", expected="2 to 8", found=str(self.bits), fix="choose 4 or 8"
            )
        if self.group_size is not None and self.group_size < 1:
            raise UnsupportedGroupSize(
                "a group must hold at least one value",
                expected="a positive number, or None for one scale a channel",
                found=str(self.group_size),
                fix="use 32, 64, 128 or None",
            )
        if self.scale_dtype is not None and self.scale_dtype not in SCALE_DTYPES.values():
            raise WrongOption(
                "a scale must be a floating-point number",
                expected=", ".join(SCALE_DTYPES),
                found=str(self.scale_dtype),
                fix="use torch.float32, or None for the weight's own dtype",
            )
        if not self.symmetric and self.code_range == "narrow":
            raise WrongOption(
                "only a symmetric format has a narrow code range",
                expected='symmetric=True, or code_range="full"',
                found='symmetric=False, code_range="narrow"',
                fix="leave code_range out",
            )
        if self.code_range is None:
            object.__setattr__(self, "code_range", self._default_range())

    def _default_range(self) -> Literal["narrow", "full"]:
        return "narrow" if self.symmetric and self.bits == 8 else "full"

    @property
    def name(self) -> str:
        size = "channel" if self.group_size is None else f"g{self.group_size}"
        parts = [f"int{self.bits}", size, "sym" if self.symmetric else "asym"]
        if self.code_range != self._default_range():
            parts.append(str(self.code_range))
        parts += [short for short, dtype in SCALE_DTYPES.items() if dtype == self.scale_dtype]
        return "-".join(parts)

    def groups(self, length: int) -> int:
        """How many groups cover `length` values."""
        return -(-length // (self.group_size or length))

    def grouping(self, length: int) -> int:
        return min(self.group_size or length, length)

    def stored(self, shape: Sequence[int], axis: int, dtype: torch.dtype) -> dict[str, Stored]:
        rows = list(shape)
        length = rows.pop(axis)
        pack, groups = BitPacked(self.bits), self.groups(length)
        parts: dict[str, Stored] = {
            "codes": (torch.uint8, (*rows, pack.stored(length))),
            "scale": (self.scale_dtype or dtype, (*rows, groups)),
        }
        if not self.symmetric:
            parts["zero_point"] = (torch.uint8, (*rows, pack.stored(groups)))
        return parts

    def grid(
        self,
        groups: Tensor,
        importance: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        where: str = "",
    ) -> Grid:
        """With importance: of grids near that of each group's range, the one of least squares."""
        own = dtype or groups.dtype
        kept = self.scale_dtype or own
        if importance is None:
            scale, zero = affine_parameters(self, groups, kept, where)
        else:
            scale, zero = best_parameters(self, groups, importance, kept, where)
        parts = {"scale": scale} if zero is None else {"scale": scale, "zero_point": zero}
        return Grid(self, parts, own)

    def nearest(self, grid: Grid, values: Tensor) -> Tensor:
        scale = grid.parameters["scale"].to(values.dtype).unsqueeze(-1)
        step = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = grid.parameters.get("zero_point")
        centre = 1 << (self.bits - 1)
        offset = centre if zero is None else zero.to(values.dtype).unsqueeze(-1)
        lowest = 1 if self.code_range == "narrow" else 0
        codes = (values / step).round_().add_(offset).clamp_(lowest, 2 * centre - 1)
        return codes.sub_(offset).mul_(scale)

    def encode_on(
        self, weight: Tensor, grid: Grid, axis: int = -1, *, dtype: torch.dtype | None = None
    ) -> Encoded:
        check_weight(weight, axis, "")
        scale, zero = grid.parameters["scale"], grid.parameters.get("zero_point")
        found = self._encode(weight, axis, (scale, zero), scale.dtype, "")
        return replace(found, dtype=dtype or grid.dtype)

    def encode(self, weight: Tensor, axis: int = -1, *, where: str = "") -> Encoded:
        """Round a floating-point `weight` [..., out, in] with groups along `axis`.

        Works through blocks of rows, so temporary memory does not grow with the weight.
        Raises NonFiniteWeight, ScaleOverflow, UnsupportedShape.
        """
        check_weight(weight, axis, where)
        return self._encode(weight, axis, None, self.scale_dtype or weight.dtype, where)

    def encode_with(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int = -1
    ) -> Encoded:
        """Round `weight` to the grid of a given scale (and zero point) [..., groups].

        `worst_error` of the result holds only while the weight lies within that grid.
        """
        check_weight(weight, axis, "")
        kept = self.scale_dtype or weight.dtype
        return self._encode(weight, axis, (scale, zero_point), kept, "")

    def _encode(
        self,
        weight: Tensor,
        axis: int,
        given: tuple[Tensor, Tensor | None] | None,
        scale_dtype: torch.dtype,
        where: str,
    ) -> Encoded:
        rows = weight.detach().movedim(axis, -1)
        *lead, length = rows.shape
        groups, pack = self.groups(length), BitPacked(self.bits)
        count, device = rows.numel() // length, weight.device
        codes = torch.empty(count, pack.stored(length), dtype=torch.uint8, device=device)
        zeros = torch.empty(count, pack.stored(groups), dtype=torch.uint8, device=device)
        scales = torch.empty(count, groups, dtype=scale_dtype, device=device)
        for at, block in row_blocks(rows):
            work = _wide(block, compute_dtype(weight.dtype, scales.dtype), self.group_size)
            if given is None:
                block_scale, block_zero = affine_parameters(self, work, scale_dtype, where)
            else:
                scale, zero = given
                block_scale = scale.reshape(count, groups)[at].to(scales.dtype)
                block_zero = None if zero is None else zero.reshape(count, groups)[at]
            scales[at] = block_scale
            codes[at] = pack.pack(self._round(work, block_scale, block_zero)[:, :length])
            if block_zero is not None:
                zeros[at] = pack.pack(block_zero.to(torch.uint8))
        parts = {"codes": codes.reshape(*lead, -1), "scale": scales.reshape(*lead, -1)}
        if not self.symmetric:
            parts["zero_point"] = zeros.reshape(*lead, -1)
        from_end = axis if axis < 0 else axis - weight.dim()
        return Encoded(self, tuple(weight.shape), weight.dtype, from_end, parts)

    def _round(self, work: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes uint8 [rows, groups * group] of `work` [rows, groups, group], which is used up."""
        step = scale.to(work.dtype)
        step = torch.where(step == 0, torch.ones_like(step), step)
        centre = 1 << (self.bits - 1)
        offset = centre if zero is None else zero.to(work.dtype).unsqueeze(-1)
        lowest = 1 if self.code_range == "narrow" else 0
        work.div_(step.unsqueeze(-1)).round_().add_(offset).clamp_(lowest, 2 * centre - 1)
        if self.bits < 8:  # a cast to signed bytes is five times as fast as one to unsigned
            return work.to(torch.int8).view(torch.uint8).flatten(1)
        return work.to(torch.uint8).flatten(1)

    def codes(self, encoded: Encoded) -> Tensor:
        return BitPacked(self.bits).unpack(encoded.parts["codes"], encoded.rows_shape[-1])

    def scale(self, encoded: Encoded) -> Tensor:
        return encoded.parts["scale"]

    def zero_point(self, encoded: Encoded) -> Tensor | None:
        if self.symmetric:
            return None
        return BitPacked(self.bits).unpack(
            encoded.parts["zero_point"], self.groups(encoded.rows_shape[-1])
        )

    def _steps(self, encoded: Encoded, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(code - zero point) [rows, groups, group] by blocks of rows."""
        length = encoded.rows_shape[-1]
        packed = encoded.parts["codes"].flatten(0, -2) if len(encoded.shape) > 1 else None
        packed = encoded.parts["codes"].unsqueeze(0) if packed is None else packed
        zero = self.zero_point(encoded)
        zero = None if zero is None else zero.reshape(packed.shape[0], -1)
        for at in row_slices(packed.shape[0], length):
            codes = BitPacked(self.bits).unpack(packed[at], length).to(dtype)
            offset = 1 << (self.bits - 1) if zero is None else zero[at].to(dtype).unsqueeze(-1)
            yield at, grouped(codes, self.group_size).sub_(offset)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        """(code - zero_point) * scale in float32 (float64 if the weight or scale is), rounded once.

        Values that this would carry past the largest number of `dtype` stay at it.
        """
        scale = encoded.scale.reshape(-1, self.groups(encoded.rows_shape[-1])).unsqueeze(-1)
        compute = compute_dtype(dtype, scale.dtype)
        largest = torch.finfo(dtype).max
        near_top = bool(scale.abs().max().double() * (1 << self.bits) > largest)
        out = torch.empty(encoded.rows_shape, dtype=dtype, device=scale.device)
        flat = out.view(scale.shape[0], -1)
        for at, steps in self._steps(encoded, compute):
            values = steps.mul_(scale[at].to(compute))
            values = values.clamp_(-largest, largest) if near_top else values
            flat[at] = ungrouped(values, flat.shape[1])
        return out.movedim(-1, encoded.axis).contiguous()

    def worst_error(self, encoded: Encoded) -> Tensor:
        """Half a step inside the grid; at its ends also what rounding the scale can cut off.

        Includes the rounding of the product and of the weight's dtype.
        """
        scale = encoded.scale.reshape(-1, self.groups(encoded.rows_shape[-1])).unsqueeze(-1)
        out = torch.empty(encoded.rows_shape, dtype=torch.float64, device=scale.device)
        flat = out.view(scale.shape[0], -1)
        zero = self.zero_point(encoded)
        zero = None if zero is None else zero.reshape(scale.shape[0], -1, 1)
        for at, steps in self._steps(encoded, torch.float64):
            at_zero = None if zero is None else zero[at].double()
            bound = affine_bound(self, steps, scale[at], at_zero, encoded.dtype)
            flat[at] = ungrouped(bound, flat.shape[1])
        return out.movedim(-1, encoded.axis).contiguous()


def _wide(block: Tensor, dtype: torch.dtype, group_size: int | None) -> Tensor:
    """A block [rows, length] as [rows, groups, group] in `dtype`, a copy that may be written to."""
    size = group_size or block.shape[1]
    if block.dtype == dtype or block.shape[1] % size:
        return grouped(block.to(dtype), group_size)
    return block.to(dtype, memory_format=torch.contiguous_format).view(block.shape[0], -1, size)


def _parse(match: re.Match[str]) -> AffineInt:
    kind: Literal["narrow", "full"] | None = None
    if match[4]:
        kind = "narrow" if match[4] == "-narrow" else "full"
    return AffineInt(
        bits=int(match[1]),
        group_size=None if match[2] == "channel" else int(match[2][1:]),
        symmetric=match[3] == "sym",
        scale_dtype=SCALE_DTYPES[match[5][1:]] if match[5] else None,
        code_range=kind,
    )


FAMILY = Family(
    pattern=r"int([2-8])-(channel|g[1-9]\d*)-"
    r"(sym(?=$|-)|asym(?!-narrow))(-narrow|-full)?(-f64|-f32|-b?f16)?",
    parse=_parse,
    known=tuple(
        f"int{bits}-{size}-{kind}"
        for bits in (2, 3, 4, 8)
        for size in ("channel", "g32", "g64", "g128")
        for kind in ("sym", "asym")
    ),
    grammar="int2 to int8, then channel or g and the group size, then sym or asym, then (if not "
    "the default) narrow or full, then (if not the weight's own) the scale's dtype: f64, f32, f16 "
    "or bf16",
)
