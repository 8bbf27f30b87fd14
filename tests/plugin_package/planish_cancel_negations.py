"""Cancel negations: -(-x) is x, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

from planish import Node, RulePass, contract, op, rewrite


@rewrite
def negated_twice(x: Node):
    return op.neg(op.neg(x))


@negated_twice.to
def itself(x: Node) -> Node:
    return x


@dataclass(frozen=True)
class CancelNegations(RulePass):
    """Remove pairs of negations."""

    contract = contract("exact", requires=["functional"])
    rules = (negated_twice,)
    note: str = "none"
