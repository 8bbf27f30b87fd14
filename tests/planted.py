"""Right passes, and one with a fault planted in exactly one of its rewrites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planish.ir.pattern import op
from planish.ir.program import Node, Program
from planish.ir.rewrite import Rewrite, rewrite
from planish.passes.contract import Context, Pass, RulePass, contract
from planish.passes.drop_dead import DropDead
from planish.passes.fold_constants import FoldConstants
from planish.passes.share_subexpressions import ShareSubexpressions


def norm_rule(wrong_in: str) -> Rewrite:
    """Spelled-out RMS norms as one operation; in one module with ten times the epsilon."""

    @rewrite
    def rms_norm(x: Node, weight: Node, eps: float):
        return weight * (x * op.rsqrt(op.mean(op.pow(x, 2), [-1], True) + eps))

    @rms_norm.to
    def one_operation(root: Node, x: Node, weight: Node, eps: float):
        wrong = bool(wrong_in) and root.meta["module"] == wrong_in
        return op.rms_norm(x, weight, 10 * eps if wrong else eps)

    return rms_norm


@dataclass(frozen=True)
class FuseNorms(Pass):
    """One operation for a norm. The fault: in the module `wrong_in`, another epsilon."""

    contract = contract("bounded", requires=["functional"])
    wrong_in: str = ""

    def run(self, program: Program, context: Context) -> None:
        from planish.ir.rewrite import apply_rules

        apply_rules(program, [norm_rule(self.wrong_in)], context.journal)


@rewrite
def gate_rule(gate: Node, up: Node):
    return op.silu(gate) * up


@gate_rule.to
def gated(gate: Node, up: Node):
    return op.gated(gate, up, "silu")


class FuseGates(RulePass):
    """silu(gate) * up as one operation: the same bits, promised as bounded only."""

    contract = contract("bounded")
    rules = (gate_rule,)


@rewrite
def negation_rule(x: Node):
    return op.neg(x)


@negation_rule.to
def times_minus_one(x: Node):
    return op.mul(x, -1)


class SpellNegation(RulePass):
    """-x as x * -1: the same bits."""

    contract = contract("exact")
    rules = (negation_rule,)


class Nothing(Pass):
    """Changes nothing."""

    contract = contract("exact")

    def run(self, program: Program, context: Context) -> None:
        del program, context


def twenty_right_passes() -> list[Pass]:
    tidy: list[Pass] = [ShareSubexpressions(), DropDead(), FoldConstants(), Nothing()]
    return [*tidy, SpellNegation(), *tidy, FuseGates(), *tidy, Nothing(), FuseNorms(), *tidy]


def among_right_passes(wrong: Pass, place: int = 13) -> list[Pass]:
    """Twenty right passes with the wrong one at `place`, counted from 0."""
    right: Sequence[Any] = twenty_right_passes()
    assert len(right) == 20
    return [*right[:place], wrong, *right[place:]]
