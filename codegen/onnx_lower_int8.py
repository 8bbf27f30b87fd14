"""Products on rounded activations as one operation each, for onnxruntime's integer products.

Lowering rewrites a copy of the program into these; each has its meaning in PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.affine_form import affine_form, why_not_affine
from ..ir.edit import Editor, value_of
from ..ir.encoded import Encoded
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..ir.text import value_names
from .int8_codes import regular_codes, viewed
from .select_int8 import RoundedProduct, rounded_products

_LIBRARY = torch.library.Library("planish_onnx", "FRAGMENT")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LONGEST = 33_000
"""Columns up to which every sum of products of codes stays within 32 bits."""


def _int8_product(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor | None = None,
    outliers: Tensor | None = None,
    *,
    turned: bool = False,
) -> Tensor:
    """The values of codes [..., in] times the transpose of weight [out, in], plus bias [out].

    turned: weight is [in, out]. Outlier columns (bool [in]), whose codes are 0, are those of x.
    """
    values = torch.ops.planish.dequantize(codes, scale, zero, dtype=weight.dtype)
    if x is not None and outliers is not None:
        values = torch.where(outliers, x.to(weight.dtype), values)
    return torch.nn.functional.linear(values, weight.t() if turned else weight, bias)


_LIBRARY.define(
    "int8_product(Tensor codes, Tensor scale, Tensor? zero, Tensor weight, Tensor? bias, "
    "Tensor? x=None, Tensor? outliers=None, *, bool turned=False) -> Tensor"
)
_LIBRARY.impl("int8_product", _int8_product, "CompositeImplicitAutograd")
INT8_PRODUCT = torch.ops.planish_onnx.int8_product.default


def why_not(product: RoundedProduct, entry: Encoded) -> str | None:
    """Why onnxruntime multiplies floats for a product; None if it can multiply integers."""
    form = affine_form(entry)
    if form is None:
        return why_not_affine(entry)
    if form.offset is not None or form.entries is not None:
        return f"{entry.format.name} adds more to its integers than columns"
    if form.steps.format.grouping(entry.rows_shape[-1]) < entry.rows_shape[-1]:
        return "onnxruntime's integer products take one scale a channel, and its weight has groups"
    if entry.rows_shape[-1] > LONGEST:
        return f"sums over {entry.rows_shape[-1]} products may not fit in 32 bits"
    dtype = value_of(product.node).dtype
    return None if dtype in _FLOATS else f"it is {dtype}"


def lower_int8_products(program: Program, editor: Editor, notes: list[str]) -> None:
    """Rewrite every product that can; a note for each that multiplies floats."""
    names = value_names(editor.graph)
    known: dict[Node, tuple[Node | None, Node, Node, Node | None]] = {}
    for product in rounded_products(program, why_not):
        if product.declined:
            reason = f"multiplies floats because {product.declined}"
            notes.append(f"%{names[product.node]} (int8 activations) {reason}")
            continue
        if product.rounded not in known:
            known[product.rounded] = _codes(editor, product.rounded)
        _replace(editor, product, *known[product.rounded])


def _codes(editor: Editor, rounded: Node) -> tuple[Node | None, Node, Node, Node | None]:
    """(outlier columns, codes, scale, zero)."""
    if rounded.target is torch.ops.planish.round_regular.default:
        return (*regular_codes(editor, rounded), None)
    given = bound_arguments(rounded)
    return None, given["codes"], given["scale"], given["zero"]


def _replace(
    editor: Editor,
    product: RoundedProduct,
    outliers: Node | None,
    codes: Node,
    scale: Node,
    zero: Node | None,
) -> None:
    node = product.node
    x = bound_arguments(product.rounded)["x"] if outliers is not None else None
    turned = product.axis == -2
    with editor.at(node):
        codes = viewed(editor, codes, product)
        scale, zero = (_by_row(editor, part, product) for part in (scale, zero))  # type: ignore[assignment]
        x = None if x is None else viewed(editor, x, product)
        given: tuple[Any, ...] = (codes, scale, zero, product.weight, product.bias, x, outliers)
        new = editor.emit(INT8_PRODUCT, *given, turned=turned)
    editor.replace(node, new)


def _by_row(editor: Editor, part: Node | None, product: RoundedProduct) -> Node | None:
    """A scale or zero point through the product's views; one for all stays as it is."""
    if part is None or value_of(part).dim() <= 1:
        return part
    return viewed(editor, part, product, columns=1)
