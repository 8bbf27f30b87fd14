"""Build the mask that is left of a proof, from the graph's own values; each mask once a program."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from ..ir.edit import Editor, shape, value_of
from ..ir.program import Node
from .mask_parts import Bias, Part
from .prove_mask import Masking, Proof

aten = torch.ops.aten


@dataclass(frozen=True)
class Form:
    """How scores of three axes relate to [batch, heads, queries, keys].

    queries: a [batch, heads, ...] value; single: there is no axis of heads at all.
    """

    queries: Node
    heads: int
    single: bool = False


class MaskEmitter:
    """Emits masks into one program; equal ones are shared by all readers."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self._made: dict[Any, Node | None] = {}

    def mask(self, proof: Proof, maskings: tuple[Masking, ...], form: Form) -> Node | None:
        """The attention's mask argument, or None if nothing is left to mask."""
        flat = any(m.space == 3 for m in maskings)
        told = maskings if proof.explicit else ()
        key = (proof, told, form.single, form.queries if flat else None)
        if key not in self._made:
            made = (
                self._explicit(maskings, form, proof.floor)
                if proof.explicit
                else self._left(proof, form)
            )
            self._made[key] = made
        return self._made[key]

    def _left(self, proof: Proof, form: Form) -> Node | None:
        visible = self._all([self._part(part, form) for part in proof.parts])
        biases = [self._bias(bias, form) for bias in proof.biases]
        if not biases:
            return visible
        total = reduce(lambda a, b: self.editor.emit(aten.add.Tensor, a, b), biases)
        if visible is None:
            return total
        return self.editor.emit(aten.where.ScalarOther, visible, total, proof.fill)

    def _all(self, visible: list[Node]) -> Node | None:
        if not visible:
            return None
        return reduce(lambda a, b: self.editor.emit(aten.logical_and.default, a, b), visible)

    def _part(self, part: Part, form: Form) -> Node:
        node = part.node
        for wrap in part.wraps:
            node = self.editor.emit(wrap.target, node, *wrap.args[1:])
        if part.negated:
            node = self.editor.emit(aten.logical_not.default, node)
        return self._lifted(node, part.space, form)

    def _bias(self, bias: Bias, form: Form) -> Node:
        return self._lifted(self._scaled(bias.node, bias.factor, form), bias.space, form)

    def _scaled(self, node: Node, factor: float, form: Form) -> Node:
        if not value_of(node).is_floating_point():
            dtype = value_of(form.queries).dtype
            node = self.editor.emit(aten._to_copy.default, node, dtype=dtype)
        return node if factor == 1.0 else self.editor.emit(aten.mul.Tensor, node, factor)

    def _explicit(
        self, maskings: tuple[Masking, ...], form: Form, floor: float | None
    ) -> Node | None:
        """All that was done to the scores, done to zeros instead."""
        total: Node | None = None
        for masking in maskings:
            if masking.fill is None:
                node = self._lifted(
                    self._scaled(masking.node, masking.factor, form), masking.space, form
                )
                total = node if total is None else self.editor.emit(aten.add.Tensor, total, node)
                continue
            node = self._lifted(masking.node, masking.space, form)
            if masking.negated:
                node = self.editor.emit(aten.logical_not.default, node)
            if len(maskings) == 1 and masking.fill == -float("inf") and floor is None:
                return node
            total = total if total is not None else self._zero(form)
            total = self.editor.emit(aten.where.ScalarOther, node, total, masking.fill)
        if total is not None and floor is not None:
            total = self.editor.emit(aten.clamp_min.default, total, floor)
        return total

    def _zero(self, form: Form) -> Node:
        value = value_of(form.queries)
        return self.editor.emit(aten.full.default, [], 0, dtype=value.dtype, device=value.device)

    def _lifted(self, node: Node, space: int, form: Form) -> Node:
        """With an axis of heads, where the scores it was applied to had three axes."""
        sizes = shape(node)
        if space != 3 or len(sizes) != 3:
            return node
        if form.single or sizes[0] == 1:
            return self.editor.emit(aten.unsqueeze.default, node, 1 if form.single else 0)
        batch = self._size(form.queries, 0)
        rest = [self._size(node, axis) for axis in (1, 2)]
        return self.editor.emit(aten.reshape.default, node, [batch, form.heads, *rest])

    def _size(self, node: Node, axis: int) -> Any:
        size = shape(node)[axis]
        return size if isinstance(size, int) else self.editor.emit(aten.sym_size.int, node, axis)
