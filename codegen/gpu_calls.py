"""Put calls of Triton kernels into a graph: for code generation, or as operators for a compiler."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.edit import Editor
from ..ir.program import Node
from ..kernels.triton_spec import TritonSpec
from .kernel_call import KernelCall


@dataclass(frozen=True)
class Calls:
    """An edit of a program for some architectures.

    operators: kernels are called as torch operators, which a compiler leaves whole, instead of
    nodes that `triton_model` writes.
    """

    editor: Editor
    archs: Sequence[str]
    operators: bool = False

    def declined(self, spec: TritonSpec, call: Mapping[str, Any]) -> str | None:
        """Why a kernel cannot take a call on one of the architectures; None if it can."""
        arguments = concrete(call)
        for arch in self.archs:
            reason = spec.why_not(arch, **arguments)
            if reason:
                return f"{reason} ({arch})" if len(self.archs) > 1 else reason
        return None

    def replace(
        self, old: Node, spec: TritonSpec, call: Mapping[str, Any], planner: str = ""
    ) -> Node:
        """Call a kernel of one result in place of a node; returns the call. planner: as below."""
        node = self._emit(spec, call, old, planner)
        node.meta["val"] = old.meta["val"]
        self.editor.replace(old, node)
        return node

    def replace_several(
        self, olds: Sequence[Node], spec: TritonSpec, call: Mapping[str, Any], planner: str = ""
    ) -> Node:
        """Call a kernel whose first results stand for some nodes, at the place of the last.

        planner: see `KernelCall`; operators have their own.
        """
        node = self._emit(spec, call, olds[-1], planner)
        node.meta["val"] = tuple(old.meta["val"] for old in olds)
        with self.editor.graph.inserting_after(node):
            for place in reversed(range(len(olds))):
                item = self.editor.graph.call_function(operator.getitem, (node, place))
                item.meta = dict(olds[place].meta)
                self.editor.replace(olds[place], item)
        return node

    def _emit(
        self, spec: TritonSpec, call: Mapping[str, Any], place: Node, planner: str = ""
    ) -> Node:
        with self.editor.graph.inserting_before(place):
            if self.operators:
                target = _operator(spec)
                args, kwargs = _by_schema(target, call)
                node = self.editor.graph.call_function(target, args, kwargs)
            else:
                node = self.editor.graph.call_function(
                    KernelCall(spec, planner=planner), (), dict(call)
                )
        node.meta["module"] = place.meta.get("module", "")
        node.meta["named"] = place.meta.get("named", place.name)
        return node


def _operator(spec: TritonSpec) -> Any:
    namespace, name = spec.operator.split("::")
    return getattr(getattr(torch.ops, namespace), name).default


def _by_schema(target: Any, call: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in target._schema.arguments:
        value = call.get(argument.name, argument.default_value)
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def concrete(call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with tensors of the captured example's sizes, without memory.

    Asking questions of symbolic sizes would bind them to the answers.
    """
    return {
        name: example(value.meta["val"]) if isinstance(value, fx.Node) else value
        for name, value in call.items()
    }


def example(value: Any) -> Any:
    """A tensor of the captured example's sizes on the meta device; other values as they are."""
    if not isinstance(value, Tensor):
        return _hint(value) if isinstance(value, torch.SymInt) else value
    sizes = [_hint(size) for size in value.shape]
    strides = [_hint(stride) for stride in value.stride()]
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)
