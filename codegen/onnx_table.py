"""Which operation is translated how: the tables of the other files, and what decomposes."""

from __future__ import annotations

from typing import Any

from ..ir.program import Node
from . import (
    onnx_activations,
    onnx_attention,
    onnx_create,
    onnx_flat_attention,
    onnx_group_query,
    onnx_index,
    onnx_int8,
    onnx_logic,
    onnx_matmul,
    onnx_norm,
    onnx_pointwise,
    onnx_reduce,
    onnx_shape_ops,
    onnx_skip_norm,
)
from .onnx_call import Table, Translation

TABLE: Table = (
    onnx_pointwise.TABLE
    | onnx_logic.TABLE
    | onnx_activations.TABLE
    | onnx_shape_ops.TABLE
    | onnx_create.TABLE
    | onnx_index.TABLE
    | onnx_reduce.TABLE
    | onnx_norm.TABLE
    | onnx_matmul.TABLE
    | onnx_attention.TABLE
    | onnx_flat_attention.TABLE
    | onnx_group_query.TABLE
    | onnx_skip_norm.TABLE
    | onnx_int8.TABLE
)


def translation(node: Node) -> Translation | None:
    """By the operator's overload (aten.max.dim), else by its name (aten.max)."""
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    if schema is None:
        return None
    name = schema.name.replace("::", ".")
    overload = schema.overload_name or "default"
    return TABLE.get(f"{name}.{overload}") or TABLE.get(name)
