"""Rows of several encoded weights as one encoded weight: the codes are carried over as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .encoded import Encoded
from .resident import release


def why_not_row_stacked(entries: Sequence[Encoded]) -> str | None:
    """Why these weights [out_i, in] cannot become one [sum of out_i, in] without requantizing."""
    first = entries[0]
    for entry in entries:
        if entry.format != first.format:
            return f"one is kept as {first.format.name}, another as {entry.format.name}"
        if len(entry.shape) != 2 or entry.axis != -1:
            return f"the groups of a {entry.format.name} weight do not lie along its rows"
        if not entry.format.rows_apart:
            return f"the rows of a {entry.format.name} weight share what is stored"
    return None


def stack_rows(entries: Sequence[Encoded]) -> Encoded:
    """One weight of all rows, every stored part concatenated; decodes to the same values."""
    first = entries[0]
    parts = {name: torch.cat([entry.parts[name] for entry in entries]) for name in first.parts}
    release(*entries)
    rows = sum(entry.shape[0] for entry in entries)
    return Encoded(first.format, (rows, first.shape[1]), first.dtype, -1, parts)


def slice_rows(entry: Encoded, start: int, stop: int) -> Encoded:
    """Rows [start, stop) of an encoded weight [out, in] that `stack_rows` put together."""
    parts = {name: part[start:stop].contiguous() for name, part in entry.parts.items()}
    return Encoded(entry.format, (stop - start, entry.shape[1]), entry.dtype, -1, parts)


__all__ = ["slice_rows", "stack_rows", "why_not_row_stacked"]
