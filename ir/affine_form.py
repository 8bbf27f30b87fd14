"""Weights that are an affine integer weight in disguise, so that integer kernels read them packed.

Signs are integers; elements of mxfp4, nvfp4 and mxfp6-e2m3 are small integers over 2 or 8; offsets
add a multiple of a group's input sum to a product; columns and outliers beside a base add products
of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .encoded import Encoded
from .format_affine import AffineInt
from .format_columns import PLACES, WithColumns
from .format_columns import VALUES as COLUMN_VALUES
from .format_mx import Microscaled, NvFp4
from .format_offset import AffineOffset
from .format_sparse import WithOutliers
from .format_ternary import Signs
from .format_two_four import Compressed
from .format_two_four_codes import CompressedCodes
from .layouts import BitPacked
from .sparse_rows import COLUMNS, POINTERS, places
from .sparse_rows import VALUES as OUTLIER_VALUES
from .table_format import TableFormat

_TIMES = {"mxfp4": (2, 5), "nvfp4": (2, 5), "mxfp6-e2m3": (8, 7)}
"""What makes integers of the elements, and the bits that hold these."""


@dataclass(frozen=True)
class Columns:
    """What to add to whole columns: places int64 [kept], values [rows, kept]."""

    places: Tensor
    values: Tensor


@dataclass(frozen=True)
class Entries:
    """What to add to single values: rows and columns int64 [count], values [count]."""

    rows: Tensor
    columns: Tensor
    values: Tensor


@dataclass(frozen=True)
class AffineForm:
    """weight = steps + offset of its group + columns + entries, each but the first optional.

    steps: an `AffineInt` weight; offset: [*rows_shape[:-1], groups]. All floats are float32.
    The sum is the encoded weight up to float32 rounding, and exactly where `plain`.
    """

    steps: Encoded
    offset: Tensor | None = None
    columns: Columns | None = None
    entries: Entries | None = None

    @property
    def plain(self) -> bool:
        """Whether the steps are all."""
        return self.offset is None and self.columns is None and self.entries is None


def affine_form(encoded: Encoded) -> AffineForm | None:
    """The affine form of a weight; None for formats that have none."""
    fmt = encoded.format
    match fmt:
        case AffineInt():
            return AffineForm(encoded)
        case CompressedCodes():
            return AffineForm(fmt.spread(encoded))
        case AffineOffset():
            return _of_offsets(encoded, fmt)
        case Signs() if fmt.scale_dtype != torch.float64:
            multiplier, bits = 1, 2
        case Microscaled() | NvFp4() if fmt.name in _TIMES:
            multiplier, bits = _TIMES[fmt.name]
        case WithColumns():
            return _with_columns(encoded, fmt)
        case WithOutliers():
            return _with_entries(encoded, fmt)
        case _:
            return None
    return AffineForm(_of_integers(encoded, fmt, multiplier, bits))


def why_not_affine(encoded: Encoded) -> str:
    """Why `affine_form` is None, to be read after "because"."""
    if isinstance(encoded.format, Compressed):
        return "no kernel multiplies by a compressed weight here: its zeros are put back"
    return f"the values of {encoded.format.name} lie on no grid of equal steps"


def _of_integers(encoded: Encoded, fmt: TableFormat, multiplier: int, bits: int) -> Encoded:
    """entry * factor = (multiplier * entry) * (factor / multiplier), both exact."""
    length = encoded.rows_shape[-1]
    group = fmt.grouping(length)
    wide = AffineInt(bits, None if group == length else group, True, torch.float32, "full")
    centre = 1 << (bits - 1)
    table = torch.tensor([round(multiplier * v) + centre for v in fmt.entries], dtype=torch.uint8)
    codes = fmt.codes(encoded)
    codes = table.to(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)
    scale = fmt.factors(encoded).float() / multiplier
    parts = {"codes": BitPacked(bits).pack(codes), "scale": scale}
    return replace(encoded, format=wide, parts=parts)


def _of_offsets(encoded: Encoded, fmt: AffineOffset) -> AffineForm | None:
    if fmt.scale_dtype == torch.float64:
        return None
    steps = AffineInt(fmt.bits, fmt.group_size, True, torch.float32, "full")
    scale = fmt.scale(encoded).float()
    offset = fmt.offset(encoded).double() + scale.double() * (1 << (fmt.bits - 1))
    parts = {"codes": encoded.parts["codes"], "scale": scale}
    return AffineForm(replace(encoded, format=steps, parts=parts), offset.float())


def _with_columns(encoded: Encoded, fmt: WithColumns) -> AffineForm | None:
    rest = fmt.rest(encoded)
    form = affine_form(rest)
    if form is None or form.columns is not None or len(encoded.shape) != 2:
        return None
    chosen = encoded.parts[PLACES].long()
    # the base has something in these columns too, if only a zero
    beside = rest.decode(torch.float32).movedim(encoded.axis, -1)[:, chosen]
    values = encoded.parts[COLUMN_VALUES].float() - beside
    return replace(form, columns=Columns(chosen, values))


def _with_entries(encoded: Encoded, fmt: WithOutliers) -> AffineForm | None:
    rest = fmt.rest(encoded)
    form = affine_form(rest)
    if form is None or form.entries is not None or len(encoded.shape) != 2:
        return None
    length = encoded.rows_shape[-1]
    beside = rest.decode(torch.float32).movedim(encoded.axis, -1).reshape(-1)
    values = encoded.parts[OUTLIER_VALUES].float() - beside[places(encoded.parts, length)]
    rows = torch.repeat_interleave(encoded.parts[POINTERS].long().diff())
    return replace(form, entries=Entries(rows, encoded.parts[COLUMNS].long(), values))


def assembled(form: AffineForm) -> Tensor:
    """The weight that a form stands for, float32, in its own shape: the reference of kernels."""
    steps = form.steps
    rows = steps.decode(torch.float32).movedim(steps.axis, -1)
    length = rows.shape[-1]
    if form.offset is not None:
        size = steps.format.grouping(length)
        count = math.ceil(length / size)
        rows = rows + form.offset[..., :count].repeat_interleave(size, -1)[..., :length]
    if form.columns is not None:
        rows = rows.index_add(-1, form.columns.places, form.columns.values)
    if form.entries is not None:
        at = (form.entries.rows, form.entries.columns)
        rows = rows.index_put(at, form.entries.values, accumulate=True)
    return rows.movedim(-1, steps.axis).contiguous()


__all__ = ["AffineForm", "Columns", "Entries", "affine_form", "assembled", "why_not_affine"]
