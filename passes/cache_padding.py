"""Explicit masks of cached attention: that they hide the text to come, and their last columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..ir.pattern import bound_arguments
from ..ir.positional import Positional, free_sizes, free_symbols, size_at
from ..ir.program import Node
from .mask_choice import HIDES

_LENGTHS = (2, 3, 5, 8, 13)


def hides_future(positional: Positional, attention: Node, length: Any) -> bool:
    """Whether the explicit mask, at several lengths and without padding, hides every later key."""
    mask = bound_arguments(attention)["mask"]
    if not isinstance(mask, fx.Node) or mask not in positional.nodes:
        return False
    computed = [mask_at(positional, mask, length, places) for places in _LENGTHS]
    shown = [value for value in computed if value is not None]
    return len(shown) >= 3 and not any(bool(_visible(v).triu(1).any()) for v in shown)


def mask_at(positional: Positional, node: Node, length: Any, places: int) -> Tensor | None:
    """A place value of a text of so many places, nothing padded; None where it has no such form."""
    sizes: dict[Any, int] = {}
    for symbol, (least, _, _) in free_sizes(positional.program).items():
        sizes[symbol] = places if symbol in free_symbols(length) else least
    given: dict[Node, Any] = {}
    for source in positional.inputs:
        value = source.meta["val"]
        given[source] = torch.ones([size_at(s, sizes) for s in value.shape], dtype=value.dtype)
    try:
        return positional.evaluate(node, sizes, given)
    except (RuntimeError, IndexError, LookupError):
        return None


def _visible(mask: Tensor) -> Tensor:
    visible = mask if mask.dtype == torch.bool else mask > HIDES
    if visible.dim() < 2 or visible.shape[-2] == 1:
        return torch.ones(2, 2, dtype=torch.bool)
    return visible
