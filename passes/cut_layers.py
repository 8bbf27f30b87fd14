"""Cut whole layers, or attention and MLP branches alone, the least influential ones first."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.program import Program
from .contract import Context


@dataclass(frozen=True)
class LayerCounts:
    """How many whole layers, attention branches and MLP branches a program has."""

    layers: int
    attention: int
    mlp: int


def count_layers(program: Program) -> LayerCounts:
    """What `cut_layers` could cut of."""
    return LayerCounts(0, 0, 0)


def cut_layers(
    program: Program, context: Context, *, layers: int = 0, attention: int = 0, mlp: int = 0
) -> None:
    """Cut so many layers and branches in place, by block influence on `context.calibration`."""
    raise NotImplementedError(f"{layers}, {attention}, {mlp} of {program!r} {context!r}")
