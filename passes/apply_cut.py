"""Carry a chosen cut out: weights solved anew, channels removed, the result checked and told."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.channel_map import ChannelMap
from ..ir.compare import relative_deviation
from ..ir.cut_channels import CannotCut, Norms, cut_channels, masked
from ..ir.history import Measured
from ..ir.interpret import run
from ..ir.program import Program
from ..ir.yardstick import WIDE_LIMIT
from .contract import Context
from .reconstruct_columns import reconstruct_columns


def apply_cut(
    program: Program,
    channels: ChannelMap,
    dead: Collection[int],
    context: Context,
    *,
    norms: Norms,
    growth: float,
    reconstruct: bool = False,
) -> None:
    """Cut the classes `dead` in place.

    growth: of the program's own rounding, that the factors of norms may cost. reconstruct: by least
    squares on the calibration batches. With norms="kept" the result must be what the masked twin
    is; raises CannotCut otherwise.
    """
    if reconstruct:
        _reconstruct(program, channels, dead, context)
    twin = masked(program, channels, dead) if norms == "kept" else None
    gone = channels.closure(dead)
    narrower = any(
        made == "norm" and not gone.isdisjoint(channels.axes[key].tolist())
        for key, made in channels.produces.items()
    )
    cut_channels(program, dead, channels=channels, norms=norms)
    if twin is not None and program.examples:
        _verify(program, twin, context, growth if narrower else 0.0)


def _reconstruct(
    program: Program, channels: ChannelMap, dead: Collection[int], context: Context
) -> None:
    columns: dict[str, dict[int, Tensor]] = {}
    rows: dict[str, dict[int, Tensor]] = {}
    for name, axes in channels.dead_entries(dead).items():
        for axis, gone in axes.items():
            into = columns if (name, axis) in channels.absorbs else rows
            into.setdefault(name, {})[axis] = gone
    reconstruct_columns(program, columns, context, dead_rows=rows)


def _verify(program: Program, twin: Program, context: Context, growth: float) -> None:
    """Raise CannotCut unless the program is what its masked twin is, on its examples."""
    flat = list(program.examples)
    with torch.no_grad():
        ours, theirs = run(program, flat, float64=True), run(twin, flat, float64=True)
        native = run(twin, flat) if growth else theirs
    gap = _deviation(theirs, ours)
    # norms that lose channels get a factor, rounded to their dtype: as far as the twin's own
    # rounding may grow; all else computes the same function
    limit = max(WIDE_LIMIT, growth * _deviation(theirs, native))
    if not gap <= limit:
        raise CannotCut(
            "the cut program differs from the one with these weights set to 0",
            expected=f"a relative difference of at most {limit:.2g} in float64",
            found=f"{gap:.2g}",
            fix="cut less, or other kinds of units, and report this model",
        )
    what = "difference from the program with weights set to 0"
    context.journal.measured.append(Measured(what, 0.0, gap, limit))


def _deviation(reference: Sequence[Any], values: Sequence[Any]) -> float:
    pairs = zip(reference, values, strict=True)
    return max((relative_deviation(a, b) for a, b in pairs), default=0.0)


__all__ = ["apply_cut"]
