"""Drop what nobody reads: dead values, run-time assertions, unused weights.

Before: `%y = linear(%x, %w); %z = linear(%x, %v); return %z`. After: without %y and %w.
Equal because a functional program's result depends only on what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.edit import Editor, is_pure
from ..ir.interpret import is_assertion
from ..ir.program import Program
from .contract import Context, Pass, contract


@dataclass(frozen=True)
class DropDead(Pass):
    """Remove values that nobody reads, weights that nobody uses, and run-time assertions."""

    contract = contract("exact", requires=["functional"], ensures=["no_dead_values"])

    def run(self, program: Program, context: Context) -> None:
        journal = context.journal
        for node in reversed(list(program.graph.nodes)):
            dead = node.op == "call_function" and not node.users
            if dead and (is_pure(node) or is_assertion(node)) and journal.offers():
                journal.noted(self.pass_name(), node)
                program.graph.erase_node(node)
        Editor(program).sweep()
