"""Raise norms: spelled-out RMSNorm and LayerNorm become one operation each.

Before: `%m = mean(pow(%x, 2), -1); %y = %w * (%x * rsqrt(%m + eps))`.
After: `%y = rms_norm(%x, %w, eps)`. And `(x - mean(x)) * rsqrt(var(x) + eps) * w + b` becomes
`layer_norm(x, [channels], w, b, eps)`. The same function (Zhang & Sennrich 2019, eq. 4; Ba et al.
2016, eq. 4), rounded otherwise: half-precision inputs are normalized in float32.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.edit import Editor, shape, value_of
from ..ir.look_through import narrowest, number
from ..ir.pattern import bound_arguments, op
from ..ir.program import Node, Program
from ..ir.rewrite import Decline, Match, Rule, apply_rules
from .contract import Context, Pass, contract
from .read_norm import Scaled, Statistic, read_statistic, scaled_forms
from .spelling import arguments, calls, rank

aten = torch.ops.aten


class RmsNorm(Rule):
    """x * rsqrt(mean(x^2) + eps) * (offset + weight), and aten.rms_norm."""

    name = kind = "rms_norm"

    def look(self, node: Node) -> Match | Decline | None:
        if calls(node, aten.rms_norm.default):
            return _look_at_aten(node)
        found = read_statistic(node)
        if found is None or found[1]:
            return None
        if isinstance(found[0], Decline):
            return found[0]
        for form in reversed(forms := scaled_forms(found[0])):
            variant = _rms_arguments(found[0], form)
            if variant is not None:
                return Match(form.node, variant)
        return Decline(_why_not(found[0], forms))

    def build(self, found: Match, editor: Editor) -> Node:
        x, weight, eps, offset = (found.found[key] for key in ("x", "weight", "eps", "offset"))
        weight = _one_axis(weight)
        return op.rms_norm(x, weight, eps, offset) if offset else op.rms_norm(x, weight, eps)


class LayerNorm(Rule):
    """(x - mean(x)) * rsqrt(var(x) + eps) * weight + bias, and the native form."""

    name = kind = "layer_norm"

    def look(self, node: Node) -> Match | Decline | None:
        if node.target is operator.getitem and arguments(node)[1] == 0:
            return _look_at_native(node)
        found = read_statistic(node)
        if found is None or not found[1]:
            return None
        if isinstance(found[0], Decline):
            return found[0]
        for form in reversed(forms := scaled_forms(found[0])):
            variant = _layer_arguments(found[0], form)
            if variant is not None:
                return Match(form.node, variant)
        return Decline(_why_not(found[0], forms))

    def build(self, found: Match, editor: Editor) -> Node:
        given = found.found
        sizes = given.get("sizes") or [shape(given["x"])[-1]]
        weight, bias = _one_axis(given["weight"]), _one_axis(given["bias"])
        return op.layer_norm(given["x"], sizes, weight, bias, given["eps"])


def _look_at_aten(node: Node) -> Match | Decline:
    given = bound_arguments(node)
    sizes, x = given["normalized_shape"], given["input"]
    if len(sizes) != 1:
        return Decline(f"it normalizes over the last {len(sizes)} axes, not over the last alone")
    if given["eps"] is None:
        return Decline("its eps is left to the dtype: give the norm a number")
    found = {"x": x, "weight": given["weight"], "eps": float(given["eps"]), "offset": 0.0}
    weight = given["weight"]
    if weight is not None and value_of(weight).dtype != value_of(x).dtype:
        return Decline(f"its weight is {value_of(weight).dtype}, its input {value_of(x).dtype}")
    return Match(node, found)


def _look_at_native(node: Node) -> Match | None:
    whole = arguments(node)[0]
    if not calls(whole, aten.native_layer_norm.default):
        return None
    given = bound_arguments(whole)
    found = {key: given[key] for key in ("weight", "bias", "eps")}
    return Match(node, {**found, "x": given["input"], "sizes": given["normalized_shape"]})


def _rms_arguments(found: Statistic, form: Scaled) -> dict[str, Any] | None:
    """Arguments with which rms_norm rounds where the spelled-out form did and has its dtype."""
    weight, offset = _offset(form.weight)
    result = value_of(form.node).dtype
    for x in (narrowest(found.x), found.x):
        dtype = value_of(x).dtype
        if dtype not in (result, form.rounded):
            continue
        for scale in dict.fromkeys((weight and narrowest(weight), weight)):
            promoted = dtype
            if scale is not None and not offset:
                promoted = torch.promote_types(value_of(scale).dtype, dtype)
            if promoted == result:
                return {"x": x, "weight": scale, "eps": found.eps, "offset": offset}
    return None


def _offset(weight: Node | None) -> tuple[Node | None, float]:
    """w and 1, where the weight is 1 + w."""
    if calls(weight, aten.add.Tensor) and bound_arguments(weight)["alpha"] == 1:  # type: ignore[arg-type]
        for inner, added in (weight.args, weight.args[::-1]):  # type: ignore[union-attr]
            if number(added) is not None and isinstance(inner, Node):
                return inner, number(added) or 0.0
    return weight, 0.0


def _layer_arguments(found: Statistic, form: Scaled) -> dict[str, Any] | None:
    result = value_of(form.node).dtype
    source = found.centred
    assert source is not None
    for x in (narrowest(source), source):
        scales = [_of_dtype(scale, result) for scale in (form.weight, form.bias)]
        if value_of(x).dtype == result and False not in scales:
            return {"x": x, "weight": scales[0], "bias": scales[1], "eps": found.eps}
    return None


def _of_dtype(scale: Node | None, dtype: torch.dtype) -> Any:
    """The weight in that dtype, before or after its casts; None if absent, False if not found."""
    if scale is None:
        return None
    fitting = (s for s in (narrowest(scale), scale) if value_of(s).dtype == dtype)
    return next(fitting, False)


def _one_axis(weight: Node | None) -> Node | None:
    if weight is None or rank(weight) == 1:
        return weight
    return op.reshape(weight, [shape(weight)[-1]])


def _why_not(found: Statistic, forms: list[Scaled]) -> str:
    if not forms:
        readers = len(found.node.users)
        if readers > 1:
            return f"the inverse root mean square has {readers} readers, not one"
        return "the inverse root mean square does not multiply the value that it was taken of"
    return f"its input is {value_of(found.x).dtype} but its result {value_of(forms[-1].node).dtype}"


@dataclass(frozen=True)
class RaiseNorm(Pass):
    """Find RMSNorm and LayerNorm in any spelling."""

    contract = contract("bounded", requires=["functional", "canonical"])

    def run(self, program: Program, context: Context) -> None:
        for node in program.graph.nodes:
            whole = calls(node, aten.layer_norm.default)
            if whole and context.journal.offers():
                context.journal.noted(LayerNorm.name, node)
        apply_rules(program, (RmsNorm(), LayerNorm()), context.journal)
