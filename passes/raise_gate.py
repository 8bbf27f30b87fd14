"""Raise gated MLPs: activation(gate) * up becomes one operation.

Before: `%a = silu(%gate); %y = %a * %up`. After: `%y = gated(%gate, %up, 'silu')` (Shazeer 2020,
eq. 6). x * sigmoid(x) becomes silu(x) on the way. The same function; bit for bit where the
activation was one operation already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.edit import Editor, same_shape, shape, value_of
from ..ir.look_through import other_factor, same_value, sole_reader
from ..ir.pattern import bound_arguments, op
from ..ir.program import Node, shape_text
from ..ir.rewrite import Decline, Match, Rule
from .contract import RulePass, contract
from .spelling import arguments, calls, is_tensor

aten = torch.ops.aten

_ACTIVATIONS: dict[Any, str] = {
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    torch.ops.planish.quick_gelu.default: "quick_gelu",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
}


class Silu(Rule):
    """x * sigmoid(x)."""

    name = kind = "silu"

    def look(self, node: Node) -> Match | None:
        if not calls(node, aten.sigmoid.default):
            return None
        product = sole_reader(node)
        x = other_factor(product, node)
        return Match(product, {"x": x}) if product and x is arguments(node)[0] else None

    def build(self, found: Match, editor: Editor) -> Node:
        return op.silu(found.found["x"])


class Gate(Rule):
    """activation(gate) * up, of one shape."""

    name = kind = "gated_mlp"

    def look(self, node: Node) -> Match | Decline | None:
        if not calls(node, aten.mul.Tensor):
            return None
        decline: Decline | None = None
        for activated, up in _orders(node):
            fault = _fault(node, activated, up)
            if not fault:
                found = {"gate": activated.args[0], "up": up, "activation": activation(activated)}
                return Match(node, found)
            decline = decline or Decline(fault)
        return decline

    def build(self, found: Match, editor: Editor) -> Node:
        return op.gated(*(found.found[key] for key in ("gate", "up", "activation")))


def activation(node: Node) -> str:
    """The name of an activation by which `gated` knows it; "" if it is none."""
    name = _ACTIVATIONS.get(node.target, "")
    if name == "gelu" and bound_arguments(node)["approximate"] == "tanh":
        return "gelu_tanh"
    return name


def _orders(product: Node) -> Iterator[tuple[Node, Node]]:
    """(activation, other factor): silu and gelu before relu and sigmoid, left before right."""
    left, right = arguments(product)
    if not is_tensor(left) or not is_tensor(right) or same_value(left, right):
        return
    pairs = [(a, b) for a, b in ((left, right), (right, left)) if activation(a)]
    pairs = [(a, b) for a, b in pairs if not _gates_itself(a, b)]
    yield from sorted(pairs, key=lambda pair: activation(pair[0]) in ("relu", "sigmoid"))


def _gates_itself(activated: Node, up: Node) -> bool:
    """Whether the gate is `up` itself, scaled or shifted: x * sigmoid(k x) is no gated MLP."""
    gate = arguments(activated)[0]
    while gate is not up and len(gate.all_input_nodes) == 1:
        if not calls(gate, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.neg.default):
            break
        gate = gate.all_input_nodes[0]
    return gate is up


def _fault(product: Node, activated: Node, up: Node) -> str:
    gate = arguments(activated)[0]
    if not same_shape(gate, up):
        return f"gate is {shape_text(shape(gate))} but up is {shape_text(shape(up))}"
    if value_of(gate).dtype != value_of(up).dtype:
        return f"gate is {value_of(gate).dtype} but up is {value_of(up).dtype}"
    if len(activated.users) > 1:
        return f"a second reader uses the {activation(activated)}"
    return ""


@dataclass(frozen=True)
class RaiseGate(RulePass):
    """Find gated MLPs with any activation, and SiLU in any spelling."""

    contract = contract("bounded", requires=["functional", "canonical"])
    rules = (Silu(), Gate())
