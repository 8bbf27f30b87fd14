"""Channels that cover others: one number that several elements share, which have their own.

A norm's weight of one entry per head channel is read by every head; a key head by several query
heads; a head is all its channels. Where channels are cut such are not one: those that share (the
fine ones) may go alone, and what they share (the coarse one) goes exactly when all of one family
go, or is taken away with all of them. `Channels.covers` holds pairs [2, n] of (coarse, fine); the
pairs of one entry with the same coarse channel are a family.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from .axes_channels import Channels, Classes, Numbers, constant_along, narrowed


def cover(channels: Channels, coarse: Tensor, fine: Tensor) -> None:
    """Each coarse channel here covers the fine channels at its places (0: nobody)."""
    coarse, fine = narrowed(*torch.broadcast_tensors(coarse, fine))
    both = (coarse != 0) & (fine != 0)
    if bool(both.any()):
        pairs = torch.stack((coarse[both], fine[both])).unique(dim=1)
        channels.covers.append(pairs.numpy())


def meet(channels: Channels, a: Tensor, b: Tensor) -> Tensor:
    """Two values meet element by element: the channels of the result, of the broadcast shape.

    One-to-one partners are tied. Where several channels of one meet the same channel of the other,
    that one covers them; where both sides are shared, each pair has a channel of its own.
    """
    a, b = torch.broadcast_tensors(a, b)
    x, y = narrowed(a, b)
    both = (x != 0) & (y != 0)
    if not bool(both.any()) or torch.equal(x, y):
        return torch.where(x != 0, x, y).expand(a.shape)
    keys, inverse = (x[both] * channels.count + y[both]).unique(return_inverse=True)
    first, second = keys // channels.count, keys % channels.count
    if len(keys) == len(first.unique()) == len(second.unique()):
        channels.tie(first, second)
        finer = x
    elif len(keys) == len(first.unique()):
        channels.covers.append(torch.stack((second, first)).numpy())
        finer = x
    elif len(keys) == len(second.unique()):
        channels.covers.append(torch.stack((first, second)).numpy())
        finer = y
    else:
        own = channels.new(len(keys))
        for coarse in (first, second):
            pairs = torch.stack((coarse, own)).numpy()
            channels.covers.append(pairs)
            _remember(channels, pairs)
        finer = torch.zeros_like(x).masked_scatter(both, own[inverse])
    return torch.where(both, finer, x + y).expand(a.shape)


def _remember(channels: Channels, pairs: Numbers) -> None:
    """So that a sum over a family is the channel that covers it."""
    coarse, fine = np.unique(pairs, axis=1)
    starts = np.flatnonzero(np.diff(coarse, prepend=-1))
    for number, members in zip(coarse[starts], np.split(fine, starts[1:]), strict=True):
        channels.known.setdefault(members.tobytes(), int(number))


def rows_of(channels: Channels, ids: Tensor) -> Tensor:
    """[..., channels] -> [...]: a channel for each different row, which covers what is in it.

    A row in which anything has no channel has none, since it is never wholly gone.
    """
    seen = narrowed(ids)[0]
    seen = seen.expand(*seen.shape[:-1], ids.shape[-1])
    rows, inverse = seen.reshape(-1, seen.shape[-1]).unique(dim=0, return_inverse=True)
    known = [channels.known.get(row.unique().numpy().tobytes(), 0) for row in rows]
    own = torch.tensor(known, dtype=torch.int64)
    new = (own == 0) & (rows != 0).all(-1)
    own = own.masked_scatter(new, channels.new(int(new.sum())))
    cover(channels, torch.where(new, own, 0).unsqueeze(-1), rows)
    for row, number in zip(rows[new], own[new].tolist(), strict=True):
        channels.known[row.unique().numpy().tobytes()] = number
    return own[inverse].reshape(seen.shape[:-1]).expand(ids.shape[:-1])


def alike(ids: Tensor) -> bool:
    """Whether all rows [..., channels] are one."""
    return all(constant_along(ids, axis) for axis in range(ids.dim() - 1))


def copies(channels: Channels, ids: Tensor, axis: int, places: Tensor) -> Tensor:
    """A value repeated along an axis: its copies have channels of their own, which it covers.

    places: int64 [size of the axis], which copy stands there.
    """
    shape = [1] * ids.dim()
    shape[axis] = -1
    seen, where = narrowed(*torch.broadcast_tensors(ids, places.reshape(shape)))
    count = int(places.max()) + 1
    keys, inverse = (seen * count + where).unique(return_inverse=True)
    source = keys // count
    own = torch.where(source != 0, channels.new(len(keys)), 0)
    cover(channels, source, own)
    return own[inverse].reshape(seen.shape).expand(ids.shape)


class Covers:
    """Families of classes: what goes when all of a family goes, and what goes with it.

    families: (the class that covers, the classes that it covers).
    """

    def __init__(self, families: Iterable[tuple[int, tuple[int, ...]]] = ()) -> None:
        self.families = tuple(families)
        self._of: dict[int, list[int]] = {}
        self._by: dict[int, list[int]] = {}
        for place, (coarse, members) in enumerate(self.families):
            self._by.setdefault(coarse, []).append(place)
            for member in members:
                self._of.setdefault(member, []).append(place)

    def closure(self, dead: Iterable[int]) -> frozenset[int]:
        """All classes that go when these go, without 0."""
        gone = set[int]()
        new = {int(root) for root in dead} - {0}
        left: dict[int, int] = {}
        while new:
            root = new.pop()
            gone.add(root)
            for place in self._of.get(root, ()):
                coarse, members = self.families[place]
                left[place] = left.get(place, len(members)) - 1
                if left[place] == 0 and coarse not in gone:
                    new.add(coarse)
            for place in self._by.get(root, ()):
                new.update(set(self.families[place][1]) - gone)
        return frozenset(gone)


def settle(channels: Channels) -> tuple[Classes, Covers]:
    """Which channels are one, and which classes cover which.

    A class that covers one other is that one; two that cover the same ones are one.
    """
    covers = [*channels.covers, *(np.concatenate(p, axis=1) for p in channels.pools.values())]
    ties: list[Numbers] = []
    while True:
        classes = channels.solve(ties)
        found: dict[tuple[int, ...], int] = {}
        families: dict[tuple[int, tuple[int, ...]], None] = {}
        more: list[tuple[int, int]] = []
        for root, members in _families(classes.roots, covers):
            other = members[0] if len(members) == 1 else found.setdefault(members, root)
            if other != root:
                more.append((root, other))
            elif len(members) > 1:
                families[root, members] = None
        if not more:
            return classes, Covers(families)
        ties.append(np.array(more, dtype=np.int64).T)


def _families(roots: Numbers, covers: list[Numbers]) -> Iterable[tuple[int, tuple[int, ...]]]:
    """(coarse class, the classes that it covers, sorted) of each call."""
    for pairs in covers:
        coarse, fine = np.unique(roots[pairs], axis=1)
        starts = np.flatnonzero(np.diff(coarse, prepend=-1))
        for root, members in zip(coarse[starts], np.split(fine, starts[1:]), strict=True):
            yield int(root), tuple(members.tolist())


__all__ = ["Covers", "alike", "copies", "cover", "meet", "rows_of", "settle"]
