"""Observers: from the values that calibration brings, the range that int8 codes should cover.

A static scale is decided once, so a rare large value costs all others their resolution. An
observer sees every calibrated value [tokens, channels] once and then says (low, high); values
outside are held at the ends. All but `minmax` cut off some.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .activation_grid import ActivationGrid
from .histogram import Histogram


class Observer(ABC):
    """Sees values, then says the range that codes should cover."""

    def __init__(self, symmetric: bool = True) -> None:
        self.symmetric = symmetric

    @abstractmethod
    def see(self, values: Tensor) -> None:
        """Values [tokens, channels], finite."""

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """(low, high), from all that was seen; (0, 0) of nothing."""


class MinMax(Observer):
    """Everything that was seen; nothing is cut off."""

    def __init__(self, symmetric: bool = True) -> None:
        super().__init__(symmetric)
        self.low = self.high = 0.0

    def see(self, values: Tensor) -> None:
        if values.numel():
            low, high = (end.item() for end in torch.aminmax(values.detach()))
            self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self) -> tuple[float, float]:
        return self.low, self.high


class _Counted(Observer):
    """An observer that decides on a histogram."""

    def __init__(self, symmetric: bool = True) -> None:
        super().__init__(symmetric)
        self.histogram = Histogram()

    def see(self, values: Tensor) -> None:
        self.histogram.add(values)

    def range(self) -> tuple[float, float]:
        seen = self.histogram
        if seen.total == 0 or seen.limit == 0:
            return 0.0, 0.0
        return self._range()

    @abstractmethod
    def _range(self) -> tuple[float, float]: ...


class Percentile(_Counted):
    """All but a share of the values: the `share` quantile of magnitudes, or of either side."""

    def __init__(self, symmetric: bool = True, share: float = 0.9999) -> None:
        super().__init__(symmetric)
        self.share = share

    def _range(self) -> tuple[float, float]:
        seen = self.histogram
        if self.symmetric:
            end = seen.quantile(self.share, magnitudes=True)
            return max(-end, min(seen.low, 0.0)), min(end, max(seen.high, 0.0))
        return seen.quantile(1 - self.share), seen.quantile(self.share)


class _Searched(_Counted):
    """Of ranges from the extremes inwards the one of least cost."""

    def _range(self) -> tuple[float, float]:
        seen = self.histogram
        best, cost = (seen.low, seen.high), float("inf")
        for ratio in shrinking():
            ends = (min(seen.low, 0.0) * ratio, max(seen.high, 0.0) * ratio)
            found = self.cost(ActivationGrid.of(*ends, self.symmetric))
            if found < cost:
                best, cost = ends, found
        return best

    @abstractmethod
    def cost(self, grid: ActivationGrid) -> float:
        """What to make small, of the values seen so far."""


class Mse(_Searched):
    """Least squared error of the values themselves."""

    def cost(self, grid: ActivationGrid) -> float:
        places = self.histogram.centres()
        gaps = (grid.rounded(places) - places).square()
        return (gaps * self.histogram.counts).sum().item()


class Entropy(_Searched):
    """Least divergence of the histogram from what the codes can tell of it (Migacz 2017).

    The values within the range, those outside counted at its ends, against the same bins with
    each code's count spread over its bins that hold something: Kullback-Leibler divergence.
    """

    def cost(self, grid: ActivationGrid) -> float:
        places, counts = self.histogram.centres(), self.histogram.counts.double()
        steps = torch.round(places / (grid.scale or 1.0)).long() + (grid.zero or 0)
        lowest = -127 if grid.zero is None else -128
        inside = (steps >= lowest) & (steps <= 127)
        if not bool(inside.any()):
            return float("inf")
        held = counts[inside]
        codes = steps[inside] - lowest
        levels = torch.zeros(256, dtype=torch.float64).index_add_(0, codes, held)
        used = torch.zeros(256, dtype=torch.float64).index_add_(0, codes, (held > 0).double())
        told = torch.where(held > 0, levels[codes] / used[codes].clamp_min(1), 0.0)
        wanted = held.clone()
        first = int(inside.to(torch.uint8).argmax())
        wanted[0] += counts[:first].sum()
        wanted[-1] += counts[first + held.shape[0] :].sum()
        return _divergence(wanted, told)


def _divergence(wanted: Tensor, told: Tensor) -> float:
    """sum p log(p / q) of two unnormalized distributions; where only q is 0, a tiny q instead."""
    p, q = wanted / wanted.sum(), told / told.sum().clamp_min(1)
    there = p > 0
    return (p[there] * (p[there] / q[there].clamp_min(1e-12)).log()).sum().item()


def shrinking() -> list[float]:
    """Ratios of a range to try: by hundredths to a half, then by twentieths of itself to 1/1000."""
    ratios = [1 - 0.01 * step for step in range(50)]
    while ratios[-1] > 1e-3:
        ratios.append(ratios[-1] * 0.95)
    return ratios
