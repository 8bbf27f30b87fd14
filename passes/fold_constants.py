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
from torch.fx.node import map_arg

from ..ir.edit import Editor, is_pure
from ..ir.encoded import Encoded
from ..ir.interpret import is_assertion
from ..ir.program import Node, Program
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
        constant = _constant_nodes(program)
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
                folded = _evaluate(program, node).contiguous()
                new = editor.weight(f"folded.{node.name}", folded)
                new.meta["module"] = node.meta.get("module", "")
                editor.replace(node, new)
                context.journal.noted(self.pass_name(), node)
        editor.sweep()

    def _too_large(self, program: Program, node: Node, value: Tensor) -> str | None:
        size = value.numel() * value.element_size()
        sources = sum(
            program.weights.shape(str(n.target)).numel()
            * program.weights.dtype(str(n.target)).itemsize
            for n in _sources(node)
        )
        if size <= max(self.max_bytes, sources):
            return None
        return f"its value has {size} bytes, its sources only {sources}"


def _encoded(program: Program, node: Node) -> str | None:
    for source in sorted(_sources(node)):
        entry = program.weights.entry(str(source.target))
        if isinstance(entry, Encoded):
            return f"%{source.target} is kept as {entry.format.name}, and would become dense"
    return None


def _constant_nodes(program: Program) -> set[Node]:
    """Nodes of fixed size that no input reaches."""
    constant: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
        elif node.op == "call_function" and is_pure(node) and not is_assertion(node):
            value: Any = node.meta.get("val")
            fixed = not isinstance(value, Tensor) or all(isinstance(s, int) for s in value.shape)
            if fixed and all(read in constant for read in node.all_input_nodes):
                constant.add(node)
    return constant


def _sources(node: Node) -> set[Node]:
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        for read in waiting.pop().all_input_nodes:
            if read.op == "get_attr":
                found.add(read)
            else:
                waiting.append(read)
    return found


def _evaluate(program: Program, node: Node) -> Tensor:
    values: dict[Node, Any] = {}

    def value(wanted: Node) -> Any:
        if wanted not in values:
            if wanted.op == "get_attr":
                values[wanted] = program.weights[str(wanted.target)]
            else:
                args = map_arg(wanted.args, value)
                kwargs = map_arg(wanted.kwargs, value)
                values[wanted] = wanted.target(*args, **kwargs)  # type: ignore[operator]
        return values[wanted]

    return value(node)
