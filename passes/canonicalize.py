"""Canonicalize: one spelling for each meaning, and no operation that does nothing.

Before: `%s = slice(%x, 0, 0, 9223372036854775807); %c = clone(%s); %v = _unsafe_view(%c, [6, -1])`.
After: `%v = reshape(%x, [6, 4])`.

The same function: an operation that returns its argument is taken out, another spelling computes
the same values. Memory layout is not part of a functional program's meaning, so copies made only
for their layout go; a kernel may then add its terms in another order, hence BOUNDED.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_arg

from ..ir.edit import Editor, fake_mode, infer
from ..ir.interpret import is_assertion
from ..ir.program import Node, Program
from ..ir.rewrite import Journal
from .canonical_values import COPIES, VALUE_RULES
from .canonical_views import VIEW_RULES
from .contract import Context, Pass, contract
from .spelling import Known, Outcome, Same, Spelled

RULES: dict[Any, Callable[[Node], Outcome]] = {**VIEW_RULES, **VALUE_RULES}
"""What each operator may become."""

_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Spell every meaning one way: reshape for views, no no-ops, copies or assertions."""

    contract = contract("bounded", requires=["functional"], ensures=["canonical"])

    def run(self, program: Program, context: Context) -> None:
        reader = _strided(program)
        if reader is not None:
            context.journal.declined(
                self.pass_name(), reader, "it reads memory by strides, so copies and views stay"
            )
        _Run(program, context.journal, self.pass_name(), reader is not None).all()


def _strided(program: Program) -> Node | None:
    """An operation whose value depends on the memory layout of what it reads."""
    layout: Any = (torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_scatter.default)
    return next((node for node in program.graph.nodes if node.target in layout), None)


class _Run:
    """One walk from inputs to outputs; each node sees arguments that are canonical already."""

    def __init__(self, program: Program, journal: Journal, name: str, keep_layout: bool) -> None:
        self.program, self.journal, self.name = program, journal, name
        self.mode = fake_mode(program.graph)
        self.sizes: dict[Any, Node] = {}
        self.stale: set[Node] = set()
        self.keep_layout = keep_layout
        self.rules = dict(RULES)
        if keep_layout:
            for target in (*_VIEWS, *COPIES):
                self.rules.pop(target)

    def all(self) -> None:
        if not self.keep_layout:
            self._free_views()
        for node in list(self.program.graph.nodes):
            if node.op == "call_function":
                self.visit(node)
        Editor(self.program).sweep()

    def _free_views(self) -> None:
        """A view that may copy never fails, whichever copies above it are taken out or left.

        Not numbered: leaving one of these out, as a bisection does, would break the others.
        """
        for node in self.program.graph.nodes:
            if node.op == "call_function" and node.target in _VIEWS:
                node.target = torch.ops.aten.reshape.default

    def visit(self, node: Node) -> None:
        if is_assertion(node):
            if not node.users and self.journal.offers():
                self.journal.noted(self.name, node)
                self.program.graph.erase_node(node)
            return
        offered = False
        while (outcome := self._outcome(node)) is not None:
            if not offered and not self.journal.offers():
                break
            if not isinstance(outcome, Spelled):
                self._forward(node, outcome)
                return
            self._respell(node, outcome)
            if not offered:
                self.journal.noted(self.name, node)
            offered = True
        self._refresh(node)

    def _outcome(self, node: Node) -> Outcome:
        """What changes, or None."""
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            first = self.sizes.setdefault(value.node.expr, node)
            return None if first is node else Same(first)
        target: Any = node.target
        if node.kwargs and isinstance(target, torch._ops.OpOverload):
            positional = _positional(node, target)
            if positional is not None:
                return positional
        rule = self.rules.get(target)
        outcome = rule(node) if rule is not None else None
        return None if isinstance(outcome, Spelled) and _spelled(node, outcome) else outcome

    def _forward(self, node: Node, outcome: Same | Known) -> None:
        """Readers of a node read the value that it is."""
        if isinstance(outcome, Known):
            self._write_number(node, outcome.value)
            self.journal.noted(self.name, node, f"is {outcome.value}")
            return
        if not _same_strides(node.meta.get("val"), outcome.node.meta.get("val")):
            self.stale.update(node.users)
        node.replace_all_uses_with(outcome.node)
        self.journal.replaced(self.name, node, outcome.node)
        self.program.graph.erase_node(node)

    def _write_number(self, node: Node, value: int) -> None:
        for user in list(node.users):
            user.args = map_arg(user.args, lambda n: value if n is node else n)
            user.kwargs = map_arg(user.kwargs, lambda n: value if n is node else n)

    def _respell(self, node: Node, spelled: Spelled) -> None:
        before = node.args
        node.target, node.args, node.kwargs = spelled.target, spelled.args, spelled.kwargs
        if before and before[0] is not node.args[0]:
            self.stale.add(node)

    def _refresh(self, node: Node) -> None:
        """Keep the strides of `meta["val"]` true after a copy above went."""
        if node not in self.stale or not isinstance(node.meta.get("val"), Tensor):
            return
        self.stale.discard(node)
        before, after = node.meta["val"], infer(node, self.mode)
        if isinstance(after, Tensor) and after.shape == before.shape:
            node.meta["val"] = after
            if not _same_strides(before, after):
                self.stale.update(node.users)


def _same_strides(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and _texts(a) == _texts(b)


def _texts(value: Tensor) -> list[str]:
    """Strides for comparison: as text, so that symbolic ones add no guard."""
    return [str(stride) for stride in value.stride()]


def _positional(node: Node, target: torch._ops.OpOverload) -> Spelled | None:
    """Arguments by position where the operator's schema has them so."""
    args, kwargs = list(node.args), dict(node.kwargs)
    for argument in target._schema.arguments[len(args) :]:
        if argument.kwarg_only or argument.name not in kwargs:
            break
        args.append(kwargs.pop(argument.name))
    return Spelled(target, tuple(args), kwargs) if len(args) > len(node.args) else None


def _spelled(node: Node, outcome: Spelled) -> bool:
    """Whether a node is spelled so already."""
    now = (node.target, list(node.args), dict(node.kwargs))
    return now == (outcome.target, list(outcome.args), outcome.kwargs)
