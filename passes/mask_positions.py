"""Say what the positional part of a mask is: causal, a window, both, or neither (and why).

A mask seen at some queries and keys is compared, element by element, with the formula of a causal
or windowed mask at the same places. Where the places are not all, the last key inside a window and
the first one outside of it must both be among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """visible: bool[queries, keys]; the places of these queries and keys, counted from key 0.

    The last query of a text sits at its last key.
    """

    queries: Tensor
    keys: Tensor
    visible: Tensor


@dataclass(frozen=True)
class Form:
    """What a mask was recognized as; fault: the sentence why it is neither causal nor a window."""

    causal: bool = False
    window: int = 0
    fault: str = ""


def whole(visible: Tensor) -> Seen:
    """A mask [queries, keys] seen at every place."""
    queries, keys = visible.shape
    return Seen(torch.arange(queries) + (keys - queries), torch.arange(keys), visible)


def formula(queries: Tensor, keys: Tensor, causal: bool, window: int) -> Tensor:
    """bool[queries, keys], True where the query at one place sees the key at another."""
    last, key = queries[:, None], keys[None, :]
    visible = key <= last if causal else torch.ones(len(last), len(keys), dtype=torch.bool)
    return visible & (key > last - window) if window else visible


def recognize(seen: Sequence[Seen]) -> Form:
    """The form that masks at several lengths have in common."""
    far = max((_greatest_distance(s) for s in seen), default=-1) + 1
    guesses = [(False, 0), (True, 0)]
    if far > 0 and any(_holds_distance(s, far) for s in seen):
        guesses += [(True, far), (False, far)]
    for causal, window in guesses:
        if all(torch.equal(s.visible, formula(s.queries, s.keys, causal, window)) for s in seen):
            return Form(causal, window)
    ordered = sorted(seen, key=lambda s: s.visible.numel())
    return Form(fault=_two_sided(ordered) or _blocks(ordered) or _difference(ordered))


def _distances(seen: Seen) -> Tensor:
    """int64[queries, keys]: how far each key lies behind each query."""
    return seen.queries[:, None] - seen.keys[None, :]


def _greatest_distance(seen: Seen) -> int:
    behind = _distances(seen)[seen.visible]
    return int(behind.max()) if behind.numel() else -1


def _holds_distance(seen: Seen, distance: int) -> bool:
    return bool((_distances(seen) == distance).any())


_EXPLICIT = "its positional part is neither causal nor a window"


def _two_sided(seen: Sequence[Seen]) -> str:
    """The sentence for a window that reaches to both sides; "" if it is none."""
    behind = max(_greatest_distance(s) for s in seen)
    ahead = max(
        (int((-_distances(s)[s.visible]).max()) for s in seen if s.visible.any()), default=0
    )
    for s in seen:
        distance = _distances(s)
        if not torch.equal(s.visible, (distance <= behind) & (-distance <= ahead)):
            return ""
    if ahead <= 0 or behind < 0:
        return ""
    bounded = any(_holds_distance(s, behind + 1) for s in seen)
    back = f"{behind} keys" if bounded else "all keys"
    return f"{_EXPLICIT} behind a query: it sees {back} back and {ahead} ahead"


def _blocks(seen: Sequence[Seen]) -> str:
    """The sentence for causal attention inside blocks of one length; "" if it is none."""
    size = max(_greatest_distance(s) for s in seen) + 1
    for s in seen if size > 0 else ():
        same = s.queries[:, None] // size == s.keys[None, :] // size
        if not torch.equal(s.visible, same & (_distances(s) >= 0)):
            return ""
    return f"{_EXPLICIT}: it is causal inside blocks of {size} keys" if size > 0 else ""


def _difference(seen: Sequence[Seen]) -> str:
    """Where the shortest mask that is not causal differs from a causal one."""
    for s in seen:
        wrong = (s.visible != formula(s.queries, s.keys, True, 0)).nonzero().tolist()
        if wrong:
            i, j = wrong[0]
            sees = "sees" if bool(s.visible[i, j]) else "does not see"
            return f"{_EXPLICIT}: query {int(s.queries[i])} {sees} key {int(s.keys[j])}"
    return _EXPLICIT
