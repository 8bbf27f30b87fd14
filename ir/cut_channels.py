"""Cut channels out of a program: weights, literal sizes and metadata follow; no mask remains.

`cut_channels` takes a set of channel classes (`ChannelMap`) and leaves a program of the same graph
that computes with narrower values. `masked` is the twin that it must equal: the same program with
all weight entries of those channels set to 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from .channel_map import ChannelMap, channel_map
from .errors import PlanishError
from .program import Program

Norms = Literal["kept", "own"]


class CannotCut(PlanishError):
    """These channels cannot be cut: something on their way needs them, or the rest is ragged."""


def cut_channels(
    program: Program,
    dead: Iterable[int],
    *,
    channels: ChannelMap | None = None,
    norms: Norms = "kept",
) -> Program:
    """Cut the classes `dead` (roots of `channels`, a map of this program) in place; returns it.

    norms: where a norm loses channels of the values that it takes statistics of, "kept" divides by
    their number before the cut, so that the program equals `masked`; "own" by the number that is
    left. Raises CannotCut naming the node, its module and why; the program is then as it was.
    """
    raise NotImplementedError


def masked(program: Program, channels: ChannelMap, dead: Iterable[int]) -> Program:
    """A copy whose weight entries of dead channels are 0 (norms' stored offsets are respected:
    the factor becomes 0); encoded weights are decoded."""
    twin = program.copy()
    for name, axes in channels.dead_entries(dead).items():
        weight = twin.weights[name].clone()
        offset = channels.offsets.get(name, 0.0)
        for axis, gone in axes.items():
            weight.index_fill_(axis, gone.nonzero().flatten(), -offset)
        twin.weights[name] = weight
    return twin


__all__ = ["CannotCut", "ChannelMap", "Norms", "channel_map", "cut_channels", "masked"]
