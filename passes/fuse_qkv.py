"""Fuse the query, key and value projections of an attention into one matmul.

Before: `%q = linear(%x, %Q); %k = linear(%x, %K); %v = linear(%x, %V)`, reshaped, rotated and
attended. After: `%qkv = linear(%x, [%Q; %K; %V])` and three slices of it. In cross-attention only
keys and values read the same value, and those two are fused.
Equal because a matmul computes each output row on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..ir.edit import Editor
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..ir.rewrite import Decline, Match, Rule, apply_rules
from ..ir.weights import Weights
from .contract import Context, RulePass, contract
from .stack_linears import LINEAR, earliest, stack_linears, why_not_stackable

_ATEN = torch.ops.aten
_STEPS = {
    getattr(packet, overload)
    for packet, overload in (
        (_ATEN.reshape, "default"),
        (_ATEN.view, "default"),
        (_ATEN._unsafe_view, "default"),
        (_ATEN.transpose, "int"),
        (_ATEN.permute, "default"),
        (_ATEN.unsqueeze, "default"),
        (_ATEN.expand, "default"),
        (_ATEN.slice, "Tensor"),
        (_ATEN.clone, "default"),
        (_ATEN.layer_norm, "default"),
        (torch.ops.planish.rms_norm, "default"),
        (torch.ops.planish.rotary, "default"),
    )
}
_SCALINGS = {_ATEN.mul.Tensor, _ATEN.div.Tensor}


def projection(value: Node) -> Node | None:
    """The linear that a head-shaped value comes from, through layout, norm, rotary and scaling."""
    while value.op == "call_function":
        if value.target is LINEAR:
            return value
        scaling = value.target in _SCALINGS and not isinstance(value.args[1], fx.Node)
        if value.target not in _STEPS and not scaling:
            return None
        value = value.args[0]  # type: ignore[assignment]
    return None


class _Qkv(Rule):
    name = kind = "fuse_qkv"

    def __init__(self, weights: Weights | None = None) -> None:
        self.weights = Weights() if weights is None else weights

    def look(self, node: Node) -> Match | Decline | None:
        if node.target is not torch.ops.planish.attention.default:
            return None
        arguments = bound_arguments(node)
        found = [projection(arguments[name]) for name in ("q", "k", "v")]
        linears = [linear for linear in dict.fromkeys(found) if linear is not None]
        if None in found:
            missing = ["query", "key", "value"][found.index(None)]
            return Decline(f"the {missing} does not come straight from one matmul")
        if len(linears) == 1:
            return Decline("query, key and value are one matmul already")
        reason = why_not_stackable(linears, self.weights)
        if reason and len(linears) == 3 and not why_not_stackable(linears[1:], self.weights):
            linears, reason = linears[1:], None
        if reason:
            return Decline(reason)
        return Match(node, {"linears": linears}, at=earliest(linears))

    def build(self, found: Match, editor: Editor) -> dict[Node, Node]:
        return stack_linears(found.found["linears"], editor)


@dataclass(frozen=True)
class FuseQkv(RulePass):
    """One matmul for the query, key and value projections of each attention.

    Encoded weights of one number format are stacked code by code; different ones stay apart.
    """

    contract = contract("bounded", requires=["raised"])
    rules: ClassVar[Sequence[Rule]] = (_Qkv(),)

    def run(self, program: Program, context: Context) -> None:
        apply_rules(program, [_Qkv(program.weights)], context.journal)
