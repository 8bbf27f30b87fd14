"""Move factors along a scale edge: producers take 1/s, consumers take s; the function stays."""

from __future__ import annotations

import torch
from torch import Tensor

from .program import Program
from .scale_edges import EdgeEnd, ScaleEdge


def move_scale(program: Program, edge: ScaleEdge, factors: Tensor) -> list[str]:
    """Fold positive factors [edge.factors] into the program's weights; returns their names.

    Computed in float64 and rounded once to each weight's dtype.
    """
    assert edge.free and factors.shape == (edge.factors,) and bool((factors > 0).all())
    factors = factors.to(torch.float64)
    for end in edge.producers:
        _multiply(program, end, end.spread(1 / factors))
    for end in edge.consumers:
        _multiply(program, end, end.spread(factors))
    return [end.weight for end in (*edge.producers, *edge.consumers)]


def scaled(weight: Tensor, end: EdgeEnd, spread: Tensor) -> Tensor:
    """A weight with the entries along an end's axis multiplied; in the weight's dtype."""
    shape = [-1 if axis == end.axis else 1 for axis in range(weight.dim())]
    wide = weight.to(torch.float64) + end.offset
    return (wide * spread.to(torch.float64).reshape(shape) - end.offset).to(weight.dtype)


def _multiply(program: Program, end: EdgeEnd, spread: Tensor) -> None:
    program.weights[end.weight] = scaled(program.weights[end.weight], end, spread)
