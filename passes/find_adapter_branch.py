"""Find sums of branches that are linear in one value: a base product and the adapters beside it.

y = W x + s B (A x), in any spelling: each branch goes down from the sum by linear steps alone, and
all of them meet in one value x, before which nothing is shared. Then y = M x + c with one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..ir.program import Node
from .linear_steps import Step, read_step

_ATEN = torch.ops.aten
PRODUCTS = ("product", "lookup", "convolution")
_MOST_TERMS = 12
_MOST_STEPS = 96
Terms = tuple[tuple[Node, float], ...]


@dataclass(frozen=True)
class Region:
    """What may become one product.

    root: the sum, or the product and its scalings. terms: values and factors that are merged.
    others: values, or constants, of the same sum that are not. constants: added to the terms.
    source: x. steps: the linear operations between, in the graph's order.
    """

    root: Node
    terms: Terms
    source: Node
    steps: dict[Node, Step]
    others: tuple[tuple[Any, float], ...] = ()
    constants: tuple[tuple[Any, float], ...] = ()
    sums: frozenset[Node] = field(default=frozenset())

    @property
    def products(self) -> list[Node]:
        return [node for node, step in self.steps.items() if step.kind in PRODUCTS]

    @property
    def style(self) -> str:
        """ "convolution" or "product"."""
        kinds = {step.kind for step in self.steps.values()}
        return "convolution" if "convolution" in kinds else "product"

    def removed(self) -> set[Node]:
        """Nodes that nobody reads any more once the root is replaced."""
        gone = {self.root, *self.sums}
        for node in reversed(self.steps):
            if node in gone or all(user in gone for user in node.users):
                gone.add(node)
        return gone


class Finder:
    """The regions of one graph."""

    def __init__(self, graph: fx.Graph, constant: set[Node]) -> None:
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.steps = {n: s for n in graph.nodes if (s := read_step(n, constant)) is not None}
        self._join_reshapes(graph)

    def _join_reshapes(self, graph: fx.Graph) -> None:
        """Two reshapes of one value to the same last axis: the later is a layout of the first."""
        first: dict[tuple[Node, int], Node] = {}
        for node in graph.find_nodes(op="call_function", target=_ATEN.reshape.default):
            value, last = node.args[0], node.meta["val"].shape[-1:]
            if node not in self.steps and last and isinstance(last[0], int):
                earlier = first.setdefault((value, last[0]), node)
                if earlier is not node and node.meta["val"].is_floating_point():
                    self.steps[node] = Step("layout", ((earlier, 1.0),))

    def sums(self) -> list[Region]:
        """Sums of at least two products of one value, each as large as it goes."""
        found: dict[Node, Region] = {}
        for node, step in self.steps.items():
            if step.kind != "sum" or len(step.reads) < 2:
                continue
            for region in self._of_sum(node):
                smaller = [r for r in found if r in region.sums or r in region.steps]
                if region.others and any(found[r].terms == region.terms for r in smaller):
                    continue
                for root in smaller:
                    del found[root]
                found[node] = region
                break
        return list(found.values())

    def scalings(self, taken: Iterable[Node]) -> list[Region]:
        """Products of which the channels, going in or coming out, are scaled by a weight."""
        used = set(taken)
        found: list[Region] = []
        for node, step in self.steps.items():
            if step.kind not in ("product", "convolution") or node in used:
                continue
            region = self._scaled(node)
            if region is not None and not used & set(region.steps):
                found.append(region)
        return found

    def _of_sum(self, node: Node) -> list[Region]:
        terms, constants, sums = self.flatten(node)
        outer = [user for user in node.users if self.steps.get(user, _NONE).kind == "sum"]
        extends = len(node.users) == 1 and bool(outer)
        regions: list[Region] = []
        for group, source, steps in self._groups(terms):
            whole = len(group) == len(terms)
            if not whole and extends:
                continue
            chosen = tuple(terms[place] for place in group)
            rest = [term for place, term in enumerate(terms) if place not in group]
            others = () if whole else (*rest, *constants)
            inside = constants if whole else ()
            ordered = dict(sorted(steps.items(), key=lambda pair: self.order[pair[0]]))
            regions.append(
                Region(node, chosen, source, ordered, tuple(others), tuple(inside), sums)
            )
        return regions

    def flatten(
        self, root: Node
    ) -> tuple[list[tuple[Node, float]], list[tuple[Any, float]], frozenset[Node]]:
        """The addends of a sum of sums, its constants, and the sums in it."""
        terms: list[tuple[Node, float]] = []
        constants: list[tuple[Any, float]] = []
        sums = {root}

        def visit(node: Node, factor: float) -> None:
            step = self.steps[node]
            constants.extend((value, factor * sign) for value, sign in step.bias)
            for read, sign in step.reads:
                inner = self.steps.get(read)
                if inner is not None and inner.kind == "sum" and len(read.users) == 1:
                    sums.add(read)
                    visit(read, factor * sign)
                else:
                    terms.append((read, factor * sign))

        visit(root, 1.0)
        return terms, constants, frozenset(sums)

    def _groups(
        self, terms: Sequence[tuple[Node, float]]
    ) -> list[tuple[list[int], Node, dict[Node, Step]]]:
        """Places of terms that are linear in one value, the value, and the steps down to it."""
        if len(terms) > _MOST_TERMS:
            return []
        left = list(range(len(terms)))
        groups: list[tuple[list[int], Node, dict[Node, Step]]] = []
        while len(left) > 1:
            found = self._group(terms, left)
            if found is None:
                left = left[1:]
                continue
            groups.append(self._without_source(terms, *found))
            left = [place for place in left if place not in found[0]]
        return groups

    def _group(
        self, terms: Sequence[tuple[Node, float]], left: Sequence[int]
    ) -> tuple[list[int], tuple[Node, dict[Node, Step]]] | None:
        """All terms that are left, or the first of them with those that share its value."""

        def together(places: Sequence[int]) -> tuple[Node, dict[Node, Step]] | None:
            return self.common([terms[place][0] for place in places])

        best = together(left)
        if best is not None:
            return list(left), best
        for second in left[1:]:
            best = together((left[0], second))
            if best is None:
                continue
            group = [left[0], second]
            for place in left[1:]:
                found = together((*group, place)) if place != second else None
                if found is not None and found[0] is best[0]:
                    group, best = [*group, place], found
            return sorted(group), best
        return None

    def _without_source(
        self,
        terms: Sequence[tuple[Node, float]],
        group: list[int],
        best: tuple[Node, dict[Node, Step]],
    ) -> tuple[list[int], Node, dict[Node, Step]]:
        """A group that does well without x itself as one of its terms leaves it out."""
        inner = [place for place in group if terms[place][0] is not best[0]]
        if 2 <= len(inner) < len(group):
            found = self.common([terms[place][0] for place in inner])
            if found is not None and found[0] is best[0]:
                return inner, *found
        return group, *best

    def common(self, starts: Sequence[Node]) -> tuple[Node, dict[Node, Step]] | None:
        """The nearest value that all starts are linear in, through two products or more.

        The last value of those reached is taken apart until one is left: then every path goes
        through it. None where a value that is not linear is reached first.
        """
        frontier = set(starts)
        steps: dict[Node, Step] = {}
        products = 0
        while len(frontier) > 1 or products < 2:
            latest = max(frontier, key=lambda node: self.order[node])
            step = self.steps.get(latest)
            if step is None or len(steps) > _MOST_STEPS:
                return None
            frontier.discard(latest)
            if not frontier and latest in starts and len(starts) > 1:
                return None  # the other terms are computed from this one: it is x itself
            steps[latest] = step
            products += step.kind in PRODUCTS
            frontier.update(read for read, _ in step.reads)
        return frontier.pop(), steps

    def _scaled(self, product: Node) -> Region | None:
        steps = {product: self.steps[product]}
        source = product.args[0]
        root, scaled = product, False
        below = self._single_read(product)
        while below is not None and (self._by_weight(below) or self.steps[below].kind == "layout"):
            if self._by_weight(below) and self._normed(below):
                break
            steps[below] = self.steps[below]
            scaled = scaled or self._by_weight(below)
            below = self._single_read(below)
        source = self.steps[min(steps, key=lambda n: self.order[n])].reads[0][0]
        above = self._single_user(product)
        pending: dict[Node, Step] = {}
        while above is not None and (self._by_weight(above) or self.steps[above].kind == "layout"):
            pending[above] = self.steps[above]
            if self._by_weight(above):
                steps |= pending
                root, scaled, pending = above, True, {}
            above = self._single_user(above)
        if not scaled:
            return None
        ordered = dict(sorted(steps.items(), key=lambda pair: self.order[pair[0]]))
        return Region(root, ((root, 1.0),), source, ordered)

    def _single_read(self, node: Node) -> Node | None:
        read = self.steps[node].reads[0][0]
        return read if read in self.steps and len(read.users) == 1 else None

    def _single_user(self, node: Node) -> Node | None:
        user = next(iter(node.users)) if len(node.users) == 1 else None
        return user if user in self.steps else None

    def _by_weight(self, node: Node) -> bool:
        """Whether a step scales channels by a weight; by one number, it is no adapter's."""
        step = self.steps[node]
        if step.kind != "scale" or not isinstance(step.weight, fx.Node):
            return False
        return math.prod(step.weight.meta["val"].shape) > 1

    def _normed(self, node: Node) -> bool:
        """Whether what is scaled was divided by its own size: then the scaling is a norm's."""
        value: Any = self.steps[node].reads[0][0]
        while isinstance(value, fx.Node) and value.op == "call_function":
            spelled = value.target in (_ATEN.mul.Tensor, _ATEN.div.Tensor)
            looked = [value, *(value.all_input_nodes if spelled else [])]
            if any("norm" in _name(v) or "sqrt" in _name(v) for v in looked):
                return True
            if not spelled and value.target is not _ATEN._to_copy.default:
                return False
            value = value.args[0]
        return False


_NONE = Step("", ())


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
