"""Two readings of one length: places count the whole text, text values only the new tokens.

Every place value (a position, a rotary table, a mask) keeps its formula, with the whole text's
length; where text reads it, it reads the rows of the new tokens. Those rows are computed alone
where the operations allow (counting starts at `past`), otherwise cut from the whole value. Equal
because a row of the text is computed from its own place's row and from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ..ir.edit import Editor, infer, same_size
from ..ir.positional import is_size
from ..ir.program import Node
from .cache_inputs import LEAVE_OUT, CannotCache, Decoder, depends_on
from .cache_rows import COUNTS, row_sources

aten = torch.ops.aten
_FILLED_LIKE = {
    aten.ones_like.default: 1,
    aten.zeros_like.default: 0,
    aten.full_like.default: None,
}


class Lengths(Protocol):
    """How many tokens there are, and how the rows of the new ones are named."""

    @property
    def new(self) -> Node:
        """How many tokens are new."""
        ...

    @property
    def total(self) -> Any:
        """How many places there are: a node or a number."""
        ...

    def count_on(self, counted: Node) -> Node:
        """Places counted from 0, counted from the first new token instead."""
        ...

    def rows(self, value: Node, axis: int) -> Node:
        """The rows of the new tokens, of a value of all places."""
        ...


@dataclass(frozen=True)
class GrowingLengths:
    """The cache holds `past` tokens; the new ones come last."""

    editor: Editor
    new: Node
    total: Any
    past: Node

    def count_on(self, counted: Node) -> Node:
        return self.editor.emit(aten.add.Tensor, counted, self.past)

    def rows(self, value: Node, axis: int) -> Node:
        return self.editor.emit(aten.slice.Tensor, value, axis, self.past, self.total)


class PlaceForms:
    """Gives every reader of one program the form of lengths and places that it means."""

    def __init__(self, editor: Editor, decoder: Decoder, lengths: Lengths, first: Node) -> None:
        self.editor, self.decoder, self.lengths, self.first = editor, decoder, lengths, first
        self.nodes = list(editor.graph.nodes)
        self.axes = {node: self._length_axes(node) for node in decoder.places}
        self.sizes = {n: n.meta["val"] for n in self.nodes if is_size(n.meta.get("val"))}
        self.cut_tables: list[Node] = []
        self._given: dict[Node, tuple[Any, ...]] = {}
        self._made: dict[Any, Any] = {}

    def rewire(self, mask_of: Callable[[Node, Node], Node]) -> None:
        """Place values get the whole length, then text its own rows of them.

        mask_of: given a self-attention and its mask with the new tokens' rows, the mask for its
        keys.
        """
        for node in self.nodes:
            if node in self.decoder.places and node.op == "call_function":
                self._lengthen(node)
        for node in self.nodes:
            if node.op in ("call_function", "output") and not self._is_place(node):
                node.args = map_arg(node.args, self._for_text(node))
                node.kwargs = map_arg(node.kwargs, self._for_text(node))
        for node in self.decoder.attentions:
            mask = node.args[3] if len(node.args) > 3 else None
            if isinstance(mask, fx.Node):
                node.update_arg(3, mask_of(node, mask))

    def rows(self, node: Node, axes: tuple[int, ...]) -> Node:
        """A place value with only the new tokens' rows on these axes."""
        axes = tuple(axis for axis in axes if axis in self.axes.get(node, ()))
        if not axes:
            return node
        if (node, axes) not in self._made:
            with self._after(node):
                self._made[node, axes] = self._rows(node, axes)
        return self._made[node, axes]

    def size(self, node: Node, total: bool) -> Any:
        """A size in which the length stands for all places, or for the new tokens."""
        if node not in self.sizes or not depends_on(self.sizes[node], self.decoder.length):
            return node
        if (node, total) not in self._made:
            self._made[node, total] = self._size(node, total)
        return self._made[node, total]

    def _is_place(self, node: Node) -> bool:
        return node in self.decoder.places or node in self.sizes

    def _length_axes(self, node: Node) -> tuple[int, ...]:
        """The axes that counted the length, also of inputs that are longer by now."""
        if (axis := self.decoder.totals.get(node)) is not None:
            return (axis,)
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else ()
        return tuple(i for i, s in enumerate(sizes) if same_size(s, self.decoder.length))

    def _after(self, node: Node) -> Any:
        where = self.first if node.op != "call_function" else node.next
        return self.editor.at(where, node.meta.get("module", ""))

    def _lengthen(self, node: Node) -> None:
        """A place value keeps its formula at the length of the whole text."""
        if node in self.sizes:
            return
        like = _FILLED_LIKE.get(node.target, -1)  # type: ignore[arg-type]
        source: Any = node.args[0] if node.args else None
        if like != -1 and source not in self.decoder.places:
            self._fill_instead(node, source, node.args[1] if like is None else like)
        self._given[node] = node.args
        node.args = map_arg(node.args, lambda read: self.size(read, True))
        node.kwargs = map_arg(node.kwargs, lambda read: self.size(read, True))
        node.meta["val"] = infer(node, self.editor.mode)

    def _fill_instead(self, node: Node, source: Node, value: Any) -> None:
        """ones_like of a text value is ones of the same sizes, which can then be lengthened."""
        fake = node.meta["val"]
        with self.editor.at(node):
            sizes = [
                size if isinstance(size, int) else self.editor.emit(aten.sym_size.int, source, axis)
                for axis, size in enumerate(fake.shape)
            ]
        for size in sizes:
            if isinstance(size, fx.Node):
                self.sizes[size] = size.meta["val"]
        node.target = aten.full.default
        node.args, node.kwargs = (sizes, value), {"dtype": fake.dtype, "device": fake.device}

    def _for_text(self, reader: Node) -> Callable[[Node], Any]:
        attends = reader in self.decoder.attentions

        def read(node: Node) -> Any:
            if node in self.sizes:
                return self.size(node, False)
            if node not in self.decoder.places or node.op == "get_attr":
                return node
            if attends and len(reader.args) > 3 and node is reader.args[3]:
                return self.rows(node, (len(node.meta["val"].shape) - 2,))
            self._refuse_joined(node, reader)
            return self.rows(node, self.axes[node])

        return read

    def _refuse_joined(self, node: Node, reader: Node) -> None:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else ()
        length = self.decoder.length
        others = [s for a, s in enumerate(sizes) if a not in self.axes[node]]
        if any(depends_on(size, length) for size in others):
            raise CannotCache(
                f"%{reader.name} reads %{node.name}, in which places are joined with another axis",
                where=reader.meta.get("module", ""),
                expected=f"an axis of size {length}",
                found=str(list(sizes)),
                fix=LEAVE_OUT,
            )

    def _rows(self, node: Node, axes: tuple[int, ...]) -> Node:
        editor = self.editor
        if node.target in COUNTS and self._counts_from_number(node):
            args: Any = map_arg(self._given[node], lambda read: self.size(read, False))
            return self.lengths.count_on(editor.emit(node.target, *args, **node.kwargs))
        if (table := self._head_of_table(node, axes)) is not None:
            return self.lengths.rows(table, axes[0])
        wanted = row_sources(node, axes)
        if wanted is not None:
            args = wanted.arguments(self._given[node], self.rows, self._size_argument)
            return editor.emit(node.target, *args, **node.kwargs)
        if len(self.axes[node]) > 1:
            self.cut_tables.append(node)
        rows = node
        for axis in axes:
            rows = self.lengths.rows(rows, axis)
        return rows

    def _size_argument(self, argument: Any, of_rows: bool) -> Any:
        return self.size(argument, not of_rows) if isinstance(argument, fx.Node) else argument

    def _counts_from_number(self, node: Node) -> bool:
        start = node.args[0] if node.target is not aten.arange.default else 0
        step = node.args[2] if len(node.args) > 2 else 1
        return isinstance(start, (int, float)) and isinstance(step, int) and step == 1

    def _head_of_table(self, node: Node, axes: tuple[int, ...]) -> Node | None:
        """The table, if the node is its first rows: slice(table, axis, 0, length)."""
        if node.target is not aten.slice.Tensor or len(axes) != 1:
            return None
        source, axis, start = node.args[0], node.args[1], node.args[2]
        table = isinstance(source, fx.Node) and source.op == "get_attr"
        plain = start in (None, 0) and (len(node.args) < 5 or node.args[4] == 1)
        return source if table and plain and axis == axes[0] else None  # type: ignore[return-value]

    def _size(self, node: Node, total: bool) -> Any:
        if same_size(self.sizes[node], self.decoder.length):
            return self.lengths.total if total else self.lengths.new
        source = node.args[0] if node.args else None
        if node.target is aten.sym_size.int:
            if (source in self.decoder.places) == total:
                return node
        elif node.op == "call_function":
            args: Any = map_arg(node.args, lambda read: self.size(read, total))
            if all(isinstance(value, int) for value in args):
                return node.target(*args)  # type: ignore[operator]
            with self._after(node):
                return self.editor.emit(node.target, *args)
        raise CannotCache(
            f"%{node.name} is a size of the text that cannot be told from the new tokens",
            where=node.meta.get("module", ""),
            expected=f"the size {self.decoder.length}, or arithmetic on it",
            found=str(self.sizes[node]),
            fix=LEAVE_OUT,
        )
