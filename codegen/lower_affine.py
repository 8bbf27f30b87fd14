"""Products and look-ups on weights in their affine form, on the CPU.

x @ (steps + offset + columns + entries).T is the packed product of the steps, plus the sums of x by
groups times the offsets, plus products with the few columns and entries beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ir.affine_form import AffineForm
from ..ir.edit import Editor, value_of
from ..ir.program import Node
from ..kernels.linear_affine import PackedAffine, pack

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class AffineParts:
    """The weights of an affine form in a program: packed steps, and what is added to them."""

    form: AffineForm
    packed: PackedAffine
    steps: list[Node | None]
    beside: dict[str, Node]


def affine_parts(editor: Editor, name: str, form: AffineForm) -> AffineParts:
    """Store the parts of a weight as weights of their own."""
    packed = pack(form.steps)
    kinds = {"codes": packed.codes, "scale": packed.scale, "zero": packed.zero}
    steps = [
        None if part is None else editor.weight(f"{name}.packed_{kind}", part)
        for kind, part in kinds.items()
    ]
    found: dict[str, torch.Tensor] = {}
    if form.offset is not None:
        found["offset"] = form.offset
        found["groups"] = torch.arange(packed.length) // packed.group
    if form.columns is not None:
        found |= {"columns": form.columns.places, "column_values": form.columns.values}
    if form.entries is not None:
        found["entry_rows"], found["entry_columns"] = form.entries.rows, form.entries.columns
        found["entry_values"] = form.entries.values
    beside = {kind: editor.weight(f"{name}.{kind}", part) for kind, part in found.items()}
    return AffineParts(form, packed, steps, beside)


def affine_product(editor: Editor, parts: AffineParts, x: Node, bias: Node | None) -> Node:
    """x [..., length] times the weight, plus bias: [..., rows] in x's dtype."""
    linear = torch.ops.planish.linear_affine.default
    dtype = value_of(x).dtype
    wide = x
    if not parts.form.plain and dtype != torch.float32:
        wide = editor.emit(_ATEN._to_copy.default, x, dtype=torch.float32)
    result = editor.emit(linear, wide, *parts.steps, bias, *parts.packed.sizes)
    if "offset" in parts.beside:
        sums = _group_sums(editor, wide, parts.packed)
        result = _added(editor, result, sums, parts.beside["offset"])
    if "columns" in parts.beside:
        taken = editor.emit(_ATEN.index_select.default, wide, -1, parts.beside["columns"])
        result = _added(editor, result, taken, parts.beside["column_values"])
    if "entry_rows" in parts.beside:
        taken = editor.emit(_ATEN.index_select.default, wide, -1, parts.beside["entry_columns"])
        terms = editor.emit(_ATEN.mul.Tensor, taken, parts.beside["entry_values"])
        rows = parts.beside["entry_rows"]
        result = editor.emit(_ATEN.index_add.default, result, -1, rows, terms)
    if value_of(result).dtype != dtype:
        result = editor.emit(_ATEN._to_copy.default, result, dtype=dtype)
    return result


def affine_rows(editor: Editor, parts: AffineParts, ids: Node) -> Node:
    """Rows `ids` [...] of the weight, float32 [..., length]; of steps and offsets only."""
    lookup = torch.ops.planish.rows_affine.default
    rows = editor.emit(lookup, ids, *parts.steps, *parts.packed.sizes)
    if "offset" not in parts.beside:
        return rows
    offsets = editor.emit(_ATEN.embedding.default, parts.beside["offset"], ids)
    wide = editor.emit(_ATEN.index_select.default, offsets, -1, parts.beside["groups"])
    return editor.emit(_ATEN.add.Tensor, rows, wide)


def _added(editor: Editor, result: Node, x: Node, weight: Node) -> Node:
    return editor.emit(_ATEN.add.Tensor, result, editor.emit(_ATEN.linear.default, x, weight))


def _group_sums(editor: Editor, x: Node, packed: PackedAffine) -> Node:
    """x [..., length] as the sums [..., groups] of what shares an offset."""
    missing = -packed.length % packed.group
    if missing:
        x = editor.emit(_ATEN.constant_pad_nd.default, x, [0, missing])
    groups = (packed.length + missing) // packed.group
    grouped = editor.emit(_ATEN.unflatten.int, x, -1, [groups, packed.group])
    return editor.emit(_ATEN.sum.dim_IntList, grouped, [-1])


__all__ = ["AffineParts", "affine_parts", "affine_product", "affine_rows"]
