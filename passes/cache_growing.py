"""The growing form of a cache: past keys and values are joined with the new ones on every call.

With a ring, a layer that sees a window of w keys returns its last w - 1 alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from ..ir.edit import Editor, same_size, shape
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from .cache_inputs import Decoder
from .cache_positions import GrowingLengths, PlaceForms

aten = torch.ops.aten
PAST_LENGTH = "past_length"
Pair = tuple[Node, Node]


class GrowingCache:
    """Inserts past_key_i, past_value_i [batch, kv_heads, past, head] and what follows from them."""

    def __init__(self, program: Program, editor: Editor, decoder: Decoder, ring: bool) -> None:
        self.program, self.editor, self.decoder, self.ring = program, editor, decoder, ring
        self.first = first_computation(editor.graph)
        self._sizes: dict[int, Any] = {}
        self.notes: list[str] = []

    def insert(self) -> list[Pair]:
        """Edit the program; returns the keys and values to be kept, in order."""
        past = [self._inputs(place, node) for place, node in enumerate(self.decoder.attentions)]
        lengths = self._lengths(past)
        forms = PlaceForms(self.editor, self.decoder, lengths, self.first)
        joined = [
            self._join(node, *pair)
            for node, pair in zip(self.decoder.attentions, past, strict=True)
        ]
        forms.rewire(lambda node, mask: self._mask(node, mask, lengths))
        self.notes += [f"%{node.name} is computed whole and cut" for node in forms.cut_tables]
        return [
            self._kept(node, *pair)
            for node, pair in zip(self.decoder.attentions, joined, strict=True)
        ]

    def kept(self, attention: Node) -> int | None:
        """The most tokens kept for an attention; None where all are."""
        window = self._kept_window(attention)
        return window - 1 if window else None

    def _kept_window(self, attention: Node) -> int:
        return int(bound_arguments(attention)["window"]) if self.ring else 0

    def _inputs(self, place: int, attention: Node) -> Pair:
        size = self._past_size(self._kept_window(attention))
        key, value = (
            add_input(self.program, self.editor, f"past_{kind}_{place}", source, size)
            for kind, source in zip(("key", "value"), attention.args[1:3], strict=True)
        )
        for node in (key, value):
            node.meta["module"] = attention.meta.get("module", "")
        return key, value

    def _past_size(self, window: int) -> Any:
        if window not in self._sizes:
            context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            sized = self.editor.mode.from_tensor(torch.empty(5), symbolic_context=context)
            self._sizes[window] = sized.shape[0]
        return self._sizes[window]

    def _lengths(self, past: Sequence[Pair]) -> GrowingLengths:
        """What is counted where: total = past + new, from whichever inputs tell it."""
        whole = [
            pair[0]
            for node, pair in zip(self.decoder.attentions, past, strict=True)
            if not self._kept_window(node)
        ]
        mask = self.decoder.mask
        kept_length = None
        if not whole and mask is None:
            kept_length = self._length_input()
        if mask is not None:
            past_size = self._past_size(0)
            resize_totals(self.editor, self.decoder, lambda size: size + past_size)
        token, axis = next(iter(self.decoder.tokens.items()))
        emit = self.editor.emit
        with self.editor.at(self.first, ""):
            new = counted_by(token, axis) or emit(aten.sym_size.int, token, axis)
            total = None
            if mask is not None:
                total = emit(aten.sym_size.int, mask, self.decoder.totals[mask])
            if whole:
                kept_length = emit(aten.sym_size.int, whole[0], 2)
            elif kept_length is None:
                kept_length = emit(operator.sub, total, new)
            if total is None:
                total = emit(operator.add, kept_length, new)
        return GrowingLengths(self.editor, new, total, kept_length)

    def _length_input(self) -> Node:
        """Where every layer keeps a window only, the length of the text is an input of its own."""
        with self.editor.graph.inserting_after(self.program.inputs[-1]):
            node = self.editor.graph.placeholder(PAST_LENGTH)
        node.meta["val"], node.meta["module"] = self._past_size(0), ""
        return node

    def _join(self, attention: Node, key: Node, value: Node) -> Pair:
        query, new_key, new_value, *rest = attention.args
        with self.editor.at(attention):
            keys = self.editor.emit(aten.cat.default, [key, new_key], 2)
            values = self.editor.emit(aten.cat.default, [value, new_value], 2)
        attention.args = (query, keys, values, *rest)
        return keys, values

    def _mask(self, attention: Node, mask: Node, lengths: GrowingLengths) -> Node:
        """The columns of the keys that the layer still has."""
        axis = len(shape(mask)) - 1
        if not self._kept_window(attention) or same_size(shape(mask)[axis], 1):
            return mask
        with self.editor.at(attention):
            keys = self.editor.emit(aten.sym_size.int, attention.args[1], 2)
            start = self.editor.emit(operator.sub, lengths.total, keys)
            return self.editor.emit(aten.slice.Tensor, mask, axis, start, lengths.total)

    def _kept(self, attention: Node, keys: Node, values: Node) -> Pair:
        window = self._kept_window(attention)
        if not window:
            return keys, values
        emit = self.editor.emit
        with self.editor.at(attention.next, attention.meta.get("module", "")):
            length = emit(aten.sym_size.int, keys, 2)
            start = emit(torch.sym_max, emit(operator.sub, length, window - 1), 0)
            kept = [emit(aten.slice.Tensor, node, 2, start, length) for node in (keys, values)]
        return kept[0], kept[1]


def resize_totals(editor: Editor, decoder: Decoder, resize: Callable[[Any], Any]) -> None:
    """Inputs with a value for every place get another size of that axis."""
    for node, axis in decoder.totals.items():
        if axis is not None:
            sizes = shape(node)
            sizes[axis] = resize(sizes[axis])
            with editor.mode:
                node.meta["val"] = torch.empty(sizes, dtype=node.meta["val"].dtype)


def first_computation(graph: fx.Graph) -> Node:
    """The first call, after those that only read the sizes of inputs."""
    for node in graph.nodes:
        if node.op == "output" or (node.op == "call_function" and not _reads_size(node)):
            return node
    raise AssertionError("a graph always ends in an output node")


def counted_by(token: Node, axis: int) -> Node | None:
    """The leading node that reads the size of an input, if there is one."""
    for node in token.graph.nodes:
        if node.op == "call_function" and not _reads_size(node):
            return None
        if _reads_size(node) and node.args == (token, axis):
            return node
    return None


def _reads_size(node: Node) -> bool:
    source = node.args[0] if node.args else None
    reads = node.target is aten.sym_size.int
    return reads and isinstance(source, fx.Node) and source.op == "placeholder"


def add_input(program: Program, editor: Editor, name: str, source: Any, size: Any) -> Node:
    """A placeholder after the inputs, shaped as `source` but with `size` places on axis 2."""
    assert isinstance(source, fx.Node)
    value = source.meta["val"]
    with program.graph.inserting_after(program.inputs[-1]):
        node = program.graph.placeholder(name)
    batch, heads, _, width = value.shape
    with editor.mode:
        node.meta["val"] = torch.empty((batch, heads, size, width), dtype=value.dtype)
    return node
