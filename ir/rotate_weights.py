"""Multiply weights by rotations, along a whole axis or head by head."""

from __future__ import annotations

import torch
from torch import Tensor

from .program import Program
from .scale_edges import EdgeEnd, ScaleEdge


def rotate_axis(program: Program, name: str, axis: int, matrix: Tensor) -> None:
    """W'[.., j, ..] = sum of W[.., i, ..] R[i, j] along one axis; rounded once from float64."""
    weight = program.weights[name]
    turned = (weight.movedim(axis, -1).double() @ matrix).movedim(-1, axis)
    program.weights[name] = turned.to(weight.dtype).contiguous()


def rotate_heads(program: Program, edge: ScaleEdge, heads: Tensor, matrix: Tensor) -> list[str]:
    """Rotate each value head of a v->o edge; returns the names of the weights.

    heads: int64 [heads, channels], the edge's factors by head; matrix: [channels, channels].
    """
    ends = (*edge.producers, *edge.consumers)
    for end in ends:
        _rotate_end(program, end, heads, matrix)
    return list(dict.fromkeys(end.weight for end in ends))


def _rotate_end(program: Program, end: EdgeEnd, heads: Tensor, matrix: Tensor) -> None:
    weight = program.weights[end.weight]
    last = weight.movedim(end.axis, -1).double()
    turned = last.clone()
    for head in heads:
        places = places_of(end.channel, head)
        turned[..., places.flatten()] = (last[..., places] @ matrix).flatten(-2)
    program.weights[end.weight] = turned.movedim(-1, end.axis).to(weight.dtype).contiguous()


def places_of(channel: Tensor, head: Tensor) -> Tensor:
    """Where a head's channels lie along an axis, [copies, channels].

    The copies are those of the query heads that share a value head, in order.
    """
    found = [(channel == number).nonzero().flatten() for number in head.tolist()]
    return torch.stack(found, dim=1)
