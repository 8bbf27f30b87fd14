"""One operation to translate: its arguments by name, as ONNX values or as Python values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as oir
from torch import Tensor, fx

from ..ir.errors import UnsupportedByTarget
from ..ir.program import Node
from .onnx_builder import Builder, Value, onnx_dtype
from .onnx_quantized import dequantized_weight
from .onnx_sizes import Size, is_size, size_scalar, sizes
from .onnx_weights import dense_weight, packed


@dataclass(frozen=True)
class Call:
    """A node with its arguments by the names in its operator's schema."""

    b: Builder
    node: Node
    args: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def get(self, name: str, default: Any = None) -> Any:
        found = self.args.get(name)
        return default if found is None else found

    def first(self, *names: str) -> Any:
        """The argument under the first of several names that the schema has."""
        return next(self.args[name] for name in names if name in self.args)

    @property
    def dtype(self) -> oir.DataType:
        """The ONNX dtype of the (first) result."""
        return onnx_dtype(self.meta.dtype)

    @property
    def meta(self) -> Tensor:
        """The fake tensor of the (first) result."""
        value = self.node.meta["val"]
        return value[0] if isinstance(value, (list, tuple)) else value

    @property
    def shape(self) -> list[Size]:
        """The sizes of the (first) result."""
        return sizes(self.meta.shape)

    def shape_of(self, name: str) -> list[Size]:
        return sizes(self.args[name].meta["val"].shape)

    def rank(self, name: str) -> int:
        return self.args[name].meta["val"].dim()

    def axis(self, axis: int, name: str = "self") -> int:
        """An axis of an argument counted from the front."""
        return axis % max(1, self.rank(name))

    def value(self, name: str, dtype: oir.DataType | None = None) -> Value:
        """A tensor or a number as an ONNX value, in `dtype` where given."""
        return self.of(self.args[name], dtype)

    def of(self, argument: Any, dtype: oir.DataType | None = None) -> Value:
        """An argument as an ONNX value: a node's, or a constant (then dtype is needed)."""
        b = self.b
        if is_size(argument):
            found = size_scalar(b, argument)
        elif isinstance(argument, fx.Node):
            found = read(b, argument)
        else:
            return b.constant(argument, dtype)
        return found if dtype is None else b.cast(found, dtype)

    def optional(self, name: str, dtype: oir.DataType | None = None) -> Value | None:
        return None if self.args.get(name) is None else self.value(name, dtype)

    def op(self, op_type: str, *inputs: Value | None, **attributes: Any) -> Value:
        return self.b.op(op_type, *inputs, **attributes)

    def number(self, value: float, dtype: oir.DataType | None = None) -> Value:
        """A scalar constant in the result's dtype."""
        return self.b.constant(np.asarray(value), dtype or self.dtype)

    def refuse(self, reason: str) -> UnsupportedByTarget:
        """The error for a form of this operation that has no translation."""
        return unsupported(self.node, reason)


Translation = Callable[[Call], Any]
Table = dict[str, Translation]


def read(b: Builder, node: Node) -> Any:
    """The ONNX value (or values) of a node; a weight is stored when it is first read."""
    if node.op != "get_attr":
        return b.values[node]
    encoded = packed(b, node)
    return dense_weight(b, node) if encoded is None else dequantized_weight(b, node, encoded)


def unsupported(node: Node, reason: str) -> UnsupportedByTarget:
    module = node.meta.get("module", "")
    return UnsupportedByTarget(
        f"the ONNX target cannot express {node.target}",
        where=f"%{node.name} in {module or 'the root module'}",
        found=reason,
        fix="replace the operation in the model or by a pass, or use another target",
    )
