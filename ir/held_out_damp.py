"""How firmly least squares holds on to the old weights: tried on tokens that it has not seen.

With few calibration tokens the answer follows their noise, and more damping is better; with many,
less. So the moments are kept in two halves: what one half says is tried on the other, for some
sizes of the damping, and the best one is taken for the whole (cross-validation in two parts).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .paired_moments import PairedMoments

_TRIED = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
_ROWS = 64
"""Outputs that are tried: the damping is one number, and so many rows tell it."""


def held_out_damp(
    halves: Sequence[PairedMoments], weight: Tensor, dead: Tensor, least: float, centred: bool
) -> float:
    """The best of `least` and some larger ones; arguments as of `PairedMoments.solved`.

    With a half that is empty, `least`. The whole has twice the tokens of a half and so half the
    noise in its moments: it gets half of what was best for a half, but not less than `least`.
    """
    if len(halves) != 2 or not all(half.tokens for half in halves):
        return least
    rows = torch.arange(0, len(weight), max(1, len(weight) // _ROWS))
    wide = weight.double()[rows]
    errors: list[float] = []
    for factor in _TRIED:
        total = 0.0
        for seen, other in (halves, halves[::-1]):
            solved = seen.rows(rows).solved(wide, dead, factor * least, centred)
            total += other.rows(rows).error(wide, solved.weight, centred) * other.tokens
        errors.append(total)
    return max(least, least * _TRIED[errors.index(min(errors))] / 2)


__all__ = ["held_out_damp"]
