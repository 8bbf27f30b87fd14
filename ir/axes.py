"""Axis flow: which channels of which weights, along which axes, are the same channel.

Every element of every value is given the number of its channel, at small sizes of our choice for
batch and length; the graph's own layout operations move the numbers, so heads, packed and
interleaved projections, repeated keys and values or split gates need no rules of their own. Two
channels that an operation forces to be one are tied (a union); what remains are classes of
(weight, axis, index). The same walk answers three questions:

- "scale": may a positive factor be moved along a channel? Operations that do not pass a factor on
  block the channels that they read, with a sentence; the number 0 is a value without a factor.
- "width": what is one channel of the architecture (what must be cut, or rotated, together)?
  Nonlinear operations pass channels on, products of two values tie them; 0 is "no channel".
- "cut": what may be cut alone? As "width", but where one channel meets many it covers them
  (`axes_covers`): heads under a norm that all of them share, query heads on one key head.

`scale_edges` reads the first, `residual_streams` the second, `channel_map` the third. After a
walk, `weight_axes` holds the channel of every entry along every weight axis, `channels.solve()`
which of them are one; `watch` shows each value's channels while they are known (whose query heads
share a key head, and so on).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .axes_arithmetic import ARITHMETIC, tie_all
from .axes_layout import LAYOUT
from .axes_meeting import MEETING, meet_all
from .axes_meeting_products import MEETING_PRODUCTS
from .axes_mixing import MIXING
from .axes_products import PRODUCTS
from .axes_walk import ChannelWalk, Mode, Reading, Rule, Unfollowed
from .program import Node, Program

RULES: dict[Any, Rule] = LAYOUT | ARITHMETIC | PRODUCTS | MIXING
"""What each operation does to channels; what is not here stops a factor."""
CUT_RULES: dict[Any, Rule] = RULES | MEETING | MEETING_PRODUCTS


class Flow(ChannelWalk):
    """The channels of one program by all rules; see `ChannelWalk` for what it holds."""

    def __init__(
        self,
        program: Program,
        mode: Mode,
        watch: Callable[[Node, Any], None] | None = None,
    ) -> None:
        rules, pointwise = (CUT_RULES, meet_all) if mode == "cut" else (RULES, tie_all)
        super().__init__(program, mode, rules, pointwise, watch)


__all__ = ["Flow", "Mode", "Reading", "Unfollowed"]
