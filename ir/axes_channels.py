"""Channel numbers: made, tied, blocked and marked; which of them are one is solved at the end.

A tensor of channel numbers is int64 of a value's shape. Most are spread along batch and length by
a stride of 0, so they take no memory, and everything here looks at one row of such a spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = NDArray[np.int64]


def narrowed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one shape without the axes along which all of them are only repeated."""
    shape = tensors[0].shape
    for axis in range(len(shape)):
        if shape[axis] > 1 and all(t.stride(axis) == 0 for t in tensors):
            tensors = tuple(t.narrow(axis, 0, 1) for t in tensors)
    return tensors


def carries(ids: Tensor) -> bool:
    """Whether any element has a channel."""
    return bool((narrowed(ids)[0] != 0).any())


def constant_along(ids: Tensor, axis: int) -> bool:
    """Whether the channels do not depend on the position along an axis."""
    if ids.dim() == 0 or ids.shape[axis] <= 1 or ids.stride(axis) == 0:
        return True
    seen = narrowed(ids)[0]
    return bool((seen == seen.narrow(axis, 0, 1)).all())


def fit(ids: Tensor, shape: list[int]) -> Tensor | None:
    """Channels spread over a shape; an axis of another size must repeat one position."""
    if ids.dim() > len(shape):
        return None
    for axis in range(ids.dim()):
        size = shape[axis - ids.dim()]
        if ids.shape[axis] not in (1, size):
            if not constant_along(ids, axis):
                return None
            ids = ids.narrow(axis, 0, 1)
    return ids.expand(shape)


@dataclass
class Channels:
    """Numbers handed out, and what is known of them. The number 0 is no channel.

    covers, pools: pairs [2, n] of (coarse, fine), see `axes_covers`; the pairs of a pool are one
    entry, noted in parts. known: the channel that covers a sorted set of channels.
    """

    count: int = 1
    rows: list[Numbers] = field(default_factory=list[Numbers])
    covers: list[Numbers] = field(default_factory=list[Numbers])
    pools: dict[str, list[Numbers]] = field(default_factory=dict[str, list[Numbers]])
    known: dict[bytes, int] = field(default_factory=dict[bytes, int])
    _blocked: set[int] = field(default_factory=set[int])
    _pairs: list[Numbers] = field(default_factory=list[Numbers])
    _blocks: list[tuple[Numbers, str]] = field(default_factory=list[tuple[Numbers, str]])
    _marks: list[tuple[Numbers, str]] = field(default_factory=list[tuple[Numbers, str]])

    def new(self, count: int) -> Tensor:
        """`count` channels that nothing ties yet, int64 [count]."""
        first, self.count = self.count, self.count + count
        return torch.arange(first, self.count)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Elements of two tensors of one shape are one channel; where one has none, nothing."""
        a, b = narrowed(*torch.broadcast_tensors(a, b))
        a, b = a.flatten(), b.flatten()
        both = (a != 0) & (b != 0) & (a != b)
        if bool(both.any()):
            self._pairs.append(torch.stack((a[both], b[both])).unique(dim=1).numpy())

    def block(self, ids: Tensor, reason: str, first: bool = False) -> None:
        """first: this reason is told before those that are known already."""
        self._note(self._blocks, ids, reason)
        if first and self._blocks and self._blocks[-1][1] == reason:
            self._blocks.insert(0, self._blocks.pop())
        self._blocked.update(narrowed(ids)[0].unique().tolist())

    def all_blocked(self, ids: Tensor) -> bool:
        """Whether every channel here was itself blocked already (ties not counted)."""
        seen = narrowed(ids)[0].unique().tolist()
        return all(number == 0 or number in self._blocked for number in seen)

    def mark(self, ids: Tensor, what: str) -> None:
        """Remember that these channels went through something."""
        self._note(self._marks, ids, what)

    def _note(self, notes: list[tuple[Numbers, str]], ids: Tensor, text: str) -> None:
        seen = narrowed(ids)[0].unique()
        seen = seen[seen != 0]
        if len(seen):
            notes.append((seen.numpy(), text))

    def join(self, ids: Tensor) -> None:
        """Remember that what goes through treats each row [..., channels] alike (a value head)."""
        seen = narrowed(ids)[0]
        self.rows.append(seen.reshape(-1, seen.shape[-1]).unique(dim=0).numpy())

    def solve(self, more: Sequence[Numbers] = ()) -> Classes:
        """Which channels are one. more: pairs [2, n] that are one besides."""
        roots = _components(self.count, [*self._pairs, *more])
        return Classes(roots, _first(roots, self._blocks), _all(roots, self._marks))


@dataclass(frozen=True)
class Classes:
    """roots [channels]: the least number of each channel's class. reasons: why a class is blocked.

    marks: what each class went through.
    """

    roots: Numbers
    reasons: dict[int, str]
    marks: dict[int, set[str]]


def _components(count: int, pairs: list[Numbers]) -> Numbers:
    """The least member of each connected component: hooking and pointer jumping."""
    roots = np.arange(count, dtype=np.int64)
    if not pairs:
        return roots
    a, b = np.concatenate(pairs, axis=1)
    while True:
        first, second = roots[a], roots[b]
        apart = first != second
        if not apart.any():
            return roots
        a, b, first, second = a[apart], b[apart], first[apart], second[apart]
        least = np.minimum(first, second)
        np.minimum.at(roots, np.maximum(first, second), least)
        while True:
            jumped = roots[roots]
            if np.array_equal(jumped, roots):
                break
            roots = jumped


def _first(roots: Numbers, notes: list[tuple[Numbers, str]]) -> dict[int, str]:
    found: dict[int, str] = {}
    for ids, text in notes:
        for root in np.unique(roots[ids]).tolist():
            found.setdefault(root, text)
    return found


def _all(roots: Numbers, notes: list[tuple[Numbers, str]]) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for ids, text in notes:
        for root in np.unique(roots[ids]).tolist():
            found.setdefault(root, set()).add(text)
    return found
