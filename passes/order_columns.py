"""Let weights whose columns are stored in another order run packed: the order moves to the input.

Before: `%y = linear(%x, %w)`, the columns of `%w` stored in the order of their groups (GPTQ's
act-order). After: `%y = linear(index_select(%x, -1, %order), %w)`, `%w` an ordinary weight of
groups. Products of one value with weights of one order share its reordering.
Equal because a product sums over all columns whatever their order; only the rounding of the sums
may differ. Source: the order is that of Frantar et al. 2023, "act-order" in their code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..ir.edit import Editor
from ..ir.encoded import Encoded
from ..ir.format_ordered import Ordered
from ..ir.program import Node, Program
from ..ir.weight_roles import Role, weight_roles
from .contract import Context, Pass, contract

_ATEN = torch.ops.aten
# product: the place of the value that it multiplies with a weight
_INPUTS: dict[Any, int] = {
    _ATEN.linear.default: 0,
    _ATEN.mm.default: 0,
    _ATEN.matmul.default: 0,
    _ATEN.addmm.default: 1,
}


@dataclass(frozen=True)
class OrderColumns(Pass):
    """Reorder inputs instead of weights whose columns are stored in another order."""

    contract = contract("bounded", requires=["functional"])

    def run(self, program: Program, context: Context) -> None:
        editor = Editor(program)
        chosen: dict[Node, Role] = {}
        for role in weight_roles(program):
            entry = program.weights.entry(role.name)
            if not isinstance(entry, Encoded) or not isinstance(entry.format, Ordered):
                continue
            reason = _why_not(role, entry)
            if reason:
                context.journal.declined(self.pass_name(), role.name, reason)
            elif context.journal.offers():
                chosen |= dict.fromkeys(role.matmuls, role)
                context.journal.changed_weight(self.pass_name(), role.name)
        moved = _Orders(editor)
        for product in sorted(chosen):
            entry = program.weights.entry(chosen[product].name)
            assert isinstance(entry, Encoded)
            new = moved.reordered(product, entry, chosen[product].name)
            editor.replace(product, new)
        for role in {id(role): role for role in chosen.values()}.values():
            entry = program.weights.entry(role.name)
            assert isinstance(entry, Encoded) and isinstance(entry.format, Ordered)
            program.weights[role.name] = entry.format.plain(entry)
        editor.sweep()


def _why_not(role: Role, entry: Encoded) -> str | None:
    others = [*role.tables, *role.others]
    if others:
        return f"%{others[0].name} reads it too, and is no product"
    if role.axis != entry.axis:
        return "its readers do not sum over the columns that are reordered"
    for product in role.matmuls:
        place = _INPUTS.get(product.target)
        if place is None or role.node not in product.args[place + 1 : place + 2]:
            return f"%{product.name} is {product.target}, which takes it another way"
    return None


class _Orders:
    """Values reordered so far, each with each order once."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self._orders: dict[bytes, Node] = {}
        self._values: dict[tuple[Node, bytes], Node] = {}

    def reordered(self, product: Node, entry: Encoded, name: str) -> Node:
        """The product of its input in the order of `entry`'s stored columns."""
        order, place = entry.parts["order"], _INPUTS[product.target]
        value: Any = product.args[place]
        key = order.numpy().tobytes()
        with self.editor.at(product) as editor:
            if key not in self._orders:
                self._orders[key] = editor.weight(f"{name}.order", order.long())
            if (value, key) not in self._values:
                taken = editor.emit(_ATEN.index_select.default, value, -1, self._orders[key])
                self._values[value, key] = taken
            taken = self._values[value, key]
            given = [*product.args[:place], taken, *product.args[place + 1 :]]
            return editor.emit(product.target, *given, **product.kwargs)
