"""Token-wise clipping: a range chosen by quantiles over tokens and the error of what reads it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .activation_grid import ActivationGrid
from .observers import Observer

Weigh = Callable[[], Tensor]
"""Gives the Gram matrix W^T W [channels, channels] of the weights that read the values."""


class TokenWise(Observer):
    """Token-wise clipping (Wei et al. 2022, sec. 4.2): least error of the products that read it.

    Coarse stage: candidates are the quantiles, over tokens, of each token's largest and smallest
    value, so that the few tokens that hold outliers count once each. Fine stage: the step around
    the best candidate, where the paper learns it by gradients, by a search for the least error:
    one number needs no gradient. Errors are taken at the outputs of the reading products, on
    sampled tokens.
    """

    PER_BATCH = 64

    def __init__(self, symmetric: bool, weigh: Weigh) -> None:
        super().__init__(symmetric)
        self.weigh = weigh
        self.largest: list[Tensor] = []
        self.smallest: list[Tensor] = []
        self.samples: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)

    def see(self, values: Tensor) -> None:
        rows = values.detach().flatten(0, -2)
        if rows.numel() == 0:
            return
        self.largest.append(rows.amax(-1).float())
        self.smallest.append(rows.amin(-1).float())
        # At random, so that every position (the first holds the giants) counts as it occurs.
        chosen = torch.randperm(rows.shape[0], generator=self.generator)[: self.PER_BATCH]
        self.samples.append(rows[chosen].float())

    def range(self) -> tuple[float, float]:
        if not self.samples:
            return 0.0, 0.0
        sample, gram = torch.cat(self.samples), self.weigh().float()
        highs, lows = torch.cat(self.largest), torch.cat(self.smallest)

        def cost(ends: tuple[float, float]) -> float:
            gap = ActivationGrid.of(*ends, self.symmetric).rounded(sample) - sample
            return ((gap @ gram) * gap).sum().double().item()

        coarse = [_token_range(lows, highs, share) for share in _SHARES]
        low, high = min(coarse, key=cost)
        fine = [(low * ratio, high * ratio) for ratio in _AROUND]
        return min(fine, key=cost)


_SHARES = (1.0, 0.999, 0.998, 0.995, *(1 - 0.01 * step for step in range(1, 41)))
_AROUND = tuple(1 + 0.02 * step for step in (0, *range(-15, 0), *range(1, 16)))


def _token_range(lows: Tensor, highs: Tensor, share: float) -> tuple[float, float]:
    def at(values: Tensor, part: float) -> float:
        ordered = values.sort().values
        return ordered[round(part * (ordered.shape[0] - 1))].item()

    return at(lows, 1 - share), at(highs, share)
