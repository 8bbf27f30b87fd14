"""Find biases that were trained apart (BitFit: Ben Zaken et al. 2022, sec. 2) and added afterwards.

y = (W x + b) + d with vectors b and d: the product has a bias already, and a weight of one number a
channel is added to it, perhaps behind a change of layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import fx

from ..ir.program import Node
from .find_adapter_branch import Finder, Region
from .linear_steps import Step


def added_biases(finder: Finder, taken: Iterable[Node]) -> list[Region]:
    """A region for each sum of a product and vectors; none that has a node of `taken`."""
    used = set(taken)
    sums = [node for node, step in finder.steps.items() if step.kind == "sum"]
    found = [_region(finder, node) for node in sums]
    return [r for r in found if r is not None and not used & {*r.steps, *r.sums}]


def _region(finder: Finder, node: Node) -> Region | None:
    if len(finder.steps[node].reads) > 1 or any(_only_adds(finder, user) for user in node.users):
        return None  # the last of several sums takes all
    terms, constants, sums = finder.flatten(node)
    if len(terms) != 1 or not all(_vector(value, node) for value, _ in constants):
        return None
    steps: dict[Node, Step] = {}
    value = terms[0][0]
    while value in finder.steps and len(value.users) == 1:
        step = steps[value] = finder.steps[value]
        value = step.reads[0][0]
        if step.kind == "product" and step.bias:
            ordered = dict(sorted(steps.items(), key=lambda pair: finder.order[pair[0]]))
            return Region(node, tuple(terms), value, ordered, (), tuple(constants), sums)
        if step.kind != "layout":
            return None
    return None


def _only_adds(finder: Finder, node: Node) -> bool:
    step = finder.steps.get(node)
    return step is not None and step.kind == "sum" and len(step.reads) == 1


def _vector(value: Any, node: Node) -> bool:
    """Whether a constant is a weight of one number for each channel."""
    if not isinstance(value, fx.Node):
        return False
    sizes = value.meta["val"].shape
    return bool(sizes) and math.prod(sizes) == sizes[-1] == node.meta["val"].shape[-1]


__all__ = ["added_biases"]
