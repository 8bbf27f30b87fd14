"""Linear layers on integer weights of 2, 3, 4 and 8 bits with float activations, on a GPU.

y = activation(x @ ((code - zero point) * scale).T + bias) * gate + residual. Differences of codes
are exact in any dtype and are multiplied as they are; the float32 sums of a group are scaled
(`linear_fields`), so no weight is rounded. Formats: `ir.formats.AffineInt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.encoded import Encoded
from ..ir.formats import AffineInt
from ..ir.gpu_layouts import FieldWords
from ..ir.layouts import widen
from .epilogue import standard
from .launch import Config, Plan
from .linear_field_plan import FIELD_CONFIGS, CodedWeight, field_plan
from .linear_int_cases import CASES, FORMS
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
from .prologue import Prologue
from .spec import Cost
from .triton_spec import TritonSpec

WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class PackedInt:
    """A weight [rows, length] laid out for the kernel; the fields are the operator's arguments.

    words: int16 [blocks, planes, rows, run], of `FieldWords(bits, run)`. scale: [groups, rows], in
    the format's scale dtype. zero: uint8 [groups, rows], or None where it is 2^(bits-1). group:
    columns that share a scale.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int


def pack(encoded: Encoded) -> PackedInt:
    """Lay out a matrix that `why_not_pack` lets through; 5 to 7 bits are stored in 8."""
    fmt = encoded.format
    assert isinstance(fmt, AffineInt)
    _, length = encoded.rows_shape
    bits = next(width for width in WIDTHS if width >= fmt.bits)
    group = min(fmt.group_size or length, length)
    codes = widen(encoded.codes(), fmt.bits, bits)
    zero = encoded.zero_point
    if zero is not None:
        zero = widen(zero, fmt.bits, bits).t().contiguous()
    layout = FieldWords(bits, run_of(group, length, bits))
    return PackedInt(layout.pack(codes), encoded.scale.t().contiguous(), zero, bits, group)


def run_of(group: int, length: int, bits: int) -> int:
    """Columns of a field: 16, or 32 if that divides the groups and fills hardly more up."""
    short, long = (FieldWords(bits, run) for run in (16, 32))
    filled = short.blocks(length) * short.block
    whole = group >= length or group % 32 == 0
    return 32 if whole and long.blocks(length) * long.block * 16 <= filled * 17 else 16


def why_not_pack(encoded: Encoded) -> str | None:
    """Why the kernel has no layout for a weight, to be read after "stays dense because"."""
    fmt = encoded.format
    if not isinstance(fmt, AffineInt):
        return f"{fmt.name} is not an affine integer format"
    if len(encoded.shape) != 2:
        return f"it is a stack of matrices {list(encoded.shape)}"
    group = fmt.group_size or encoded.rows_shape[1]
    if group < encoded.rows_shape[1] and group % 16:
        return f"its groups of {group} are no multiple of 16"
    if encoded.scale.dtype == torch.float64:
        return "its scales are float64, and the kernel computes in float32"
    return None


def decoded(
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    length: int,
    work: torch.dtype = torch.float32,
) -> Tensor:
    """The weight [N, length] that the packed parts stand for, computed in `work`."""
    codes = FieldWords(bits, words.shape[-1]).unpack(words, length)
    place = torch.arange(length, device=words.device) // group
    offset = 1 << (bits - 1) if zero is None else zero.t()[:, place].to(work)
    return (codes.to(work) - offset) * scale.t()[:, place].to(work)


def linear_int(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
) -> Tensor:
    """The twin; `precision` says what a GPU may do with float32 and changes nothing here."""
    work = torch.promote_types(x.dtype, torch.float32)
    weight = decoded(words, scale, zero, bits, group, x.shape[-1], work)
    return linear_twin(x, weight, bias, gate, residual, activation)


def plan(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
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
    prologue: Prologue | None = None,
) -> Plan:
    """x [..., K] and the fields of `PackedInt`; the result is contiguous.

    prologue: what becomes of x before the product.
    """
    problem = linear_problem(
        x, words.shape[2], (bias, gate, residual), activation, finish, operands
    )
    weight = CodedWeight(words, scale, bits, group, zero, centre=1 << (bits - 1))
    return field_plan(problem, weight, precision, config, arch, prologue)


def why_not(
    arch: str,
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
) -> str | None:
    length = x.shape[-1]
    if bits not in WIDTHS:
        return f"there is no kernel for {bits} bits"
    layout = FieldWords(bits, words.shape[-1])
    planes = (layout.blocks(length), layout.planes)
    if words.dtype != torch.int16 or words.shape[:2] != planes or not words.is_contiguous():
        return f"its words are {words.dtype} {list(words.shape)} for {length} columns"
    if off_16_bytes(words):
        return "its words do not start on 16 bytes"
    if group < length and group % words.shape[-1]:
        return f"its groups of {group} are no multiple of the layout's runs"
    shape = (-(-length // group), words.shape[2])
    for name, tensor in (("scales", scale), ("zero points", zero)):
        if tensor is not None and (tensor.shape != shape or not tensor.is_contiguous()):
            return f"its {name} have the shape {list(tensor.shape)}"
    if precision not in PRECISIONS:
        return f"there is no precision {precision}"
    return why_not_linear(x, words.shape[2], length, (bias, gate, residual), activation)


def cost(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    precision: str = "ieee",
) -> Cost:
    weight = nbytes(words, scale, zero)
    return linear_cost(x, words.shape[2], weight, (bias, gate, residual))


SPEC = TritonSpec(
    name="linear_int",
    schema="planish::linear_int(Tensor x, Tensor words, Tensor scale, Tensor? zero, int bits, "
    f"int group, {EPILOGUE_SCHEMA}, str precision='ieee') -> Tensor",
    serves="linear layers on integer weights",
    twin=linear_int,
    plan=plan,
    configs=FIELD_CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=CASES,
    forms=FORMS,
)

define(SPEC)
