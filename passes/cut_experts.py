"""Cut experts of routed layers: router rows and expert weights go together."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.program import Program
from .contract import Context


def count_experts(program: Program) -> list[int]:
    """The number of experts of each routed layer, in graph order."""
    return [0 for _ in program.inputs[:0]]


def cut_experts(program: Program, context: Context, counts: Sequence[int]) -> None:
    """Cut `counts[i]` experts of the i-th routed layer in place, the least important ones."""
    raise NotImplementedError(f"{counts} of {program!r} {context!r}")
