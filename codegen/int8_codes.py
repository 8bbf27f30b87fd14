"""Nodes that lowering a product on rounded activations needs on every target."""

from __future__ import annotations

import torch

from ..ir.edit import Editor
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from .select_int8 import RoundedProduct

_ATEN = torch.ops.aten
_OPS = torch.ops.planish


def regular_codes(editor: Editor, rounded: Node) -> tuple[Node, Node, Node]:
    """(outlier columns, codes, scale) of a round_regular; codes are 0 in the outlier columns."""
    given = bound_arguments(rounded)
    with editor.at(rounded):
        columns = editor.emit(_OPS.outlier_columns.default, given["x"], given["threshold"])
        regular = editor.emit(_ATEN.masked_fill.Scalar, given["x"], columns, 0.0)
        scale = editor.emit(_OPS.activation_scale.default, regular, "token")
        codes = editor.emit(_OPS.quantize.default, regular, scale)
    return columns, codes, scale


def viewed(
    editor: Editor, value: Node, product: RoundedProduct, columns: int | None = None
) -> Node:
    """A value through the views that lie before a product; columns: of its last axis, if others."""
    for view in product.views:
        sizes = list(view.args[1])  # type: ignore[arg-type]
        if columns is not None:
            sizes[-1] = columns
        value = editor.emit(view.target, value, sizes, *view.args[2:], **view.kwargs)
    return value
