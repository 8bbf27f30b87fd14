"""Raise GELUs: the spelled-out error-function, tanh and sigmoid forms become one operation.

Before: `%y = 0.5 * %x * (1 + tanh(0.7978845608 * (%x + 0.044715 * %x^3)))`.
After: `%y = gelu(%x, approximate='tanh')`. Likewise 0.5 x (1 + erf(x / sqrt(2))) becomes gelu(x)
and x sigmoid(1.702 x) becomes quick_gelu(x) (Hendrycks & Gimpel 2016, sec. 2). The same function
up to the rounding of its constants to float32. Arguments are compared as polynomials in x, so the
order in which the model multiplies does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.edit import Editor, value_of
from ..ir.look_through import number, other_factor, sole_reader
from ..ir.pattern import bound_arguments, op
from ..ir.program import Node, Program
from ..ir.rewrite import Decline, Match, Rule, apply_rules
from ..ir.text import op_text
from .contract import Context, Pass, contract
from .spelling import arguments, calls

aten = torch.ops.aten

Polynomial = dict[int, float]
"""Coefficients by degree."""

_CUBIC = 0.044715
_ROUNDING = torch.finfo(torch.float32).eps
_FORMS: dict[Any, tuple[str, Polynomial]] = {
    aten.erf.default: ("none", {1: math.sqrt(0.5)}),
    aten.tanh.default: (
        "tanh",
        {1: math.sqrt(2 / math.pi), 3: math.sqrt(2 / math.pi) * _CUBIC},
    ),
}
_QUICK: Polynomial = {1: 1.702}


def close(a: float, b: float) -> bool:
    """Whether two constants agree to the rounding of float32."""
    return abs(a - b) <= _ROUNDING * max(abs(a), abs(b))


def polynomial(value: Any, x: Node, depth: int = 8) -> Polynomial | None:
    """The value as a polynomial in x, or None if it is none (of degree at most 4)."""
    if value is x:
        return {1: 1.0}
    if number(value) is not None:
        return {0: number(value) or 0.0}
    if depth == 0 or not isinstance(value, Node) or value.op != "call_function":
        return None
    if calls(value, aten.pow.Tensor_Scalar):
        return _power(polynomial(value.args[0], x, depth - 1), arguments(value)[1])
    if calls(value, aten.neg.default):
        return _times(polynomial(value.args[0], x, depth - 1), {0: -1.0})
    if not calls(value, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor):
        return None
    left, right = (polynomial(side, x, depth - 1) for side in arguments(value)[:2])
    if calls(value, aten.mul.Tensor):
        return _times(left, right)
    if calls(value, aten.div.Tensor):
        constant = right is not None and list(right) == [0] and right[0] != 0
        return _times(left, {0: 1 / right[0]}) if right and constant else None
    if bound_arguments(value)["alpha"] != 1 or left is None or right is None:
        return None
    sign = 1.0 if calls(value, aten.add.Tensor) else -1.0
    return _clean({d: left.get(d, 0) + sign * right.get(d, 0) for d in {*left, *right}})


def _power(base: Polynomial | None, exponent: Any) -> Polynomial | None:
    if exponent not in (1, 2, 3):
        return None
    result: Polynomial | None = {0: 1.0}
    for _ in range(int(exponent)):
        result = _times(result, base)
    return result


def _times(a: Polynomial | None, b: Polynomial | None) -> Polynomial | None:
    if a is None or b is None:
        return None
    product: Polynomial = {}
    for i, p in a.items():
        for j, q in b.items():
            product[i + j] = product.get(i + j, 0.0) + p * q
    return _clean(product) if max(product, default=0) <= 4 else None


def _clean(terms: Polynomial) -> Polynomial:
    return {degree: value for degree, value in terms.items() if value != 0}


def equal(a: Polynomial, b: Polynomial) -> bool:
    return a.keys() == b.keys() and all(close(a[degree], b[degree]) for degree in a)


class Gelu(Rule):
    """0.5 x (1 + erf(x / sqrt(2))) and its tanh and sigmoid approximations."""

    name = kind = "gelu"

    def look(self, node: Node) -> Match | Decline | None:
        if calls(node, aten.sigmoid.default):
            return _look_at_sigmoid(node)
        if node.target not in _FORMS:
            return None
        reader = sole_reader(node)
        if not calls(reader, aten.add.Tensor) or 1 not in map(number, arguments(reader)):  # type: ignore[arg-type]
            return None
        approximate, wanted = _FORMS[node.target]
        outcome: Match | Decline | None = None
        for x in _bases(arguments(node)[0]):
            found = polynomial(arguments(node)[0], x)
            if found is not None and found.keys() == wanted.keys():
                missing = f"1 + {op_text(node)} is not multiplied by x / 2"
                outcome = outcome or Decline(missing)
                root = _times_half(reader, x)  # type: ignore[arg-type]
                if root is not None:
                    return _settle(root, x, found, approximate)
        return outcome

    def build(self, found: Match, editor: Editor) -> Node:
        x, approximate = found.found["x"], found.found["approximate"]
        if approximate == "quick":
            return op.quick_gelu(x)
        return op.gelu(x) if approximate == "none" else op.gelu(x, approximate=approximate)


def _settle(root: Node, x: Node, found: Polynomial, approximate: str) -> Match | Decline:
    """The match, if the constants are right."""
    wanted = _FORMS[aten.erf.default if approximate == "none" else aten.tanh.default][1]
    if not close(found[1], wanted[1]):
        return Decline(f"the slope is {found[1]:.6g}, not {wanted[1]:.6g}")
    if not equal(found, wanted):
        return Decline(f"the cubic coefficient is {found[3] / found[1]:.6g}, not {_CUBIC}")
    if value_of(root).dtype != value_of(x).dtype:
        return Decline(f"its input is {value_of(x).dtype} but its result {value_of(root).dtype}")
    return Match(root, {"x": x, "approximate": approximate})


def _times_half(one_plus: Node, x: Node) -> Node | None:
    """The product of x / 2 and `one_plus`, multiplied in any order."""
    current, factor = one_plus, {0: 1.0}
    while (reader := sole_reader(current)) is not None:
        if calls(reader, aten.div.Tensor) and arguments(reader)[0] is current:
            divisor = number(arguments(reader)[1])
            found = {0: 1 / divisor} if divisor else None
        else:
            other = other_factor(reader, current)
            found = polynomial(other, x) if other is not None else None
        product = _times(factor, found)
        if product is None:
            return None
        current, factor = reader, product
        if equal(factor, {1: 0.5}):
            return current
    return None


def _bases(value: Any) -> Iterator[Node]:
    """The values that an expression may be a polynomial in, nearest first."""
    waiting = [value] if isinstance(value, Node) else []
    for _ in range(16):
        if not waiting:
            return
        node = waiting.pop(0)
        yield node
        waiting += [read for read in node.all_input_nodes if read not in waiting]


def _look_at_sigmoid(node: Node) -> Match | Decline | None:
    """x * sigmoid(k x), where k is not 1."""
    reader = sole_reader(node)
    x = other_factor(reader, node)
    inner = polynomial(arguments(node)[0], x) if isinstance(x, Node) else None
    if inner is None or inner.keys() != {1} or close(inner[1], 1.0):
        return None
    if not equal(inner, _QUICK):
        return Decline(f"the slope of the sigmoid is {inner[1]:.6g}, not {_QUICK[1]}")
    return Match(reader, {"x": x, "approximate": "quick"})  # type: ignore[arg-type]


@dataclass(frozen=True)
class RaiseGelu(Pass):
    """Find the error-function, tanh and sigmoid forms of GELU in any spelling."""

    contract = contract("bounded", requires=["functional", "canonical"])

    def run(self, program: Program, context: Context) -> None:
        for node in program.graph.nodes:
            whole = calls(node, aten.gelu.default, torch.ops.planish.quick_gelu.default)
            if whole and context.journal.offers():
                context.journal.noted(Gelu.name, node)
        apply_rules(program, (Gelu(),), context.journal)
