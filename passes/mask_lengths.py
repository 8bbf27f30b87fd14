"""Compute the positional part of a mask at lengths of our choice.

At short lengths it is computed whole. A number in it (a window, a limit) asks for lengths on both
sides of that number, where whole masks are large; there it is computed at chosen places only, which
is the same restriction of every value as long as each element of a value that has both axes,
queries and keys, follows from its own place. Values with one such axis are computed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.edit import same_shape
from ..ir.positional import Positional, Sizes, blank, free_sizes, free_symbols, is_size, size_at
from ..ir.program import Node, Program
from .mask_positions import Form, Seen, recognize, whole

aten = torch.ops.aten

SHORT = (2, 3, 5, 8, 13)
_WHOLE = 4096
"""The greatest length at which a mask is computed whole."""
_FARTHEST = 2**21
"""The greatest number in a mask (a window) around which places are tried."""
_NEAR = 3
"""Places on each side of a number that are tried."""

Evaluate = Callable[[Sizes, dict[Node, Any], tuple[int, int]], Tensor]
"""(sizes, known values, (queries, keys)) to the visible [queries, keys]; ValueError with a
sentence where the positional part does more than hide keys."""

_ELEMENTWISE = (
    aten.unsqueeze.default,
    aten.transpose.int,
    aten.expand.default,
    aten.clone.default,
    aten.alias.default,
    aten._to_copy.default,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
    aten.masked_fill.Tensor,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.floor_divide.default,
)
_CONSTANT = (
    aten.full.default,
    aten.full_like.default,
    aten.new_full.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
)


class CannotSample(Exception):
    """A value with both axes does not follow from each place alone."""


@dataclass(frozen=True)
class Problem:
    """roots: what is done to the scores. known: values that are given, with what they hold.

    queries, keys: the lengths (int or SymInt).
    """

    roots: tuple[Node, ...]
    known: dict[Node, Any]
    queries: Any
    keys: Any
    evaluate: Evaluate


class MaskLengths:
    """Recognizes masks of one program by computing them."""

    def __init__(self, program: Program, positional: Positional) -> None:
        self.program = program
        self.positional = positional
        self.free = free_sizes(program)

    def form(self, problem: Problem) -> Form:
        """Causal, windowed, or the sentence why it is neither."""
        fixed = isinstance(problem.queries, int) and isinstance(problem.keys, int)
        numbers = set[int]() if fixed else self._numbers(problem)
        try:
            seen = self._whole(problem, SHORT)
            if len(seen) < (1 if fixed else 4):
                return Form(fault="it cannot be computed at four lengths")
            far = [n for n in numbers if n > SHORT[-1] - 2]
            more = self._far(problem, far) if far else []
        except ValueError as error:
            return Form(fault=str(error))
        if more is None:
            return Form(fault=f"its constant {max(numbers)} is too long to try lengths around it")
        return recognize([*seen, *more])

    def _far(self, problem: Problem, numbers: Sequence[int]) -> list[Seen] | None:
        """The mask on both sides of numbers, at chosen places or else whole; None if too long."""
        try:
            return [self._sampled(problem, numbers)]
        except CannotSample:
            pass
        bound = max(numbers)
        if bound > _WHOLE:
            return None
        lengths = [bound - 1, bound, bound + 1] + ([2 * bound + 3] if bound <= _WHOLE // 2 else [])
        return self._whole(problem, lengths)

    def _whole(self, problem: Problem, lengths: Iterable[int]) -> list[Seen]:
        found: dict[tuple[int, int], Seen] = {}
        for sizes in self.sizes(lengths, self._moving(problem)):
            form = (size_at(problem.queries, sizes), size_at(problem.keys, sizes))
            given: dict[Node, Any] = {n: blank(n, sizes, v) for n, v in problem.known.items()}
            try:
                found[form] = whole(problem.evaluate(sizes, given, form))
            except (RuntimeError, IndexError, LookupError):
                continue
        return list(found.values())

    def _moving(self, problem: Problem) -> frozenset[Any]:
        return frozenset(s for size in (problem.queries, problem.keys) for s in free_symbols(size))

    def sizes(
        self, lengths: Iterable[int], moving: frozenset[Any] = frozenset()
    ) -> Iterator[dict[Any, int]]:
        """Sizes for every free symbol: lengths that differ, in both orders; small batches.

        moving: symbols that are lengths, whatever they are in the inputs.
        """
        for turn, length in enumerate(lengths):
            symbols = sorted(self.free, key=str, reverse=bool(turn % 2))
            sizes: dict[Any, int] = {}
            for place, symbol in enumerate(symbols):
                least, greatest, positions = self.free[symbol]
                longer = length - 2 + 3 * place if positions or symbol in moving else 0
                sizes[symbol] = min(least + longer, greatest)
            yield sizes

    def _sampled(self, problem: Problem, numbers: Sequence[int]) -> Seen:
        """The mask of one text with as many queries as keys, at places around the numbers."""
        length = _length(problem)
        places = _places(numbers)
        least, greatest, _ = self.free.get(length, (2, 0, True))
        true = {s: bounds[0] for s, bounds in self.free.items()}
        true[length] = min(places[-1] + 2, greatest)
        places = [p for p in places if p < true[length]]
        if max(numbers) >= true[length] or least > true[length] or max(numbers) > _FARTHEST:
            raise CannotSample
        few = {**true, length: len(places)}
        at = torch.tensor(places)
        given: dict[Node, Any] = {n: blank(n, few, v) for n, v in problem.known.items()}
        given |= self._narrow(problem, length, true, at)
        try:
            return Seen(at, at, problem.evaluate(few, given, (len(places), len(places))))
        except (RuntimeError, IndexError, LookupError) as error:
            raise CannotSample from error

    def _narrow(self, problem: Problem, length: Any, true: Sizes, at: Tensor) -> dict[Node, Tensor]:
        """The values with one axis that those with both axes are made of, at the places."""
        known = [n for n in problem.known if len(_axes(n, length)) < 2]
        computed: dict[Node, Any] = {n: blank(n, true, problem.known[n]) for n in known}
        found: dict[Node, Tensor] = {}
        todo, passed = list(problem.roots), set(problem.known)
        while todo:
            node = todo.pop()
            if node in passed or is_size(node.meta.get("val")):
                continue
            passed.add(node)
            axes = _axes(node, length)
            if len(axes) > 1:
                todo += _read_in_place(node)
                continue
            try:
                value: Tensor = self.positional.evaluate(node, true, computed)
            except (RuntimeError, IndexError, LookupError) as error:
                raise CannotSample from error
            if axes and value.shape[axes[0]] != true[length]:
                raise CannotSample
            found[node] = value.index_select(axes[0], at) if axes else value
        if any(n.op == "get_attr" and n.meta["val"].numel() > 1 for n in computed):
            raise CannotSample  # a stored table can hold anything at the other places
        return found

    def _numbers(self, problem: Problem) -> set[int]:
        """The whole numbers in the arithmetic, and the lengths of the tables that it reads."""
        found, todo, passed = set[int](), list(problem.roots), set[Node](problem.known)
        while todo:
            node = todo.pop()
            if node in passed or node not in self.positional.nodes:
                continue
            passed.add(node)
            todo += node.all_input_nodes
            if node.op == "get_attr":
                found |= self._of_table(self.program.weights[str(node.target)])
            elif not _fills(node):
                found |= {abs(int(a)) for a in node.args if _is_number(a)}  # type: ignore[arg-type]
        return found

    def _of_table(self, table: Tensor) -> set[int]:
        if table.numel() > 1:
            return set(table.shape)
        value = float(table)
        return {abs(int(value))} if abs(value) < _ENDLESS else set()


_ENDLESS = 2**40
"""Numbers above are ends of slices and lowest numbers, no places."""


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) < _ENDLESS


def _fills(node: Node) -> bool:
    """Whether the node's numbers are no places: of floating values, for example -10000."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _length(problem: Problem) -> Any:
    """The one symbol that queries and keys are as many as."""
    symbols = free_symbols(problem.queries) | free_symbols(problem.keys)
    if len(symbols) != 1 or str(problem.queries) != str(problem.keys):
        raise CannotSample
    (symbol,) = symbols
    if str(problem.queries) != str(symbol):
        raise CannotSample
    return symbol


def _places(numbers: Sequence[int]) -> list[int]:
    """0, 1, 2 .. and the neighbours of every number, of its double and of sums of two."""
    centers = {a + b for a in (0, *numbers) for b in (0, *numbers)}
    near = {c + d for c in centers for d in range(-_NEAR, _NEAR + 1)}
    return sorted({*range(SHORT[-1]), *(p for p in near if p >= 0)})


def _axes(node: Node, length: Any) -> list[int]:
    """The axes that grow with the length."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise CannotSample
    return [i for i, size in enumerate(value.shape) if length in free_symbols(size)]


def _read_in_place(node: Node) -> list[Node]:
    """What the node reads, if every element follows from its own place in it; else raises."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        raise CannotSample
    if target is aten.slice.Tensor and same_shape(node, node.args[0]):  # type: ignore[arg-type]
        return [node.args[0]]  # type: ignore[list-item]
    if any(isinstance(a, fx.Node) and is_size(a.meta.get("val")) for a in node.args):
        raise CannotSample
    if target in _CONSTANT:
        return []
    if target not in _ELEMENTWISE and torch.Tag.pointwise not in target.tags:
        raise CannotSample
    return node.all_input_nodes
