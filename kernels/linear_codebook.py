"""Linear layers on weights coded by a table of numbers, on a GPU: y = x @ (table[code] * scale).T.

NF4 and FP4 with blocks of 64 and double quantization (Dettmers et al. 2023, QLoRA, sec. 3: block
maxima are 8-bit codes themselves, in blocks of 256, with an offset), and any table of 16 or 256
entries, one for all or one for each group and row (k-means). An entry is gathered, not selected:
16 selections a weight would cost more than the tables' one line of the first-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.gpu_layouts import FieldWords
from .epilogue import standard
from .launch import Config, Plan
from .linear_codebook_cases import CASES, FORMS
from .linear_field_plan import FIELD_CONFIGS, CodedWeight, field_plan
from .linear_int import run_of
from .linear_problem import (
    EPILOGUE_SCHEMA,
    PRECISIONS,
    linear_cost,
    linear_problem,
    linear_twin,
    nbytes,
    off_16_bytes,
    why_not_linear,
)
from .operator import define
from .spec import Cost
from .triton_spec import TritonSpec

EVERY = 256
"""Block maxima that share a second-level scale (Dettmers et al. 2023, sec. 3)."""


@dataclass(frozen=True)
class PackedCodebook:
    """A weight [rows, length] laid out for the kernel; the fields are the operator's arguments.

    words: int16 [blocks, 1, rows, run], of `FieldWords(bits, run)`. scale: [groups, rows], floats
    or, with double quantization, uint8. table: [2^bits] or [groups, rows, 2^bits]. group: columns
    that share a scale. scale_table: float32 [256]; second: float32 [ceil(rows * groups / 256)];
    offset: float32 [1].
    """

    words: Tensor
    scale: Tensor
    table: Tensor
    group: int
    scale_table: Tensor | None = None
    second: Tensor | None = None
    offset: Tensor | None = None


def pack(
    codes: Tensor,
    scale: Tensor,
    table: Tensor,
    group: int,
    scale_table: Tensor | None = None,
    second: Tensor | None = None,
    offset: Tensor | None = None,
) -> PackedCodebook:
    """codes: uint8 [N, K]; scale: [N, groups]; table: [2^bits] or [N, groups, 2^bits].

    The last three as `PackedCodebook` has them: scale[n, g] is then the code of
    scale_table[code] * second[(n * groups + g) // 256] + offset.
    """
    bits = table.shape[-1].bit_length() - 1
    layout = FieldWords(bits, run_of(group, codes.shape[1], bits))
    tables = table if table.dim() == 1 else table.transpose(0, 1).contiguous()
    turned = scale.t().contiguous()
    return PackedCodebook(layout.pack(codes), turned, tables, group, scale_table, second, offset)


def scales_of(
    scale: Tensor,
    scale_table: Tensor | None,
    second: Tensor | None,
    offset: Tensor | None,
    work: torch.dtype,
) -> Tensor:
    """The factors [groups, N] of a packed weight."""
    if scale_table is None or second is None or offset is None:
        return scale.to(work)
    groups, rows = scale.shape
    place = torch.arange(rows, device=scale.device) * groups
    place = (place + torch.arange(groups, device=scale.device)[:, None]) // EVERY
    entries = scale_table.to(work)[scale.long()]
    return entries * second.to(work)[place] + offset.to(work)


def decoded(
    words: Tensor, factors: Tensor, table: Tensor, group: int, length: int, work: torch.dtype
) -> Tensor:
    """The weight [N, length] that the packed parts stand for, computed in `work`."""
    bits = table.shape[-1].bit_length() - 1
    codes = FieldWords(bits, words.shape[-1]).unpack(words, length).long()
    place = torch.arange(length, device=words.device) // group
    if table.dim() == 1:
        entries = table.to(work)[codes]
    else:
        of_columns = table.to(work).transpose(0, 1)[:, place]  # [N, length, entries]
        entries = of_columns.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    return entries * factors.t()[:, place].to(work)


def linear_codebook(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    table: Tensor,
    group: int,
    scale_table: Tensor | None = None,
    second: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
) -> Tensor:
    """The twin. Entries are rounded to x's dtype, scales are not, as in the kernel."""
    work = torch.promote_types(x.dtype, torch.float32)
    factors = scales_of(scale, scale_table, second, offset, work)
    entries = table.to(x.dtype)
    weight = decoded(words, factors, entries, group, x.shape[-1], work)
    return linear_twin(x, weight, bias, gate, residual, activation)


def plan(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    table: Tensor,
    group: int,
    scale_table: Tensor | None = None,
    second: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
    *,
    config: Config | None = None,
    arch: str = "sm_80",
    finish: Any = standard,
    operands: Sequence[Tensor | None] | None = None,
) -> Plan:
    """x [..., K] and the fields of `PackedCodebook`; the result is contiguous."""
    problem = linear_problem(
        x, words.shape[2], (bias, gate, residual), activation, finish, operands
    )
    weight = CodedWeight(
        words,
        scale,
        bits=table.shape[-1].bit_length() - 1,
        group=group,
        book=table.to(x.dtype),  # entries of two bytes are not staged in shared memory
        scale_book=scale_table,
        second=second,
        offset=offset,
        every=EVERY,
    )
    return field_plan(problem, weight, precision, config, arch)


def why_not(
    arch: str,
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    table: Tensor,
    group: int,
    scale_table: Tensor | None = None,
    second: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
) -> str | None:
    length, width = x.shape[-1], words.shape[2]
    if table.shape[-1] not in (16, 256):
        return f"its table has {table.shape[-1]} entries"
    layout = FieldWords(table.shape[-1].bit_length() - 1, words.shape[-1])
    blocks = (layout.blocks(length), 1)
    if words.dtype != torch.int16 or words.shape[:2] != blocks or not words.is_contiguous():
        return f"its words are {words.dtype} {list(words.shape)} for {length} columns"
    if group < length and group % words.shape[-1]:
        return f"its groups of {group} are no multiple of the layout's runs"
    shape = (-(-length // group), width)
    if scale.shape != shape or not scale.is_contiguous():
        return f"its scales have the shape {list(scale.shape)}"
    if (table.dim() > 1 and table.shape[:2] != shape) or not table.is_contiguous():
        return f"its tables have the shape {list(table.shape)}"
    if (scale_table is None) == (scale.dtype == torch.uint8):
        return f"its scales are {scale.dtype}"
    if off_16_bytes(words):
        return "its words do not start on 16 bytes"
    if precision not in PRECISIONS:
        return f"there is no precision {precision}"
    return why_not_linear(x, width, length, (bias, gate, residual), activation)


def cost(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    table: Tensor,
    group: int,
    scale_table: Tensor | None = None,
    second: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
) -> Cost:
    weight = nbytes(words, scale, table, scale_table, second, offset)
    return linear_cost(x, words.shape[2], weight, (bias, gate, residual))


SPEC = TritonSpec(
    name="linear_codebook",
    schema="planish::linear_codebook(Tensor x, Tensor words, Tensor scale, Tensor table, "
    "int group, Tensor? scale_table=None, Tensor? second=None, Tensor? offset=None, "
    f"{EPILOGUE_SCHEMA}, str precision='ieee') -> Tensor",
    serves="linear layers on weights coded by a table",
    twin=linear_codebook,
    plan=plan,
    configs=FIELD_CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=CASES,
    forms=FORMS,
)

define(SPEC)
