"""Weights in their affine form become integer weights for ONNX, and additions beside the product.

Signs become 2-bit integers with the same values. Offsets add the group sums of x times themselves;
columns and outliers beside a base add products of their own. What remains is an `AffineInt` weight,
for which the target has operators.
"""

from __future__ import annotations

from typing import Any

import torch

from ..ir.affine_form import AffineForm, affine_form
from ..ir.edit import Editor, value_of
from ..ir.encoded import Encoded
from ..ir.format_affine import AffineInt
from ..ir.format_two_four_codes import CompressedCodes
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..ir.weight_roles import Role, weight_roles
from .lower_affine import beside_parts, cast, entry_terms, with_additions, with_offsets

_ATEN = torch.ops.aten
# operator: schema names of activations, weight and bias
_PRODUCTS: dict[Any, tuple[str, str, str | None]] = {
    _ATEN.linear.default: ("input", "weight", "bias"),
    _ATEN.addmm.default: ("mat1", "mat2", "self"),
    _ATEN.mm.default: ("self", "mat2", None),
    _ATEN.matmul.default: ("self", "other", None),
}


def lower_affine_forms(program: Program, editor: Editor, notes: list[str]) -> None:
    """Replace the weights that have an affine form of at most 4 bits or with additions."""
    for role in weight_roles(program):
        entry = program.weights.entry(role.name)
        if not isinstance(entry, Encoded) or isinstance(entry.format, AffineInt):
            continue
        form = affine_form(entry)
        if form is None:
            continue
        if form.plain:
            if _bits(form) <= 4 or isinstance(entry.format, CompressedCodes):
                program.weights[role.name] = form.steps
        elif reason := _why_not(role, entry, form):
            notes.append(f"{role.name}: not read as integers because {reason}")
        else:
            _replace(editor, role, form)


def _bits(form: AffineForm) -> int:
    assert isinstance(form.steps.format, AffineInt)
    return form.steps.format.bits


def _why_not(role: Role, entry: Encoded, form: AffineForm) -> str | None:
    if role.others:
        return f"%{role.others[0].name} reads it too"
    if len(entry.shape) != 2 or role.axis != entry.axis:
        return "its groups do not lie along the axis that its readers sum over"
    if role.tables and (form.columns is not None or form.entries is not None):
        return "a look-up reads values beside the base"
    for product in role.matmuls:
        if product.target not in _PRODUCTS:
            return f"%{product.name} is {product.target}"
    return None


def _replace(editor: Editor, role: Role, form: AffineForm) -> None:
    beside = beside_parts(editor, role.name, form)
    steps = editor.weight(f"{role.name}.steps", form.steps)
    for product in role.matmuls:
        with editor.at(product):
            new = _product(editor, product, steps, form, beside)
        editor.replace(product, new)
    for table in role.tables:
        given = bound_arguments(table)
        with editor.at(table):
            rows = editor.emit(table.target, steps, *table.args[1:], **table.kwargs)
            dtype = value_of(rows).dtype
            wide = cast(editor, rows, torch.float32)
            new = cast(editor, with_offsets(editor, beside, given["indices"], wide), dtype)
        editor.replace(table, new)


def _product(
    editor: Editor, product: Node, steps: Node, form: AffineForm, beside: dict[str, Node]
) -> Node:
    given = bound_arguments(product)
    activations, weight, _ = _PRODUCTS[product.target]
    arguments = [steps if value is given[weight] else value for value in product.args]
    dtype = value_of(product).dtype
    result = cast(editor, editor.emit(product.target, *arguments), torch.float32)
    x = cast(editor, given[activations], torch.float32)
    result = with_additions(editor, form, beside, x, result)
    if "entry_rows" in beside:
        result = _with_entries(editor, beside, x, result)
    return cast(editor, result, dtype)


def _with_entries(editor: Editor, beside: dict[str, Node], x: Node, result: Node) -> Node:
    """Terms are added to rows of the transposed result, which ScatterND can do."""
    width, rows = value_of(x).shape[-1], value_of(result).shape[-1]
    flat = editor.emit(_ATEN.reshape.default, x, [-1, width])
    terms = editor.emit(_ATEN.t.default, entry_terms(editor, beside, flat))
    turned = editor.emit(_ATEN.reshape.default, result, [-1, rows])
    turned = editor.emit(_ATEN.t.default, turned)
    places = [beside["entry_rows"]]
    summed = editor.emit(_ATEN.index_put.default, turned, places, terms, True)
    found = editor.emit(_ATEN.t.default, summed)
    lead = value_of(result).dim() - 1
    sizes: list[Any] = [
        size if isinstance(size, int) else editor.emit(_ATEN.sym_size.int, result, axis)
        for axis, size in enumerate(value_of(result).shape[:lead])
    ]
    return editor.emit(_ATEN.reshape.default, found, [*sizes, rows])


__all__ = ["lower_affine_forms"]
