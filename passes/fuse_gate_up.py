"""Fuse the gate and up projections of a gated MLP into one matmul.

Before: `%g = linear(%x, %G); %u = linear(%x, %U); %h = gated(%g, %u, silu)`.
After: `%gu = linear(%x, [%G; %U]); %h = gated(slice(%gu), slice(%gu), silu)`.
Equal because a matmul computes each output row on its own (Shazeer 2020 for the gated MLP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ir.edit import Editor
from ..ir.program import Node, Program
from ..ir.rewrite import Decline, Match, Rule, apply_rules
from ..ir.weights import Weights
from .contract import Context, RulePass, contract
from .stack_linears import LINEAR, earliest, stack_linears, why_not_stackable


class _GateUp(Rule):
    name = kind = "fuse_gate_up"

    def __init__(self, weights: Weights | None = None) -> None:
        self.weights = Weights() if weights is None else weights

    def look(self, node: Node) -> Match | Decline | None:
        if node.target is not torch.ops.planish.gated.default:
            return None
        gate, up = node.all_input_nodes[0], node.all_input_nodes[-1]
        if gate.target is not LINEAR or up.target is not LINEAR:
            return Decline(
                "gate and up are not two matmuls (packed already, or computed otherwise)"
            )
        reason = why_not_stackable([gate, up], self.weights)
        if reason:
            return Decline(reason)
        return Match(node, {"linears": [gate, up]}, at=earliest([gate, up]))

    def build(self, found: Match, editor: Editor) -> dict[Node, Node]:
        return stack_linears(found.found["linears"], editor)


@dataclass(frozen=True)
class FuseGateUp(RulePass):
    """One matmul for the gate and up projections of each gated MLP.

    Encoded weights of one number format are stacked code by code; different ones stay apart.
    """

    contract = contract("bounded", requires=["raised"])
    rules: ClassVar[Sequence[Rule]] = (_GateUp(),)

    def run(self, program: Program, context: Context) -> None:
        apply_rules(program, [_GateUp(program.weights)], context.journal)
