"""Rules, the driver that applies them, and the journal that numbers and explains them.

A rule looks at one node and says Match, Decline (with a sentence) or nothing; the driver numbers
the matches, asks the journal whether to apply each, edits the graph and keeps the declines.
"""

from __future__ import annotations

import inspect
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .edit import Editor
from .errors import PatternError
from .history import Applied, Declined, Measured
from .pattern import Attempt, Expression, OpPattern, Wild, bound_arguments, match
from .program import Node, Program
from .text import value_names


@dataclass(frozen=True)
class Match:
    """A place where a rule fires. at: the node before which to build (default: the root)."""

    root: Node
    found: dict[str, Any] = field(default_factory=dict[str, Any])
    at: Node | None = None
    note: str = ""


@dataclass(frozen=True)
class Decline:
    """A candidate that is left alone, and one sentence why."""

    reason: str


class Rule(ABC):
    """One local rewrite. `kind` groups rules for `explain`, for example "rms_norm"."""

    name: str = ""
    kind: str = ""

    @abstractmethod
    def look(self, node: Node) -> Match | Decline | None:
        """Match, near miss, or None where the node is no candidate at all."""

    @abstractmethod
    def build(self, found: Match, editor: Editor) -> Node | dict[Node, Node]:
        """Emit the replacement of the root, or of several values {old: new}."""


class Journal:
    """Numbers the rewrites of one pass run, decides which to apply, and remembers them.

    limit: apply only rewrites numbered up to it. skip: numbers to leave out.
    """

    def __init__(
        self, program: Program, limit: int | None = None, skip: Iterable[int] = ()
    ) -> None:
        self.limit, self.skip = limit, frozenset(skip)
        self.count = 0
        self.touched: list[tuple[int, str, str]] = []
        self.changed_weights: list[tuple[int, str]] = []
        self.measured: list[Measured] = []
        self._names = {node.name: name for node, name in value_names(program.graph).items()}
        self._applied: list[tuple[int, str, str, str, str, str]] = []
        self._declined: list[Declined] = []

    def offers(self) -> bool:
        """Number the next rewrite; True if it is to be applied."""
        self.count += 1
        return (self.limit is None or self.count <= self.limit) and self.count not in self.skip

    def replaced(self, rule: str, old: Node, new: Node, note: str = "") -> None:
        """The current rewrite made `new` take the place of `old`."""
        self.touched.append((self.count, old.name, new.name))
        module = old.meta.get("module", "")
        self._applied.append((self.count, rule, old.name, new.name, module, note))

    def changed_weight(self, rule: str, name: str, note: str = "") -> None:
        """The current rewrite changed a weight's entry."""
        self.changed_weights.append((self.count, name))
        self._applied.append((self.count, rule, name, name, name.rpartition(".")[0], note))

    def noted(self, rule: str, value: Node, note: str = "") -> None:
        """The current rewrite changed no value that can be compared (it removed `value`)."""
        module = value.meta.get("module", "")
        self._applied.append((self.count, rule, value.name, value.name, module, note))

    def declined(self, rule: str, value: Node | str, reason: str) -> None:
        if isinstance(value, str):
            entry = Declined(rule, value, value.rpartition(".")[0], reason)
        else:
            name = self._names.get(value.name, value.name)
            entry = Declined(rule, name, value.meta.get("module", ""), reason)
        self._declined.append(entry)

    def applied_records(self, outgoing: Program) -> list[Applied]:
        """The rewrites in order, with readable names of both sides."""
        after = {node.name: name for node, name in value_names(outgoing.graph).items()}
        return [
            Applied(
                number,
                rule,
                self._names.get(old, old),
                after.get(new, self._names.get(new, new)),
                module,
                note,
            )
            for number, rule, old, new, module, note in self._applied
        ]

    def declined_records(self) -> list[Declined]:
        return list(self._declined)

    def final_pairs(self) -> list[tuple[int, str, str]]:
        """(number, value before the pass, value after it), chains of rewrites followed.

        A value that a rewrite made and a later one replaced stands for nothing before the pass: its
        pair is that of the value at the start of the chain.
        """
        successor = {old: new for _, old, new in self.touched if old != new}
        pairs: list[tuple[int, str, str]] = []
        for number, old, new in self.touched:
            if old not in self._names:
                continue
            passed = {old}
            while new in successor and new not in passed:
                passed.add(new)
                new = successor[new]
            pairs.append((number, old, new))
        return pairs


def apply_rules(program: Program, rules: Sequence[Rule], journal: Journal) -> None:
    """Offer every node to the rules, in order; the first that matches rewrites it."""
    editor = Editor(program)
    for node in list(program.graph.nodes):
        if node.op != "call_function" or node._erased:
            continue
        for rule in rules:
            found = rule.look(node)
            if isinstance(found, Decline):
                journal.declined(rule.name, node, found.reason)
            elif found is not None:
                if journal.offers():
                    apply_match(rule, found, editor, journal)
                break
    editor.sweep()


def apply_match(rule: Rule, found: Match, editor: Editor, journal: Journal) -> None:
    """Build one replacement and put it in place."""
    root = found.root
    with editor.at(found.at or root, root.meta.get("module", "")):
        built = rule.build(found, editor)
    for old, new in ({root: built} if isinstance(built, fx.Node) else built).items():
        editor.replace(old, new)
        journal.replaced(rule.name, old, new, found.note)


class Rewrite(Rule):
    """A rule written as a pattern function, conditions (`unless`) and a replacement (`to`)."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = self.kind = function.__name__
        self.__doc__ = function.__doc__
        wilds = {name: Wild(name, kinds) for name, kinds in _kinds(function).items()}
        pattern = function(**wilds)
        if not isinstance(pattern, OpPattern):
            raise PatternError(
                f"the pattern of {self.name} is not an operation",
                expected="a function that returns op.something(...) or arithmetic on its arguments",
                found=type(pattern).__name__,
            )
        self.pattern: OpPattern = pattern
        self.conditions: list[Callable[..., str | None]] = []
        self.builder: Callable[..., Node] | None = None

    def unless(self, condition: Callable[..., str | None]) -> Callable[..., str | None]:
        """Add a condition: returns None to go on, or the sentence why not."""
        self.conditions.append(condition)
        return condition

    def to(self, builder: Callable[..., Node]) -> Rewrite:
        """Set the replacement; its parameters are the pattern's (`root` is the matched node)."""
        self.builder = builder
        return self

    def look(self, node: Node) -> Match | Decline | None:
        if getattr(node.target, "overloadpacket", None) is not self.pattern.packet:
            return None
        attempt = Attempt()
        reason = ""
        for bindings in match(self.pattern, node, {}, attempt):
            bindings = {**bindings, "root": node}
            reason = self._objection(bindings)
            if not reason:
                return Match(node, bindings)
        if reason:
            return Decline(reason)
        return Decline(attempt.reason) if attempt.deepest > 1 else None

    def _objection(self, bindings: dict[str, Any]) -> str:
        for condition in self.conditions:
            reason = condition(**_wanted(condition, bindings))
            if reason:
                return reason
        return ""

    def build(self, found: Match, editor: Editor) -> Node:
        if self.builder is None:
            raise PatternError(f"rewrite {self.name} has no replacement", fix="add @NAME.to")
        return self.builder(**_wanted(self.builder, found.found))


def rewrite(function: Callable[..., Any]) -> Rewrite:
    """Decorator: the function's body is the pattern, its parameters what it binds.

    Annotate a parameter with Node (the default), float, int or a union of them.
    """
    return Rewrite(function)


def _wanted(function: Callable[..., Any], bindings: dict[str, Any]) -> dict[str, Any]:
    names = inspect.signature(function).parameters
    missing = [name for name in names if name not in bindings]
    if missing:
        raise PatternError(
            f"{function.__name__} asks for {missing}",
            expected=f"parameters among {sorted(bindings)}",
        )
    return {name: bindings[name] for name in names}


def _kinds(function: Callable[..., Any]) -> dict[str, tuple[type, ...]]:
    hints = typing.get_type_hints(function)
    return {
        name: _classes(hints.get(name, fx.Node)) for name in inspect.signature(function).parameters
    }


def _classes(hint: Any) -> tuple[type, ...]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(cls for part in typing.get_args(hint) for cls in _classes(part))
    if hint is float:
        return (float, int)
    return (hint if isinstance(hint, type) else object,)


__all__ = [
    "Decline",
    "Expression",
    "Journal",
    "Match",
    "Rewrite",
    "Rule",
    "apply_match",
    "apply_rules",
    "bound_arguments",
    "rewrite",
]
