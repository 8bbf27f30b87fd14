"""Counts of values in equal bins around zero, over any number of tensors, in fixed memory."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 1 << 14
_SLICE = 1 << 22  # values counted at once


class Histogram:
    """Counts in `bins` (even) equal bins over [-limit, limit].

    The limit doubles until it holds the largest value seen; pairs of bins then merge, which loses
    nothing but resolution. low, high: the extremes themselves.
    """

    def __init__(self, bins: int = BINS) -> None:
        self.bins = bins
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.limit = 0.0
        self.low, self.high = float("inf"), float("-inf")

    def add(self, values: Tensor) -> None:
        """Count the finite values of a tensor of any shape."""
        for part in values.detach().flatten().float().split(_SLICE):
            self._add(part)

    def _add(self, part: Tensor) -> None:
        if part.numel() == 0:
            return
        low, high = (end.item() for end in torch.aminmax(part))
        self.low, self.high = min(self.low, low), max(self.high, high)
        most = max(abs(low), abs(high))
        if self.limit == 0 and most > 0:
            # a bin no narrower than the smallest normal number: its reciprocal stays finite
            self.limit = max(most, self.bins * torch.finfo(torch.float32).tiny)
        while self.limit < most:
            self._double()
        if self.limit == 0:
            self.counts[self.bins // 2] += part.numel()
            return
        places = ((part + self.limit) * (self.bins / (2 * self.limit))).long()
        self.counts += torch.bincount(places.clamp_(0, self.bins - 1), minlength=self.bins)

    def _double(self) -> None:
        merged = self.counts.view(-1, 2).sum(1)
        self.counts = torch.zeros_like(self.counts)
        quarter = self.bins // 4
        self.counts[quarter : quarter + merged.shape[0]] = merged
        self.limit *= 2

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def centres(self) -> Tensor:
        """float64 [bins]: the middle of each bin."""
        width = 2 * self.limit / self.bins
        return (torch.arange(self.bins, dtype=torch.float64) + 0.5) * width - self.limit

    def quantile(self, share: float, magnitudes: bool = False) -> float:
        """The value below which `share` of the values lie, or of their magnitudes; to half a bin.

        It never lies outside of the extremes.
        """
        places, counts = self.centres(), self.counts
        if magnitudes:
            half = self.bins // 2
            places, counts = places[half:], counts[half:] + counts[:half].flip(0)
        reached = counts.cumsum(0) >= share * self.total
        found = places[int(reached.to(torch.uint8).argmax())].item()
        most = max(abs(self.low), abs(self.high))
        return min(found, most) if magnitudes else min(max(found, self.low), self.high)
