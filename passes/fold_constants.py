"""Fold constants: what depends on weights alone is computed once, now.

Before: `%t = cat(%freqs, %freqs); %c = cos(%t)`. After: `%c = weight`. Values bigger than
`max_bytes` stay as they are when folding would grow the program (a broadcast of a small weight).
A value of weights that are kept in a number format stays as it is: folded, it would be dense.
Equal bit for bit: the same operators run on the same values, only earlier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..ir.edit import Editor
from ..ir.encoded import Encoded
from ..ir.program import Node, Program
from ..ir.weight_expressions import constant_nodes, evaluate, sources
from .contract import Context, Pass, contract


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute at optimization time what no input reaches.

    max_bytes: a folded value may be at most this large, unless it is no larger than its sources.
    """

    contract = contract("exact", requires=["functional"])
    max_bytes: int = 1 << 20

    def run(self, program: Program, context: Context) -> None:
        editor = Editor(program)
        constant = constant_nodes(program)
        for node in list(program.graph.nodes):
            if node not in constant or node.op != "call_function":
                continue
            edge = any(user not in constant for user in node.users)
            value: Any = node.meta.get("val")
            if not edge or not isinstance(value, Tensor):
                continue
            reason = _encoded(program, node) or self._too_large(program, node, value)
            if reason:
                context.journal.declined(self.pass_name(), node, reason)
            elif context.journal.offers():
                folded = evaluate(program, node).contiguous()
                new = editor.weight(f"folded.{node.name}", folded)
                new.meta["module"] = node.meta.get("module", "")
                editor.replace(node, new)
                context.journal.noted(self.pass_name(), node)
        editor.sweep()

    def _too_large(self, program: Program, node: Node, value: Tensor) -> str | None:
        size = value.numel() * value.element_size()
        held = sum(
            program.weights.shape(str(n.target)).numel()
            * program.weights.dtype(str(n.target)).itemsize
            for n in sources(node)
        )
        if size <= max(self.max_bytes, held):
            return None
        return f"its value has {size} bytes, its sources only {held}"


def _encoded(program: Program, node: Node) -> str | None:
    for source in sorted(sources(node)):
        entry = program.weights.entry(str(source.target))
        if isinstance(entry, Encoded):
            return f"%{source.target} is kept as {entry.format.name}, and would become dense"
    return None
