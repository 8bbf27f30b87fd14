"""Values of the new tokens' places, computed again for every place in the cache.

A cached program numbers its new tokens from the length of the cache on: `arange(length) + past`,
or the rows of a table from `past` to `past + length`. What follows from that alone (the cosines
and sines of a rotary embedding) can be had for all places from 0 to `past + length`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ..ir.edit import Editor, same_size, value_of
from ..ir.pattern import bound_arguments
from ..ir.positional import Positional
from ..ir.program import Node, Program
from .cached_attention import PAST, CachedAttention, refusal

_ATEN = torch.ops.aten
_ROTARY = torch.ops.planish.rotary.default
_PROJECTIONS = {
    _ATEN.linear.default,
    _ATEN.addmm.default,
    _ATEN.mm.default,
    _ATEN.bmm.default,
    _ATEN.matmul.default,
    _ATEN.embedding.default,
}


class Places:
    """The places of one cached program: which values are made of them, and at all places."""

    def __init__(self, program: Program, editor: Editor, layers: Sequence[CachedAttention]) -> None:
        self.program, self.editor = program, editor
        self.length = value_of(layers[0].node.args[0]).shape[2]  # type: ignore[arg-type]
        self.past = [node for layer in layers for p in layer.past for node in _lengths(p)]
        self.moved = _moved(program, self.past)
        self.made: dict[Node, Any] = {}
        self.total: Node | None = None

    def fault(self, layer: CachedAttention, fix: str) -> None:
        """Raise CacheRefused if keys or values take their place in the text by other means."""
        for new in layer.new:
            for node in self._until_projection(new):
                rotated = node.target is _ROTARY and node is layer.new[0]
                if not rotated and any(read in self.moved for read in node.all_input_nodes):
                    why = f"takes its place in the text from %{node.name}, which is not one rotary"
                    raise refusal(new, f"{why} embedding of the whole keys", fix)

    def _until_projection(self, node: Node) -> list[Node]:
        """The values that `node` is made of, up to the nearest projections."""
        found: list[Node] = []
        stack = [node]
        while stack:
            value = stack.pop()
            passed = value.op != "call_function" or value.target in _PROJECTIONS
            if passed or value in found or value in self.moved:
                continue
            found.append(value)
            stack.extend(value.all_input_nodes)
        return found

    def unrotated(self, layer: CachedAttention) -> Node | None:
        """The new keys before their rotary embedding; None if they have none."""
        key = layer.new[0]
        turned = key.target is _ROTARY and any(n in self.moved for n in key.all_input_nodes)
        return key.args[0] if turned else None  # type: ignore[return-value]

    def everywhere(self, node: Any) -> Any:
        """The value that `node` has for the new tokens, for all places of the cache."""
        if not isinstance(node, fx.Node) or node not in self.moved:
            return self._whole_length(node)
        if node not in self.made:
            with self.editor.at(node.next, node.meta.get("module", "")):
                self.made[node] = self._again(node)
        return self.made[node]

    def _again(self, node: Node) -> Node:
        if node.target is _ATEN.add.Tensor and node.args[1] in self.past:
            return self._counted(node.args[0])
        arguments = bound_arguments(node) if node.target is _ATEN.slice.Tensor else {}
        if arguments.get("start") in self.past:
            source, axis = arguments["self"], arguments["dim"]
            return self.editor.emit(_ATEN.slice.Tensor, source, axis, 0, self._total(), 1)
        args = map_arg(node.args, self.everywhere)
        return self.editor.emit(node.target, *args, **map_arg(node.kwargs, self.everywhere))

    def _counted(self, count: Any) -> Node:
        """arange(length) as arange(past + length)."""
        args = map_arg(count.args, self._whole_length)
        return self.editor.emit(count.target, *args, **count.kwargs)

    def _whole_length(self, value: Any) -> Any:
        size = value.meta.get("val") if isinstance(value, fx.Node) else None
        if isinstance(size, torch.SymInt) and same_size(size, self.length):
            return self._total()
        return value

    def _total(self) -> Node:
        if self.total is None:
            first = next(n for n in self.editor.graph.nodes if n.op == "call_function")
            after = self.past[0].next if self.past else first
            source, axis = self._text()
            with self.editor.at(after, ""):
                length = self.editor.emit(_ATEN.sym_size.int, source, axis)
                self.total = self.editor.emit(operator.add, self.past[0], length)
        return self.total

    def _text(self) -> tuple[Node, int]:
        """An input and the axis along which it has the new tokens."""
        return next(
            (node, axis)
            for node in self.program.inputs
            if isinstance(node.meta.get("val"), Tensor)
            for axis, size in enumerate(value_of(node).shape)
            if same_size(size, self.length)
        )


def _lengths(past: Node) -> list[Node]:
    return [u for u in past.users if u.target is _ATEN.sym_size.int and u.args[1] == 2]


def _moved(program: Program, past: Sequence[Node]) -> set[Node]:
    """Tensors that follow from sizes and weights alone, the length of the cache among them."""
    positional = Positional(program).nodes
    found: set[Node] = set()
    reached = set(past)
    for node in program.graph.nodes:
        if node in positional and any(read in reached for read in node.all_input_nodes):
            reached.add(node)
            if isinstance(node.meta.get("val"), Tensor):
                found.add(node)
    return found


def reads_input(node: Node) -> bool:
    """Whether the contents of an input of the user reach a value."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        value = stack.pop()
        if value in seen or not isinstance(value.meta.get("val"), Tensor):
            continue
        seen.add(value)
        if value.op == "placeholder" and not value.name.startswith(PAST):
            return True
        stack.extend(value.all_input_nodes)
    return False
