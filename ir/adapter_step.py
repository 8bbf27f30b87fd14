"""One change of one weight, and the factor that a user gives an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapter_change import Change, Delta, Spot
from .errors import WrongOption


@dataclass(frozen=True)
class Step:
    """One change of one weight; module: the adapter's name for where it belongs.

    tied: whether it changes a tied weight under all of its names.
    """

    spot: Spot
    change: Change
    module: str
    tied: bool = False


def weighted(steps: Sequence[Step], factor: float, name: str) -> list[Step]:
    """The same changes, scaled; raises WrongOption for those that are no sums."""
    if factor == 1:
        return list(steps)
    found: list[Step] = []
    for step in steps:
        if not isinstance(step.change, Delta):
            raise WrongOption(
                f"the adapter {name} cannot be weighted by {factor:g}",
                where=step.module,
                expected="an adapter that adds to weights",
                found=f"{type(step.change).__name__.lower()}, which replaces or scales them",
                fix="merge it with a weight of 1",
            )
        found.append(replace(step, change=_Weighted(step.change, factor)))
    return found


@dataclass(frozen=True)
class _Weighted(Delta):
    change: Delta
    factor: float

    def misfit(self, spot: Spot) -> str | None:
        return self.change.misfit(spot)

    def delta(self, spot: Spot, dtype: torch.dtype) -> Tensor:
        return self.change.delta(spot, dtype) * self.factor


__all__ = ["Step", "weighted"]
