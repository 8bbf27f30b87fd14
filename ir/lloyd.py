"""Lloyd's algorithm on numbers: entries move to the means of the numbers nearest to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .weight_blocks import row_slices

ITERATIONS = 50
_ENOUGH = 1e-4


def spread_evenly(low: Tensor, high: Tensor, count: int) -> Tensor:
    """`count` entries from low to high [...], as [..., count]."""
    part = torch.linspace(0, 1, count, dtype=low.dtype, device=low.device)
    return low.unsqueeze(-1) + (high - low).unsqueeze(-1) * part


def lloyd_whole(
    blocks: Callable[[], Iterator[Tensor]], importance: Tensor | None, table: Tensor
) -> Tensor:
    """One table for all numbers, from a sorted `table` [entries]; blocks [..., k] of numbers."""
    table = table.double()
    for _ in range(ITERATIONS):
        total, weight = torch.zeros_like(table), torch.zeros_like(table)
        middles = (table[:-1] + table[1:]) / 2
        for numbers in blocks():
            flat = numbers.flatten()
            codes = torch.bucketize(flat, middles.to(flat.dtype))
            mass = None if importance is None else importance.expand_as(numbers).flatten().double()
            sums = flat.double() if mass is None else flat.double() * mass
            total += torch.bincount(codes, sums, len(table))
            weight += torch.bincount(codes, mass, len(table))
        moved = torch.where(weight > 0, total / weight, table)
        done = (moved - table).abs().max() <= _ENOUGH * (table[-1] - table[0])
        table = moved
        if done:
            break
    return table.float()


def lloyd_groups(groups: Tensor, importance: Tensor | None, count: int) -> Tensor:
    """A table [rows, groups, count] for each group of numbers [rows, groups, group]."""
    slices = row_slices(groups.shape[0], 4 * max(1, groups[0].numel()))
    return torch.cat([_of_groups(groups[at], importance, count) for at in slices])


def _of_groups(groups: Tensor, importance: Tensor | None, count: int) -> Tensor:
    """On sorted numbers an entry's share is a run, whose sum is a difference of running sums."""
    table = spread_evenly(groups.amin(-1), groups.amax(-1), count)
    ordered, order = groups.sort(dim=-1)
    mass = torch.ones_like(ordered, dtype=torch.float64)
    if importance is not None:
        mass = importance.double().expand_as(groups).gather(-1, order)
    weights = torch.nn.functional.pad(mass.cumsum(-1), (1, 0))
    sums = torch.nn.functional.pad((ordered * mass).cumsum(-1), (1, 0))
    for _ in range(ITERATIONS):
        middles = (table[..., :-1] + table[..., 1:]) / 2
        inner = torch.searchsorted(ordered, middles.contiguous(), right=True)
        ends = torch.nn.functional.pad(inner, (1, 0))
        ends = torch.nn.functional.pad(ends, (0, 1), value=ordered.shape[-1])
        weight, total = (running.gather(-1, ends).diff() for running in (weights, sums))
        moved = torch.where(weight > 0, total / weight, table).to(table.dtype)
        span = (table[..., -1:] - table[..., :1]).abs()
        done = bool(((moved - table).abs() <= _ENOUGH * span).all())
        # Rounded sums may leave the order by a hair.
        table = moved.cummax(-1).values
        if done:
            break
    return table


__all__ = ["ITERATIONS", "lloyd_groups", "lloyd_whole", "spread_evenly"]
