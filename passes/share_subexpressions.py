"""Share subexpressions: two equal calls on the same values become one.

Before: `%a = silu(%x); %b = silu(%x); return %a + %b`. After: `%a = silu(%x); return %a + %a`.
Equal because operations are functions: same operator, same arguments, same value. Random and
impure operations are left alone.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..ir.edit import is_pure
from ..ir.program import Node, Program
from .contract import Context, Pass, contract


@dataclass(frozen=True)
class ShareSubexpressions(Pass):
    """Compute equal values once (common subexpression elimination)."""

    contract = contract("exact", requires=["functional"])

    def run(self, program: Program, context: Context) -> None:
        first: dict[Hashable, Node] = {}
        for node in list(program.graph.nodes):
            if node.op != "call_function" or not is_pure(node):
                continue
            key = (node.target, _key(node.args), _key(node.kwargs))
            kept = first.setdefault(key, node)
            if kept is not node and context.journal.offers():
                node.replace_all_uses_with(kept)
                context.journal.replaced(self.pass_name(), node, kept)
                program.graph.erase_node(node)


def _key(value: Any) -> Hashable:
    """An argument as a dictionary key; 1, 1.0 and True stay apart."""
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_key(part) for part in value))
    if isinstance(value, dict):
        return tuple((name, _key(part)) for name, part in sorted(value.items()))
    if isinstance(value, fx.Node):
        return value
    return (type(value).__name__, str(value))
