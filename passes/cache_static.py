"""The static form of a cache: preallocated buffers and the number of tokens in them.

New keys and values are written at their own places (functionally: a new buffer comes out); keys
that are not written yet are masked. A windowed layer may have a ring of w slots instead: the key
of place p lies in slot p mod w, and the new tokens see the ring and each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.edit import Editor, same_size, shape, value_of
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from .cache_growing import Pair, add_input, counted_by, first_computation, resize_totals
from .cache_inputs import Decoder
from .cache_positions import PlaceForms

aten = torch.ops.aten
POSITION = "position"


@dataclass(frozen=True)
class StaticLengths:
    """The buffers have `total` places; the new tokens stand at `places` (int64[new])."""

    editor: Editor
    new: Node
    total: int
    position: Node
    places: Node

    def count_on(self, counted: Node) -> Node:
        return self.editor.emit(aten.add.Tensor, counted, self.position)

    def rows(self, value: Node, axis: int) -> Node:
        return self.editor.emit(aten.index_select.default, value, axis, self.places)


@dataclass(frozen=True)
class _Keys:
    """What the attentions of one window share.

    visible: bool[new, keys]; columns: int64[keys], the place of each key, where that is not its
    index; kept: int64[slots], which of the keys go into the ring.
    """

    visible: Node
    columns: Node | None = None
    kept: Node | None = None


class StaticCache:
    """Inserts past_key_i, past_value_i [batch, kv_heads, slots, head] and `position` int64[]."""

    def __init__(
        self, program: Program, editor: Editor, decoder: Decoder, ring: bool, context: int
    ) -> None:
        self.program, self.editor, self.decoder = program, editor, decoder
        self.ring, self.context = ring, context
        self.first = first_computation(editor.graph)
        self.notes: list[str] = []
        self._keys: dict[int, _Keys] = {}
        self._masks: dict[tuple[int, Node], Node] = {}

    def insert(self) -> list[Pair]:
        """Edit the program; returns the buffers to be kept, in order."""
        past = [self._inputs(place, node) for place, node in enumerate(self.decoder.attentions)]
        lengths = self._lengths()
        forms = PlaceForms(self.editor, self.decoder, lengths, self.first)
        forms.rewire(lambda node, mask: mask)
        self.notes += [f"%{node.name} is computed whole and cut" for node in forms.cut_tables]
        return [
            self._attend(node, pair, lengths)
            for node, pair in zip(self.decoder.attentions, past, strict=True)
        ]

    def kept(self, attention: Node) -> int:
        """How many slots an attention has."""
        return self._slots(int(bound_arguments(attention)["window"]))

    def _slots(self, window: int) -> int:
        return window if self._is_ring(window) else self.context

    def _is_ring(self, window: int) -> bool:
        return self.ring and 0 < window < self.context

    def _inputs(self, place: int, attention: Node) -> Pair:
        slots = self.kept(attention)
        key, value = (
            add_input(self.program, self.editor, f"past_{kind}_{place}", source, slots)
            for kind, source in zip(("key", "value"), attention.args[1:3], strict=True)
        )
        for node in (key, value):
            node.meta["module"] = attention.meta.get("module", "")
        return key, value

    def _lengths(self) -> StaticLengths:
        resize_totals(self.editor, self.decoder, lambda size: self.context)
        with self.editor.graph.inserting_after(self.program.inputs[-1]):
            position = self.editor.graph.placeholder(POSITION)
        with self.editor.mode:
            position.meta["val"] = torch.empty((), dtype=torch.int64)
        position.meta["module"] = ""
        token, axis = next(iter(self.decoder.tokens.items()))
        with self.editor.at(self.first, ""):
            new = counted_by(token, axis) or self.editor.emit(aten.sym_size.int, token, axis)
            places = self.editor.emit(aten.add.Tensor, self._count(new), position)
        return StaticLengths(self.editor, new, self.context, position, places)

    def _count(self, end: Any) -> Node:
        return self.editor.emit(aten.arange.default, end, dtype=torch.int64, device=self._device())

    def _device(self) -> torch.device:
        return value_of(self.decoder.attentions[0]).device

    def _attend(self, attention: Node, past: Pair, lengths: StaticLengths) -> Pair:
        """Let an attention read the buffers; returns what is to be kept."""
        arguments = bound_arguments(attention)
        window = int(arguments["window"])
        shared = self._shared(window, lengths)
        emit = self.editor.emit
        keep: list[Node] = []
        read: list[Node] = []
        with self.editor.at(attention):
            for old, new in zip(past, attention.args[1:3], strict=True):
                if shared.kept is None:
                    read.append(emit(aten.index_copy.default, old, 2, lengths.places, new))
                    keep.append(read[-1])
                else:
                    read.append(emit(aten.cat.default, [old, new], 2))
                    keep.append(emit(aten.index_select.default, read[-1], 2, shared.kept))
            mask = self._mask(arguments["mask"], shared, window)
        sinks = [arguments["sinks"]] if arguments["sinks"] is not None else []
        attention.args = (attention.args[0], *read, mask, *sinks)
        replaced = ("causal", "window", "mask", "sinks")
        attention.kwargs = {k: v for k, v in attention.kwargs.items() if k not in replaced}
        return keep[0], keep[1]

    def _shared(self, window: int, lengths: StaticLengths) -> _Keys:
        found = self._keys.get(window)
        if found is None:
            with self.editor.at(self.first, ""):
                rows = self.editor.emit(aten.unsqueeze.default, lengths.places, 1)
                make = self._ring_keys if self._is_ring(window) else self._buffer_keys
                found = self._keys[window] = make(window, rows, lengths)
        return found

    def _buffer_keys(self, window: int, rows: Node, lengths: StaticLengths) -> _Keys:
        """Keys lie at their places: query i sees key j where j <= i and j > i - window."""
        return _Keys(self._seen(self._count(self.context), rows, window))

    def _ring_keys(self, window: int, rows: Node, lengths: StaticLengths) -> _Keys:
        """The keys are those in the ring, each at the last place of its slot, then the new ones."""
        emit = self.editor.emit
        slots = self._count(window)
        held = self._last_in_slot(slots, lengths.position, window)
        columns = emit(aten.cat.default, [held, lengths.places], 0)
        written = emit(aten.ge.Scalar, columns, 0)
        visible = emit(aten.logical_and.default, written, self._seen(columns, rows, window))
        end = emit(aten.add.Tensor, lengths.position, lengths.new)
        last = self._last_in_slot(slots, end, window)
        shift = emit(aten.add.Tensor, emit(aten.sub.Tensor, last, lengths.position), window)
        is_new = emit(aten.ge.Tensor, last, lengths.position)
        kept = emit(aten.where.self, is_new, shift, slots)
        return _Keys(visible, emit(aten.clamp_min.default, columns, 0), kept)

    def _last_in_slot(self, slots: Node, count: Node, window: int) -> Node:
        """The last place before `count` that falls on each slot; below 0 if none did yet."""
        emit = self.editor.emit
        last = emit(aten.sub.Tensor, count, 1)
        behind = emit(aten.remainder.Scalar, emit(aten.sub.Tensor, last, slots), window)
        return emit(aten.sub.Tensor, last, behind)

    def _seen(self, columns: Node, rows: Node, window: int) -> Node:
        emit = self.editor.emit
        seen = emit(aten.le.Tensor, columns, rows)
        if not window:
            return seen
        near = emit(aten.gt.Tensor, columns, emit(aten.sub.Tensor, rows, window))
        return emit(aten.logical_and.default, seen, near)

    def _mask(self, mask: Any, keys: _Keys, window: int) -> Node:
        """The keys of the text so far, and of those the ones that the old mask shows."""
        if not isinstance(mask, fx.Node):
            return keys.visible
        found = self._masks.get((window, mask))
        if found is None:
            found = self._masks[window, mask] = self._joined(mask, keys)
        return found

    def _joined(self, mask: Node, keys: _Keys) -> Node:
        axis = len(shape(mask)) - 1
        if keys.columns is not None and not same_size(shape(mask)[axis], 1):
            mask = self.editor.emit(aten.index_select.default, mask, axis, keys.columns)
        if value_of(mask).dtype == torch.bool:
            return self.editor.emit(aten.logical_and.default, mask, keys.visible)
        return self.editor.emit(aten.where.ScalarOther, keys.visible, mask, -float("inf"))
