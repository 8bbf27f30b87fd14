"""Adapters on tied weights: under which of its names does one weight change?

An adapter may promise to keep a tie (`ensure_weight_tying`), and trained rows of an embedding
always do; then the one weight changes once. Any other changes what one name alone reads, so its
weight is tied no longer, or the adapter is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .adapter_change import Change, Replace, ReplaceRows
from .adapter_lora import LowRank
from .adapter_step import Step
from .program import Program
from .read_adapter import Adapter
from .untie import readers_by_name

_UNTIE = "merge_adapters{untie=true} gives each name values of its own"
_DIFFER = "its changes under tied names differ, though the adapter says that they are one"


def settle_ties(
    adapter: Adapter, program: Program, steps: Sequence[Step], untie: bool
) -> tuple[list[Step], list[str]]:
    """The steps, where a weight is kept tied one for all names; and what cannot be."""
    weights = program.weights
    groups: dict[str, list[Step]] = {}
    for step in steps:
        groups.setdefault(weights.canonical(step.spot.name), []).append(step)
    found: list[Step] = []
    wrong: list[str] = []
    for kept, group in groups.items():
        if len(weights.names_of(kept)) == 1:
            found += group
            continue
        settled = _tied(adapter, kept, group)
        if settled is None and untie:
            settled = _apart(program, kept, group)
        elif settled is None:
            others = [n for n in weights.names_of(kept) if n != group[0].spot.name]
            settled = f"its weight is tied to {others[0]}, which would change with it; {_UNTIE}"
        if isinstance(settled, str):
            wrong.append(f"{group[0].module}: {settled} ({kept})")
        else:
            found += settled
    return found, wrong


def _tied(adapter: Adapter, kept: str, group: list[Step]) -> list[Step] | str | None:
    """The steps that change every name at once; None where names change by themselves."""
    promised = bool(adapter.setting("ensure_weight_tying"))
    rows = all(isinstance(step.change, ReplaceRows) for step in group)
    by_name: dict[str, list[Step]] = {}
    for step in group:
        by_name.setdefault(step.spot.name, []).append(step)
    first, *others = by_name.values()
    same = all(
        len(first) == len(other)
        and all(_same(a.change, b.change) for a, b in zip(first, other, strict=True))
        for other in others
    )
    if same and (promised or rows):
        return [replace(s, spot=replace(s.spot, name=kept), tied=True) for s in first]
    return _DIFFER if promised else None


def _same(a: Change, b: Change) -> bool:
    match a, b:
        case ReplaceRows(), ReplaceRows():
            return a.rows == b.rows and torch.equal(a.value, b.value)
        case Replace(), Replace():
            return torch.equal(a.value, b.value)
        case LowRank(), LowRank():  # a table's factors are a matmul's the other way round
            straight = torch.equal(a.a, b.a) and torch.equal(a.b, b.b)
            crossed = torch.equal(a.a, b.b.t()) and torch.equal(a.b, b.a.t())
            return a.scale == b.scale and (straight or crossed)
        case _:
            return False


def _apart(program: Program, kept: str, group: list[Step]) -> list[Step] | str:
    """Each name's steps, told what reads that name."""
    readers = readers_by_name(program, kept)
    if isinstance(readers, str):
        return readers
    for step in group:
        if not readers[step.spot.name]:
            return f"nothing reads it as {step.spot.name}"
    return group


def spread(program: Program, steps: Sequence[tuple[Step, float]]) -> list[tuple[Step, float]]:
    """Steps on a tied weight, repeated for each name where another step unties one of them."""
    weights = program.weights
    split = {
        weights.canonical(step.spot.name)
        for step, _ in steps
        if not step.tied and len(weights.names_of(step.spot.name)) > 1
    }
    found: list[tuple[Step, float]] = []
    for step, factor in steps:
        if step.tied and step.spot.name in split:
            spots = [replace(step.spot, name=name) for name in weights.names_of(step.spot.name)]
            found += [(replace(step, spot=spot, tied=False), factor) for spot in spots]
        else:
            found.append((step, factor))
    return found


__all__ = ["settle_ties", "spread"]
