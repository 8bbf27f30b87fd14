"""Look up rows of an integer table that is packed for `linear_int`, on a GPU.

Only the rows asked for are decoded, so a table and the head tied to it share their packed parts.
"""
# pyright: reportMissingParameterType=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ir.formats import AffineInt
from ..ir.gpu_layouts import FieldWords
from .launch import Config, Launch, Plan
from .linear_fields import linear_field_value
from .linear_int import WIDTHS, decoded, pack
from .operator import define
from .spec import Cost
from .triton_spec import Arguments, Case, Form, TritonSpec

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def rows_int_kernel(
    IDS,
    WORDS,
    SCALE,
    ZERO,
    OUT,
    width,
    length,
    group,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    FIELDS: tl.constexpr,
    CENTRE: tl.constexpr,
):
    """One block of columns of one row: a run of words, a field at a time."""
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = tl.load(IDS + token).to(tl.int64)
    known = (index >= 0) & (index < width)
    index = tl.minimum(tl.maximum(index, 0), width - 1)
    along = tl.arange(0, RUN)
    plane = tl.cast(width, tl.int64) * RUN
    at = WORDS + block * PLANES * plane + index * RUN + along
    first = tl.load(at)
    second, third = first, first
    if BITS == 3:
        second = tl.load(at + plane)
        third = tl.load(at + 2 * plane)
    for field in tl.static_range(FIELDS):
        start = (block * FIELDS + field) * RUN
        place = tl.minimum(start, length - 1) // group * tl.cast(width, tl.int64) + index
        scale = tl.load(SCALE + place).to(tl.float32)
        zero = tl.full([1], CENTRE, tl.float32)
        if ZERO is not None:
            zero += tl.load(ZERO + place).to(tl.float32) - CENTRE
        value = linear_field_value(first, second, third, zero, field, BITS, tl.float32) * scale
        value = tl.where(known, value, float("nan")).to(OUT.dtype.element_ty)
        tl.store(OUT + token * length + start + along, value, mask=start + along < length)


CONFIGS = (Config({}, num_warps=1),)


def rows_int(
    ids: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    length: int,
    dtype: torch.dtype,
) -> Tensor:
    """The twin: ids [...] to rows [..., length] of `dtype`. See `linear_int.PackedInt`.

    A float64 scale gives float64 rows. Raises IndexError for an id outside of the table; the
    kernel, which cannot raise, gives a row of NaN.
    """
    work = torch.promote_types(scale.dtype, torch.float32)
    table = decoded(words, scale, zero, bits, group, length, work)
    rows = torch.nn.functional.embedding(ids, table)
    return rows if work == torch.float64 else rows.to(dtype)


def plan(
    ids: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    length: int,
    dtype: torch.dtype,
    *,
    config: Config | None = None,
    arch: str = "sm_80",
) -> Plan:
    """ids [...] of int64 or int32."""
    chosen = config or CONFIGS[0]
    blocks, _, width, run = words.shape
    flat = ids.reshape(-1).contiguous()
    out = torch.empty((*ids.shape, length), dtype=dtype, device=ids.device)
    launch = Launch(
        rows_int_kernel,
        (flat.shape[0], blocks),
        {
            "IDS": flat,
            "WORDS": words,
            "SCALE": scale,
            "ZERO": zero,
            "OUT": out,
            "width": width,
            "length": length,
            "group": group,
        },
        {
            "BITS": bits,
            "RUN": run,
            "FIELDS": FieldWords(bits, run).fields,
            "CENTRE": 1 << (bits - 1),
        },
    )
    return Plan((out,), (launch.with_config(chosen),))


def why_not(
    arch: str,
    ids: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    length: int,
    dtype: torch.dtype,
) -> str | None:
    if ids.dtype not in (torch.int64, torch.int32):
        return f"its ids are {ids.dtype}"
    if bits not in WIDTHS:
        return f"there is no kernel for {bits} bits"
    if dtype not in _FLOATS:
        return f"its rows are {dtype}"
    if group < length and group % words.shape[-1]:
        return f"its groups of {group} are no multiple of the layout's runs"
    return None


def cost(
    ids: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    length: int,
    dtype: torch.dtype,
) -> Cost:
    """Codes, scales and zero points of the rows asked for, and the rows; two operations a value."""
    groups = -(-length // group)
    row = length * bits // 8 + groups * (scale.element_size() + (zero is not None))
    rows = ids.numel()
    return Cost(rows * (row + length * dtype.itemsize + ids.element_size()), 2 * rows * length)


def _small(
    bits: int, length: int, group: int | None, symmetric: bool, dtype: torch.dtype
) -> Callable[[torch.Generator], Arguments]:
    def make(generator: torch.Generator) -> Arguments:
        table = torch.randn(37, length, generator=generator).mul(3)
        packed = pack(AffineInt(bits, group, symmetric).encode(table.to(dtype)))
        ids = torch.randint(0, 37, (2, 5), generator=generator)
        parts = {"words": packed.words, "scale": packed.scale, "zero": packed.zero}
        rest = {"bits": packed.bits, "group": packed.group, "length": length, "dtype": dtype}
        return {"ids": ids[:, ::2], **parts, **rest}

    return make


def _large() -> Arguments:
    layout = FieldWords(8, 32)
    words = torch.empty(layout.blocks(4096), 1, 128256, 32, dtype=torch.int16, device="meta")
    scale = torch.empty(128, 128256, dtype=torch.float16, device="meta")
    ids = torch.empty(1, 2048, dtype=torch.int64, device="meta")
    parts = {"words": words, "scale": scale, "zero": None, "bits": 8, "group": 32}
    return {"ids": ids, **parts, "length": 4096, "dtype": torch.float16}


SPEC = TritonSpec(
    name="rows_int",
    schema="planish::rows_int(Tensor ids, Tensor words, Tensor scale, Tensor? zero, int bits, "
    "int group, int length, ScalarType dtype) -> Tensor",
    serves="look-ups in integer tables",
    twin=rows_int,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=(
        Case("8 bits, groups of 32", _small(8, 72, 32, True, torch.float32)),
        Case("8 bits a channel, f16", _small(8, 72, None, True, torch.float16)),
        Case("4 bits with zero points", _small(4, 80, 16, False, torch.float32)),
        Case("3 bits, bf16", _small(3, 72, 16, False, torch.bfloat16)),
        Case("2 bits", _small(2, 48, 16, True, torch.float32)),
    ),
    forms=(Form("8 bits f16, 2048 of 128256 x 4096", _large, wide=False),),
)

define(SPEC)
