"""Values of many nodes, each kind computed once: the layers of a model are alike.

Inferring a value with symbolic sizes costs milliseconds. Two calls of one operator on values of
one class (dtype, device, sizes, strides, offset) give the same result, so a model of thirty equal
layers costs little more than one. What was inferred is kept with the fake tensor mode, so it
serves every pass on a program and all of its copies.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg

from .program import Node

_OWN_SIZES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
_KEPT = "planish_inference"
_CLASS = "planish_class"


class _Single(Exception):
    """An argument is of no class that others share."""


class Inference:
    """Infers the nodes of one graph, in order."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._values: dict[Hashable, Any] = {}

    @classmethod
    def of(cls, mode: FakeTensorMode) -> Inference:
        """The one that belongs to a mode."""
        kept = vars(mode).get(_KEPT)
        if kept is None:
            kept = cls(mode)
            setattr(mode, _KEPT, kept)
        return kept

    def weight(self, shape: torch.Size, dtype: torch.dtype) -> Any:
        """The fake value of a weight."""
        key = ("weight", tuple(shape), dtype)
        if key not in self._values:
            with self.mode:
                self._values[key] = torch.empty(tuple(shape), dtype=dtype)
        return self._values[key]

    def call(self, node: Node) -> Any:
        """The value of a call whose arguments have theirs; raises what the operator raises."""
        own_sizes = any(tag in getattr(node.target, "tags", ()) for tag in _OWN_SIZES)
        key = None if own_sizes else self.kind(node)
        if key is None:
            return self._computed(node)
        if key not in self._values:
            value = self._computed(node)
            if free_unbacked_symbols(value):
                return value
            self._values[key] = self._shared(value)
        return self._values[key]

    def kind(self, node: Node) -> Hashable | None:
        """The operator and its arguments by their classes; None if one is of no known class."""
        try:
            return node.target, self._key(node.args), self._key(node.kwargs)
        except _Single:
            return None

    def _computed(self, node: Node) -> Any:
        def value(argument: Node) -> Any:
            return argument.meta["val"]

        args = map_arg(node.args, value)
        kwargs = map_arg(node.kwargs, value)
        # Some shape rules take symbolic sizes only by the Python dispatcher (baddbmm's expand).
        with torch.no_grad(), self.mode, enable_python_dispatcher():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _shared(self, value: Any) -> Any:
        """One object for all values of one class."""
        try:
            return self._values.setdefault(("tensor", self._tensor_class(value)), value)
        except _Single:
            return value

    def _key(self, value: Any) -> Hashable:
        """An argument by its class."""
        if isinstance(value, fx.Node):
            known = value.meta["val"]
            if isinstance(known, torch.SymInt):
                return ("size", known.node.expr)
            if isinstance(known, (int, float, bool)):
                return ("plain", type(known), known)
            return ("value", self._tensor_class(known))
        if isinstance(value, (list, tuple)):
            return (type(value).__name__, *(self._key(part) for part in value))
        if isinstance(value, dict):
            return tuple((name, self._key(part)) for name, part in sorted(value.items()))
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return ("slice", *(self._key(part) for part in parts))
        return (type(value).__name__, str(value))

    def _tensor_class(self, value: Any) -> Hashable:
        """What a shape rule may see of a tensor; kept with it, as it costs many symbolic reads."""
        if not isinstance(value, FakeTensor) or value.fake_mode is not self.mode:
            raise _Single
        kept = vars(value).get(_CLASS)
        if kept is None:
            if value.layout is not torch.strided or value.constant is not None:
                raise _Single
            kept = (
                value.dtype,
                str(value.device),
                _sizes(value.shape),
                _sizes(value.stride()),
                _sizes((value.storage_offset(),)),
                value.requires_grad,
            )
            setattr(value, _CLASS, kept)
        return kept


def _sizes(sizes: Any) -> Hashable:
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes)
