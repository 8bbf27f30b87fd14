"""Named properties of a program and, where there is one, the check that refutes them.

Passes state the facts they require, ensure and break; the pipeline keeps the book and refuses a
wrong order before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .edit import is_pure
from .interpret import is_assertion
from .program import Program
from .text import value_names

Check = Callable[[Program], str | None]


@dataclass(frozen=True)
class Fact:
    """A property: its meaning in one sentence, and a check that returns a refutation or None."""

    name: str
    meaning: str
    check: Check | None = None


def _functional(program: Program) -> str | None:
    for node in program.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            return f"%{value_names(program.graph)[node]} writes to memory ({target})"
    return None


def _no_dead_values(program: Program) -> str | None:
    for node in program.graph.nodes:
        if node.op == "call_function" and not node.users and is_pure(node):
            return f"%{value_names(program.graph)[node]} is read by nobody"
    return None


def _no_assertions(program: Program) -> str | None:
    for node in program.graph.nodes:
        if is_assertion(node):
            return f"%{value_names(program.graph)[node]} is a run-time assertion"
    return None


def _dense_weights(program: Program) -> str | None:
    for name in program.weights:
        if hasattr(program.weights.entry(name), "format"):
            return f"{name} is stored in a number format"
    return None


_FACTS = (
    Fact("functional", "no operation writes to memory", _functional),
    Fact("canonical", "no-ops and spellings that differ only in form are gone", _no_assertions),
    Fact("raised", "spelled-out norms, rotary embeddings, gates and attention are single ops"),
    Fact("no_dead_values", "every value is read", _no_dead_values),
    Fact("dense_weights", "no weight is stored in a lossy number format", _dense_weights),
    Fact("quantized", "weights are stored in number formats"),
    Fact("cached", "attention reads and writes a KV cache"),
)

FACTS: dict[str, Fact] = {fact.name: fact for fact in _FACTS}


def refute(program: Program, names: frozenset[str]) -> str | None:
    """The first sentence with which a checker refutes one of the facts, or None.

    A fact without a checker, one's own included, is taken on the word of the pass.
    """
    for name in sorted(names):
        fact = FACTS.get(name)
        reason = fact.check(program) if fact is not None and fact.check is not None else None
        if reason:
            return f"{name}: {reason}"
    return None
