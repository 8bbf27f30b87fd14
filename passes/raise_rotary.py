"""Raise rotary position embeddings: every spelling becomes one operation.

Before: `%y = %x * %cos + cat([-%x[.., h:], %x[.., :h]]) * %sin`, the tables of width 2 h.
After: `%y = rotary(%x, %cos, %sin)`, the tables of width h, one angle for each pair. The half, the
interleaved, the split (a cos - b sin, b cos + a sin), the complex and the partial form are known.
The same function (Su et al. 2021, eq. 34), its sums in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ir.edit import Editor, shape, value_of
from ..ir.pattern import op
from ..ir.program import Node, Program
from ..ir.rewrite import Decline, Match, Rule, apply_rules
from .contract import Context, Pass, contract
from .read_rotary import Turn, partial, read_complex, read_parts, read_sum
from .rotary_tables import Layout, Tables, angles_differ


class Rotary(Rule):
    """One turned value; the tables are shared by all turns of a program."""

    name = kind = "rotary"

    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    def look(self, node: Node) -> Match | Decline | None:
        found = read_sum(node) or read_parts(node) or read_complex(node)
        if found is None:
            return None
        if isinstance(found, str):
            return Decline(found)
        fault = self._fault(found)
        if fault:
            return Decline(fault)
        whole = partial(found)
        return Match(whole.root, {"turn": whole})

    def _fault(self, turn: Turn) -> str:
        if value_of(turn.cos).is_complex():
            return ""
        if angles_differ(turn.cos, turn.sin):
            return "the sine is not of the same angle table as the cosine"
        width = shape(turn.root)[-1]
        wanted = width if turn.wide else width // 2
        for table, what in ((turn.cos, "cosine"), (turn.sin, "sine")):
            if shape(table)[-1:] != [wanted]:
                return f"the {what} has {shape(table)[-1:]} channels, {wanted} are turned"
            fault = self.tables.fault(table, _layout(turn)) if turn.wide else ""
            if fault:
                return f"of the {what}, {fault}"
        return ""

    def build(self, found: Match, editor: Editor) -> Node:
        turn: Turn = found.found["turn"]
        cos, sin = turn.cos, turn.sin
        if value_of(cos).is_complex():
            cos = self.tables.component(cos, "real", editor)
            sin = self.tables.component(sin, "imaginary", editor)
        elif turn.wide:
            cos = self.tables.single(cos, _layout(turn), editor)
            sin = self.tables.single(sin, _layout(turn), editor)
        if turn.backwards:
            sin = op.neg(sin)
        x = _joined(turn)
        return op.rotary(x, cos, sin, True) if turn.interleaved else op.rotary(x, cos, sin)


def _joined(turn: Turn) -> Node:
    """What is turned, as one value of the result's shape."""
    if not isinstance(turn.x, Node):
        last = len(shape(turn.x[0]))
        if not turn.interleaved:
            return op.cat(list(turn.x), last - 1)
        return op.reshape(op.stack(list(turn.x), last), turn.sizes)
    return turn.x if turn.sizes is None else op.reshape(turn.x, turn.sizes)


def _layout(turn: Turn) -> Layout:
    return "interleaved" if turn.interleaved else "half"


@dataclass(frozen=True)
class RaiseRotary(Pass):
    """Find rotary embeddings in any spelling, and halve their angle tables."""

    contract = contract("bounded", requires=["functional", "canonical"])

    def run(self, program: Program, context: Context) -> None:
        for node in program.graph.nodes:
            whole = node.target is torch.ops.planish.rotary.default
            if whole and context.journal.offers():
                context.journal.noted(Rotary.name, node)
        apply_rules(program, (Rotary(Tables(program)),), context.journal)
