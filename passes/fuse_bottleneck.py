"""Fuse bottleneck adapters (Houlsby et al. 2019, fig. 2) with the products around them.

An adapter `%z + up(act(down(%z)))` is not linear, so it stays; but its first product may join the
one before it, and a factor may go into its last one.
Before: `%z = linear(%h, %W, %b); %d = linear(%z, %D, %e); ...; %s = mul(linear(%a, %U), 0.5)`.
After: `%p = linear(%h, [%W; %D W], [%b; %D b + %e])`, %z and %d are slices of it, and %U is halved.
Equal because a product of products is a product, computed in float64 and rounded once. Left alone
where `D W` has more to multiply than D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.edit import Editor, shape
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..ir.rewrite import Journal
from ..ir.weight_expressions import constant_nodes
from .contract import Context, Pass, contract
from .find_adapter_branch import Finder, Region
from .merge_lora import Merger
from .merged_product import find_base
from .stack_linears import joined_name

_ATEN = torch.ops.aten
_LINEAR = _ATEN.linear.default


@dataclass(frozen=True)
class Bottleneck:
    """down: [narrow, in] of z; up: [out, narrow] of its activation; both linear with weights."""

    down: Node
    up: Node


@dataclass(frozen=True)
class FuseBottleneck(Pass):
    """Join the first product of bottleneck adapters with the one before, factors with the last."""

    contract = contract("bounded", requires=["functional"], rounds_weights=True)

    def run(self, program: Program, context: Context) -> None:
        merger = Merger(program, context, self.pass_name())
        finder = Finder(program.graph, constant_nodes(program))
        found = bottlenecks(program)
        for place in found:
            _fold_factor(place, finder, merger)
        editor = Editor(program)
        for done, place in enumerate(found):
            context.progress(done, len(found), self.pass_name())
            _join(place, editor, context.journal, self.pass_name())
        if context.journal.count:
            editor.sweep()


def bottlenecks(program: Program) -> list[Bottleneck]:
    """linear, one pointwise operation, linear, narrower in between; beside the value they read."""
    found: list[Bottleneck] = []
    for up in program.graph.find_nodes(op="call_function", target=_LINEAR):
        act: Any = bound_arguments(up)["input"]
        down: Any = act.args[0] if act.op == "call_function" and act.args else None
        if not isinstance(down, fx.Node) or down.target is not _LINEAR:
            continue
        pointwise = torch.Tag.pointwise in getattr(act.target, "tags", ())
        if not pointwise or len(act.all_input_nodes) != 1 or len(down.users) != 1:
            continue
        z = bound_arguments(down)["input"]
        narrow, wide = shape(down)[-1], min(shape(z)[-1], shape(up)[-1])
        plain = all(_plain(node) for node in (down, up))
        if plain and narrow < wide and len(z.users) > 1:
            found.append(Bottleneck(down, up))
    return found


def _plain(linear: Node) -> bool:
    given = bound_arguments(linear)
    parts = [given["weight"], *([given["bias"]] if given["bias"] is not None else [])]
    return all(isinstance(part, fx.Node) and part.op == "get_attr" for part in parts)


def _fold_factor(place: Bottleneck, finder: Finder, merger: Merger) -> None:
    """up(a) * s: the factor goes into up's weight and bias."""
    root, steps = place.up, {place.up: finder.steps[place.up]}
    while len(root.users) == 1:
        user = next(iter(root.users))
        step = finder.steps.get(user)
        if step is None or step.kind != "scale":
            break
        root, steps[user] = user, step
    if root is place.up:
        return
    region = Region(root, ((root, 1.0),), place.up.args[0], steps)  # type: ignore[arg-type]
    base = find_base(region)
    reason = merger.why_not(region, base)
    if reason is not None or base is None:
        merger.context.journal.declined(merger.name, root, reason or "")
    else:
        merger.merge([(region, base)])


def _join(place: Bottleneck, editor: Editor, journal: Journal, rule: str) -> None:
    """One product for z and down(z), where z is a product."""
    z: Node = bound_arguments(place.down)["input"]
    reason = _why_not(place.down, z, editor.program)
    if reason is not None:
        journal.declined(rule, place.down, reason)
        return
    if not journal.offers():
        return
    first, second = bound_arguments(z), bound_arguments(place.down)
    weights = editor.program.weights
    w, d = (weights[str(given["weight"].target)] for given in (first, second))
    stacked = torch.cat((w.double(), d.double() @ w.double())).to(w.dtype)
    label = joined_name([str(given["weight"].target) for given in (first, second)])
    rows = [w.shape[0], w.shape[0] + d.shape[0]]
    with editor.at(z):
        parts = [first["input"], editor.weight(label, stacked)]
        bias = _bias(weights, first["bias"], second["bias"], w, d)
        if bias is not None:
            parts.append(editor.weight(label.removesuffix("weight") + "bias", bias))
        joined = editor.emit(_LINEAR, *parts)
        wide = editor.emit(_ATEN.slice.Tensor, joined, -1, 0, rows[0])
        editor.module = place.down.meta.get("module", "")
        narrow = editor.emit(_ATEN.slice.Tensor, joined, -1, rows[0], rows[1])
    for old, new in ((place.down, narrow), (z, wide)):
        editor.replace(old, new)
        journal.replaced(rule, old, new)


def _bias(weights: Any, b: Node | None, e: Node | None, w: Tensor, d: Tensor) -> Tensor | None:
    """[b; D b + e], in W's dtype; zeros for what is missing."""
    if b is None and e is None:
        return None
    first = torch.zeros(w.shape[0]) if b is None else weights[str(b.target)]
    second = torch.zeros(d.shape[0]) if e is None else weights[str(e.target)]
    both = (first.double(), d.double() @ first.double() + second.double())
    return torch.cat(both).to(w.dtype)


def _why_not(down: Node, z: Node, program: Program) -> str | None:
    if z.target is not _LINEAR or not _plain(z):
        return f"%{z.name}, which it reads, is not made by a matmul with a plain weight"
    for node in (z, down):
        weight = bound_arguments(node)["weight"]
        kept = getattr(program.weights.entry(str(weight.target)), "format", None)
        if kept is not None:
            return f"{weight.target} is kept as {kept.name}: fuse before quantizing"
        if len(weight.users) > 1:
            return f"%{weight.target} is read elsewhere too"
    before, after = shape(z)[-1], shape(bound_arguments(z)["input"])[-1]
    if after > before:
        return f"joined, it would multiply {after} numbers a row instead of {before}"
    return None
