"""Explicit masks of cached attention: that they hide the text to come, and their last columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..ir.positional import Positional, free_sizes, free_symbols, size_at
from ..ir.program import Node
from .mask_choice import HIDES

_LENGTHS = (2, 3, 5, 8, 13)


def hides_future(positional: Positional, mask: Any, length: Any) -> bool:
    """Whether an explicit mask, at several lengths and without padding, hides every later key."""
    if not isinstance(mask, fx.Node) or mask not in positional.nodes:
        return False
    computed = [place_value(positional, mask, length, places) for places in _LENGTHS]
    shown = [_visible(value) for value in computed if value is not None]
    square = [v for v in shown if v.dim() > 1 and v.shape[-2] == v.shape[-1]]
    return len(square) >= 3 and not any(bool(v.triu(1).any()) for v in square)


def counts_places(positional: Positional, mask: Node, length: Any) -> bool:
    """Whether the mask takes the inputs it is made of for numbers of places.

    A padding mask of ones shows what any other numbers show; numbers that do not rise from place
    to place hide keys where a mask tells texts apart by them.
    """
    ones, counted = (
        place_value(positional, mask, length, _LENGTHS[-1], rising) for rising in (False, True)
    )
    if ones is None or counted is None:
        return False
    return bool((_visible(counted) & ~_visible(ones)).any())


def place_value(
    positional: Positional, node: Node, length: Any, places: int, rising: bool = False
) -> Tensor | None:
    """A place value of a text of so many places; None where it has no such form.

    Inputs that it is made of are ones, or 1, 2, 3, ... along their last axis if `rising`.
    """
    sizes: dict[Any, int] = {}
    for symbol, (least, _, _) in free_sizes(positional.program).items():
        sizes[symbol] = places if symbol in free_symbols(length) else least
    given: dict[Node, Any] = {}
    for source in positional.inputs:
        form = [size_at(s, sizes) for s in source.meta["val"].shape]
        ones = torch.ones(form, dtype=source.meta["val"].dtype)
        given[source] = ones.cumsum(-1).to(ones.dtype) if rising and form else ones
    try:
        return positional.evaluate(node, sizes, given)
    except (RuntimeError, IndexError, LookupError):
        return None


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > HIDES
