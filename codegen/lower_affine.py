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
        None if part is None else shared_part(editor, f"{name}.packed_{kind}", part)
        for kind, part in kinds.items()
    ]
    return AffineParts(form, packed, steps, beside_parts(editor, name, form))


def shared_part(editor: Editor, name: str, part: torch.Tensor) -> Node:
    """A part of a weight; the one that is there if other readers of the weight stored it."""
    known = name in editor.program.weights
    return editor.weight(name) if known else editor.weight(name, part)


def beside_parts(editor: Editor, name: str, form: AffineForm) -> dict[str, Node]:
    """What a form adds to its steps, as weights of their own by kind."""
    length = form.steps.rows_shape[-1]
    found: dict[str, torch.Tensor] = {}
    if form.offset is not None:
        found["offset"] = form.offset
        found["groups"] = torch.arange(length) // form.steps.format.grouping(length)
    if form.columns is not None:
        found |= {"columns": form.columns.places, "column_values": form.columns.values}
    if form.entries is not None:
        found["entry_rows"], found["entry_columns"] = form.entries.rows, form.entries.columns
        found["entry_values"] = form.entries.values
    narrow = {k: v.int() if v.dtype == torch.int64 else v for k, v in found.items()}
    return {kind: editor.weight(f"{name}.{kind}", part) for kind, part in narrow.items()}


def affine_product(editor: Editor, parts: AffineParts, x: Node, bias: Node | None) -> Node:
    """x [..., length] times the weight, plus bias: [..., rows] in x's dtype."""
    linear = torch.ops.planish.linear_affine.default
    dtype = value_of(x).dtype
    wide = x if parts.form.plain else cast(editor, x, torch.float32)
    result = editor.emit(linear, wide, *parts.steps, bias, *parts.packed.sizes)
    result = with_additions(editor, parts.form, parts.beside, wide, result)
    if "entry_rows" in parts.beside:
        rows, terms = parts.beside["entry_rows"], entry_terms(editor, parts.beside, wide)
        result = editor.emit(_ATEN.index_add.default, result, -1, rows, terms)
    return cast(editor, result, dtype)


def with_additions(
    editor: Editor, form: AffineForm, beside: dict[str, Node], x: Node, result: Node
) -> Node:
    """`result` [..., rows] plus x [..., length] times the offsets and the columns; float32."""
    if "offset" in beside:
        sums = _group_sums(editor, x, form)
        result = _added(editor, result, sums, beside["offset"])
    if "columns" in beside:
        taken = editor.emit(_ATEN.index_select.default, x, -1, beside["columns"])
        result = _added(editor, result, taken, beside["column_values"])
    return result


def entry_terms(editor: Editor, beside: dict[str, Node], x: Node) -> Node:
    """x [..., length] at the entries' columns times their values: [..., count]."""
    taken = editor.emit(_ATEN.index_select.default, x, -1, beside["entry_columns"])
    return editor.emit(_ATEN.mul.Tensor, taken, beside["entry_values"])


def cast(editor: Editor, value: Node, dtype: torch.dtype) -> Node:
    """`value` in another dtype; itself where it has it."""
    if value_of(value).dtype == dtype:
        return value
    return editor.emit(_ATEN._to_copy.default, value, dtype=dtype)


def affine_rows(editor: Editor, parts: AffineParts, ids: Node) -> Node:
    """Rows `ids` [...] of the weight, float32 [..., length]; of steps and offsets only."""
    lookup = torch.ops.planish.rows_affine.default
    rows = editor.emit(lookup, ids, *parts.steps, *parts.packed.sizes)
    return with_offsets(editor, parts.beside, ids, rows)


def with_offsets(editor: Editor, beside: dict[str, Node], ids: Node, rows: Node) -> Node:
    """Looked-up rows of steps plus the offsets of their groups."""
    if "offset" not in beside:
        return rows
    offsets = editor.emit(_ATEN.embedding.default, beside["offset"], ids)
    wide = editor.emit(_ATEN.index_select.default, offsets, -1, beside["groups"])
    return editor.emit(_ATEN.add.Tensor, rows, wide)


def _added(editor: Editor, result: Node, x: Node, weight: Node) -> Node:
    return editor.emit(_ATEN.add.Tensor, result, editor.emit(_ATEN.linear.default, x, weight))


def _group_sums(editor: Editor, x: Node, form: AffineForm) -> Node:
    """x [..., length] as the sums [..., groups] of what shares an offset."""
    length = form.steps.rows_shape[-1]
    group = form.steps.format.grouping(length)
    missing = -length % group
    if missing:
        x = editor.emit(_ATEN.constant_pad_nd.default, x, [0, missing])
    lead = list(value_of(x).shape[:-1])
    shape = [*_sizes(editor, x, len(lead)), (length + missing) // group, group]
    return editor.emit(_ATEN.sum.dim_IntList, editor.emit(_ATEN.reshape.default, x, shape), [-1])


def _sizes(editor: Editor, x: Node, count: int) -> list[Node | int]:
    """The first sizes of x: numbers where they are fixed, else nodes."""
    found: list[Node | int] = []
    for axis, size in enumerate(value_of(x).shape[:count]):
        fixed = isinstance(size, int)
        found.append(size if fixed else editor.emit(_ATEN.sym_size.int, x, axis))
    return found


__all__ = [
    "AffineParts",
    "affine_parts",
    "affine_product",
    "affine_rows",
    "beside_parts",
    "cast",
    "entry_terms",
    "with_additions",
    "with_offsets",
]
