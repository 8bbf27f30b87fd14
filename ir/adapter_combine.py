"""Several low-rank changes of one weight made into one, by methods that settle their conflicts.

On the factors ("linear", "ties", ...), each of which is combined by itself, or on the products B A
("svd", "ties_svd", ...), perhaps cut to the singular vectors of a rank afterwards. TIES: Yadav et
al. 2023, sec. 3 (trim, elect a sign, mean of those that agree); DARE: Yu et al. 2024, sec. 3.2
(drop at random, rescale). The definitions, with ties and negative weights, are PEFT's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter_change import Delta, Spot
from .adapter_lora import LowRank

FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
PRODUCTS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


@dataclass(frozen=True)
class Combination:
    """method: of FACTORS or PRODUCTS. density: the share of values that trimming or dropping keeps.

    sign: how a sign is elected, by "total" or by "frequency". rank: of the result, 0 for any.
    """

    method: str
    density: float = 0.5
    sign: str = "total"
    rank: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Combined(Delta):
    """branches: of one weight; weights: the user's factor of each."""

    branches: tuple[LowRank, ...]
    weights: tuple[float, ...]
    how: Combination

    def misfit(self, spot: Spot) -> str | None:
        for branch in self.branches:
            if wrong := branch.misfit(spot):
                return wrong
        ranks = {int(branch.a.shape[0]) for branch in self.branches}
        if self.how.method in FACTORS and len(ranks) > 1:
            return f"{self.how.method} combines factors of one rank, these have {sorted(ranks)}"
        return None

    def delta(self, spot: Spot, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(self.how.seed)
        if self.how.method in FACTORS:
            return self._of_factors(generator).delta(spot, dtype)
        changes = [branch.delta(spot, dtype) for branch in self.branches]
        method = self.how.method.removesuffix("svd").removesuffix("_") or "linear"
        found = self._mixed(changes, self.weights, method, generator)
        return _cut(found, self.how.rank) if self.how.rank else found

    def _of_factors(self, generator: torch.Generator) -> LowRank:
        scales = [w * b.scale for w, b in zip(self.weights, self.branches, strict=True)]
        first = [math.copysign(math.sqrt(abs(s)), s) for s in scales]
        second = [math.sqrt(abs(s)) for s in scales]
        a = self._mixed([b.a for b in self.branches], first, self.how.method, generator)
        b = self._mixed([b.b for b in self.branches], second, self.how.method, generator)
        return LowRank(a, b, 1.0, self.branches[0].flipped)

    def _mixed(
        self, values: Sequence[Tensor], weights: Sequence[float], method: str, g: torch.Generator
    ) -> Tensor:
        density = self.how.density
        if method in ("ties", "magnitude_prune"):
            values = [_largest(value, density) for value in values]
        elif method.startswith("dare"):
            values = [_dropped(value, density, g) for value in values]
        stacked = torch.stack(list(values))
        sizes = (-1, *[1] * (stacked.dim() - 1))
        scaled = stacked * torch.tensor(weights, dtype=stacked.dtype).reshape(sizes)
        if not method.endswith("ties"):
            return scaled.sum(0)
        votes = stacked if self.how.sign == "total" else stacked.sign()
        elected = torch.where(votes.sum(0) >= 0, 1, -1)
        agree = stacked.sign() == elected
        return (scaled * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(value: Tensor, density: float) -> Tensor:
    count = int(density * value.numel())
    kept = torch.zeros_like(value).flatten()
    kept[value.abs().flatten().topk(count).indices] = 1
    return value * kept.reshape(value.shape)


def _dropped(value: Tensor, density: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(value.shape, generator=generator) < density
    return value * kept / density


def _cut(value: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank; a stack's or a convolution's rows laid out flat."""
    u, s, v = torch.linalg.svd(value.flatten(1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(value.shape)


__all__ = ["FACTORS", "PRODUCTS", "Combination", "Combined"]
