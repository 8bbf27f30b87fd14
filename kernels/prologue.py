"""What a matmul kernel does to x as it loads it, so that x itself is never written.

Worth it for few rows, where a kernel is bound by what it reads; with many rows every tile of
columns would compute x again, so there it is computed once, by a launch of its own.
"""
# pyright: reportMissingParameterType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Plan
from .linear_problem import LinearProblem, matrix
from .operand_views import as_rows, as_vector

SOURCES = 2
"""Tensors that a prologue reads beside the x that it is given."""


@dataclass(frozen=True)
class Prologue:
    """x = function(x, sources), value by value.

    function: under @triton.jit, of (x, rows, along, inside, P1, P1_row, P2, P2_row): tiles [rows,
    columns] in float32. sources: [..., K] with x's rows, or [K]. separate: the plan of a launch
    that computes x.
    """

    function: Any
    sources: tuple[Tensor, ...]
    separate: Callable[[], Plan]


@triton.jit
def prologue_source(P, row_stride, rows, along, inside):
    """A tile of a source in float32."""
    at = rows.to(tl.int64)[:, None] * row_stride + along[None, :]
    return tl.load(P + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def prologue_applied(x, rows, along, inside, P1, P1_row, P2, P2_row, PREPARE):
    """x as the product reads it; zero outside."""
    if PREPARE is not None:
        made = PREPARE(x.to(tl.float32), rows, along, inside, P1, P1_row, P2, P2_row)
        x = tl.where(inside, made, 0.0).to(x.dtype)
    return x


def prologue_arguments(prologue: Prologue | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run-time and compile-time arguments of a prologue, for `Launch`."""
    args: dict[str, Any] = {}
    for place in range(1, SOURCES + 1):
        given = prologue.sources[place - 1 : place] if prologue else ()
        tensor = _flat(given[0]) if given else None
        step = 0 if tensor is None or tensor.dim() == 1 else tensor.stride(0)
        args |= {f"P{place}": tensor, f"P{place}_row": step}
    return args, {"PREPARE": prologue.function if prologue else None}


def _flat(source: Tensor) -> Tensor:
    return as_vector(source) if source.dim() == 1 else as_rows(source, source.shape[-1])


def prologue_launches(
    problem: LinearProblem, prologue: Prologue | None, few: bool
) -> tuple[LinearProblem, Prologue | None, tuple[Launch, ...]]:
    """The problem whose rows the kernel reads, what it still does to them, and launches before.

    few: whether the kernel that was chosen applies a prologue itself.
    """
    if prologue is None or few:
        return problem, prologue, ()
    made = prologue.separate()
    return replace(problem, rows=matrix(made.outputs[0])), None, made.launches
