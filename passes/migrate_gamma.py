"""Migrate gamma: a norm's scale leaves the value that is quantized and goes to who reads it.

Before: `%x = layer_norm(%h, %g, %b); %y = linear(%x, %W); %r = %x + %y2`, as in post-norm encoders,
where the residual reads the norm too, so `%g` cannot simply be folded.
After: `%x = layer_norm(%h, 1, %b / %g); %y = linear(%x, %W g); %r = %x * %g + %y2`.
Equal because each reader multiplies by `%g` itself: products in their weights, the others at run
time. `%g` is what makes outliers in such norms, so `%x` now quantizes better.
Wei et al. 2022 (Outlier Suppression), sec. 4.1. Norms that products alone read need no
multiplication: `fold_norms` and `smooth` serve them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..ir.edit import Editor, value_of
from ..ir.pattern import bound_arguments, op
from ..ir.program import Node, Program
from ..ir.rewrite import Journal
from .contract import Context, Pass, contract

_ATEN, _OURS = torch.ops.aten, torch.ops.planish
_NORMS = {_ATEN.layer_norm.default, _OURS.rms_norm.default}
_NEXT_TO_ZERO = 1e-4


@dataclass(frozen=True)
class MigrateGamma(Pass):
    """Move the weights of norms that a residual reads into products and the residual (BOUNDED)."""

    contract = contract("bounded", requires=["raised", "dense_weights"], rounds_weights=True)

    def run(self, program: Program, context: Context) -> None:
        editor = Editor(program)
        for node in list(program.graph.nodes):
            if node.target not in _NORMS:
                continue
            reason = why_not_migrated(program, node)
            if reason:
                context.journal.declined(self.pass_name(), node, reason)
            elif context.journal.offers():
                _migrate(program, editor, node, context.journal, self.pass_name())


def why_not_migrated(program: Program, node: Node) -> str:
    """The sentence why a norm keeps its gamma, or ""."""
    given = bound_arguments(node)
    gamma, beta = given["weight"], given.get("bias")
    if gamma is None:
        return "it has no weight"
    if given.get("offset"):
        return "its weight is stored as an offset from 1"
    for part in (gamma, beta):
        if part is not None and (part.op != "get_attr" or len(part.users) > 1):
            return f"%{part.name} is computed, or read by others too"
    products = [user for user in node.users if _weight_of(user, node) is not None]
    if not products:
        return "no product with a weight of its own reads it"
    if len(products) == len(node.users):
        return "products alone read it: fold_norms or smooth serve it without a multiplication"
    size = program.weights[str(gamma.target)].abs()
    if float(size.amin()) < _NEXT_TO_ZERO * float(size.amax()):
        return f"{gamma.target} is next to 0 somewhere, which the bias would be divided by"
    return ""


def _weight_of(user: Node, norm: Node) -> tuple[Node, int] | None:
    """The weight by which a product multiplies the norm, read by nobody else, and its summed axis.

    None if the user is no such product.
    """
    given = bound_arguments(user) if user.target in _PRODUCTS else {}
    name, axis, source = _PRODUCTS.get(user.target, ("", 0, ""))
    if not given or given[source] is not norm or user.all_input_nodes.count(norm) != 1:
        return None
    weight = given[name]
    if weight.op != "get_attr" or len(weight.users) > 1 or value_of(weight).dim() != 2:
        return None
    return weight, axis


_PRODUCTS: dict[Any, tuple[str, int, str]] = {
    _ATEN.linear.default: ("weight", 1, "input"),
    _ATEN.addmm.default: ("mat2", 0, "mat1"),
    _ATEN.mm.default: ("mat2", 0, "self"),
    _ATEN.matmul.default: ("other", 0, "self"),
}


def _migrate(program: Program, editor: Editor, node: Node, journal: Journal, rule: str) -> None:
    given = bound_arguments(node)
    name, weights = str(given["weight"].target), program.weights
    gamma = weights[name]
    readers = [user for user in node.users if _weight_of(user, node) is None]
    with editor.at(node.next, node.meta.get("module", "")):
        scaled = op.mul(node, editor.weight(f"{name}.gamma", gamma))
    for reader in readers:
        reader.replace_input_with(node, scaled)
    for user in list(node.users):
        held = _weight_of(user, node)
        if held is not None:
            product, axis = str(held[0].target), held[1]
            spread = gamma.double().reshape([-1 if a == axis else 1 for a in range(2)])
            moved = (weights[product].double() * spread).to(weights.dtype(product))
            weights[product] = moved
            journal.changed_weight(rule, product, f"carries {name}")
    if given.get("bias") is not None:
        bias = str(given["bias"].target)
        weights[bias] = (weights[bias].double() / gamma.double()).to(weights.dtype(bias))
        journal.changed_weight(rule, bias, f"divided by {name}")
    weights[name] = torch.ones_like(gamma)
    journal.changed_weight(rule, name, f"moved to its products and {len(readers)} other readers")
