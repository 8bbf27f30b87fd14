"""Values of many nodes, each kind computed once: the layers of a model are alike.

Inferring a value with symbolic sizes costs milliseconds. Two calls of one operator on values of
the same class (the same fake tensor, or weights of one shape and dtype) give the same result, so
a model of thirty equal layers costs little more than one.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .edit import infer
from .program import Node

_OWN_SIZES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


class Inference:
    """Infers the nodes of one graph, in order."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._values: dict[Hashable, Any] = {}

    def weight(self, shape: torch.Size, dtype: torch.dtype) -> Any:
        """The fake value of a weight."""
        key = ("weight", tuple(shape), dtype)
        if key not in self._values:
            with self.mode:
                self._values[key] = torch.empty(tuple(shape), dtype=dtype)
        return self._values[key]

    def call(self, node: Node) -> Any:
        """The value of a call whose arguments have theirs; raises what the operator raises."""
        if any(tag in getattr(node.target, "tags", ()) for tag in _OWN_SIZES):
            return infer(node, self.mode)  # every call has sizes of its own
        key = (node.target, _key(node.args), _key(node.kwargs))
        if key not in self._values:
            self._values[key] = self._shared(infer(node, self.mode))
        return self._values[key]

    def _shared(self, value: Any) -> Any:
        """One object for all values of equal dtype, sizes and strides."""
        if isinstance(value, Tensor) and value.layout == torch.strided:
            sizes, strides = _sizes(value.shape), _sizes(value.stride())
            offset = _sizes((value.storage_offset(),))
            key = ("tensor", value.dtype, str(value.device), sizes, strides, offset)
            return self._values.setdefault(key, value)
        return value


def _sizes(sizes: Any) -> Hashable:
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes)


def _key(value: Any) -> Hashable:
    """An argument by its class; the values that are named by id live as long as their nodes."""
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_key(part) for part in value))
    if isinstance(value, dict):
        return tuple((name, _key(part)) for name, part in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _key(value.start), _key(value.stop), _key(value.step))
    if isinstance(value, fx.Node):
        known = value.meta["val"]
        if isinstance(known, torch.SymInt):
            return ("size", known.node.expr)
        return ("plain", known) if isinstance(known, (int, float, bool)) else ("value", id(known))
    return (type(value).__name__, str(value))
