"""Fold norm weights into the products that read the norm.

Before: `%x = rms_norm(%h, %g); %y = linear(%x, %W)`. After: `%g` is 1 everywhere and the columns of
`%W` are multiplied by what `%g` was. Equal because both multiply the same channel. A norm that
multiplies by 1 + `%g` gets zeros. Where the last norm feeds a head that is tied to the table of
embeddings, the head gets a copy of its own first, if `untie` allows it.
Ashkboos et al. 2024 (QuaRot), sec. 4, stage 1; it is what rotations of the stream need.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.axes_arithmetic import RELU
from ..ir.edit import Editor
from ..ir.move_scale import scaled
from ..ir.program import Program
from ..ir.rewrite import Journal
from ..ir.scale_edges import EdgeEnd, ScaleEdge, scale_edges
from ..ir.weight_roles import Role, weight_roles
from .contract import Context, Pass, contract


@dataclass(frozen=True)
class FoldNorms(Pass):
    """Make RMS norm weights 1 and let the products that read the norm carry them (BOUNDED).

    untie: give heads that are tied to a table a weight of their own, where the norm before them
    could not be folded otherwise; the model grows by that weight.
    """

    untie: bool = False

    contract = contract("bounded", requires=["functional", "dense_weights"], rounds_weights=True)

    def run(self, program: Program, context: Context) -> None:
        if self.untie:
            untie_heads(program, context.journal, self.pass_name(), tied_to_norms(program))
        for edge in scale_edges(program):
            reason = why_not_foldable(program, edge)
            if reason:
                context.journal.declined(self.pass_name(), edge.name, reason)
            elif _foldable(edge) and context.journal.offers():
                fold_norm(program, edge, context.journal, self.pass_name())


def _foldable(edge: ScaleEdge) -> bool:
    return edge.free and any(end.what in ("norm", "factor") for end in edge.producers)


def why_not_foldable(program: Program, edge: ScaleEdge) -> str:
    """The sentence why a norm keeps its weight; "" if it may be folded, or is no norm."""
    norms = [end for end in edge.producers if end.what in ("norm", "factor")]
    if not norms or not edge.consumers:
        return ""
    if not edge.free:
        return edge.sentence()
    others = [end for end in edge.producers if end is not norms[0]]
    if any(end.what not in ("bias", "value") or end.offset for end in others):
        return f"{norms[0].weight} shares its channels with {others[0].weight}"
    if others and _loses_digits(_multipliers(program, norms[0])):
        return f"{norms[0].weight} is next to 0 somewhere, which {others[0].weight} is divided by"
    if RELU in edge.passed and not bool((_multipliers(program, norms[0]) > 0).all()):
        return f"{norms[0].weight} is not positive, and a ReLU follows"
    return ""


def fold_norm(program: Program, edge: ScaleEdge, journal: Journal, rule: str) -> None:
    """Fold one foldable edge's norm."""
    norm = next(end for end in edge.producers if end.what in ("norm", "factor"))
    held = norm.channel >= 0
    factors = torch.ones(edge.factors, dtype=torch.float64)
    factors[norm.channel[held]] = _multipliers(program, norm)[held]
    weight = program.weights[norm.weight].clone()
    weight[held] = 1 - norm.offset
    program.weights[norm.weight] = weight
    journal.changed_weight(rule, norm.weight, "folded")
    for end in edge.producers:
        if end is not norm:
            divided = scaled(program.weights[end.weight], end, end.spread(1 / factors))
            program.weights[end.weight] = divided
            journal.changed_weight(rule, end.weight, f"added after {norm.weight}")
    for end in edge.consumers:
        program.weights[end.weight] = scaled(program.weights[end.weight], end, end.spread(factors))
        journal.changed_weight(rule, end.weight, f"carries {norm.weight}")


def _loses_digits(factors: Tensor) -> bool:
    return bool(factors.abs().amin() < 1e-4 * factors.abs().amax())


def _multipliers(program: Program, norm: EdgeEnd) -> Tensor:
    return program.weights[norm.weight].double() + norm.offset


def tied_to_norms(program: Program) -> set[str]:
    """Tables that are also heads, behind a norm that is not 1 everywhere."""
    found: set[str] = set()
    for edge in scale_edges(program):
        norms = [end for end in edge.producers if end.what in ("norm", "factor")]
        if any(not bool((_multipliers(program, end) == 1).all()) for end in norms):
            produced = {end.weight for end in edge.producers if end.what == "table"}
            found |= produced & {end.weight for end in edge.consumers}
    return found


def untie_heads(program: Program, journal: Journal, rule: str, names: Collection[str]) -> None:
    """Give the products that read these tables a copy of their own, named as the model names it."""
    editor = Editor(program)
    for role in weight_roles(program):
        if role.name in names and role.tables and role.matmuls and journal.offers():
            fresh = _untie(program, editor, role)
            note = f"{role.name} was tied; its {len(role.matmuls)} product reads a copy now"
            journal.changed_weight(rule, fresh, note)


def _untie(program: Program, editor: Editor, role: Role) -> str:
    weights = program.weights
    own = [n for n in weights.names_of(role.name) if n != role.name]
    name = own[0] if own else f"{role.matmuls[0].meta.get('module', '') or 'head'}.weight"
    weights.aliases.pop(name, None)
    copy = editor.weight(name, weights.entry(role.name))
    for reader in list(role.node.users):
        if reader not in role.tables:
            reader.replace_input_with(role.node, copy)
    return str(copy.target)


__all__ = ["FoldNorms", "fold_norm", "tied_to_norms", "untie_heads", "why_not_foldable"]
