"""A weight as the graph shows it: turned, chosen from, widened by empty axes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """One shown axis: the weight's axis and the positions along it, int64 [size]."""

    axis: int
    index: Tensor


@dataclass(frozen=True)
class WeightView:
    """axes: for each shown axis its place in the weight, or None for an axis that it lacks.

    shape: the sizes shown. offset: a number that was added to all of it.
    """

    name: str
    axes: tuple[Place | None, ...]
    shape: tuple[int, ...]
    offset: float = 0.0

    @staticmethod
    def whole(name: str, shape: list[int]) -> WeightView:
        axes = tuple(Place(axis, torch.arange(size)) for axis, size in enumerate(shape))
        return WeightView(name, axes, tuple(shape))

    def channel_axis(self) -> int | None:
        """The shown axis along which a weight that is read as a value has its channels.

        The last axis of more than one entry.
        """
        wide = [
            axis
            for axis, place in enumerate(self.axes)
            if place is not None and self.shape[axis] > 1
        ]
        return wide[-1] if wide else None

    def permuted(self, order: list[int]) -> WeightView:
        axes = tuple(self.axes[axis] for axis in order)
        return replace(self, axes=axes, shape=tuple(self.shape[axis] for axis in order))

    def unsqueezed(self, axis: int) -> WeightView:
        axis %= len(self.shape) + 1
        axes, shape = list(self.axes), list(self.shape)
        axes.insert(axis, None)
        shape.insert(axis, 1)
        return replace(self, axes=tuple(axes), shape=tuple(shape))

    def chosen(self, axis: int, taken: slice) -> WeightView:
        """Some positions along one axis."""
        axis %= len(self.shape)
        axes, shape = list(self.axes), list(self.shape)
        place = axes[axis]
        if place is not None:
            axes[axis] = Place(place.axis, place.index[taken])
        shape[axis] = len(range(shape[axis])[taken])
        return replace(self, axes=tuple(axes), shape=tuple(shape))

    def replaced(self, axis: int, count: int, shape: list[int]) -> WeightView:
        """`count` axes from `axis` on give way to axes that the weight lacks (a choice by data)."""
        more = len(shape) - (len(self.shape) - count)
        axes = (*self.axes[:axis], *([None] * more), *self.axes[axis + count :])
        return replace(self, axes=axes, shape=tuple(shape))

    def raised_by(self, number: float) -> WeightView:
        return replace(self, offset=self.offset + number)
