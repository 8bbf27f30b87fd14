"""Emit the keys or values of an attention anew, with fewer heads: each the mean of a group's.

The mean is taken of the projection's weights (and of what else belongs to single heads: biases,
norm weights); norms, rotary embedding and factors then work on fewer heads as they did on all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_arg

from ..ir.edit import Editor, same_size, shape, value_of
from ..ir.numerics import sqnr
from ..ir.positional import is_size
from ..ir.program import Node, Program
from ..ir.weights import Derived
from .find_projection import NotTraceable, data_of
from .head_channels import BY_HEAD, BY_PLACE, JOINED, Operand, Step

_ATEN = torch.ops.aten
_FROM_RIGHT = {BY_HEAD: 3, BY_PLACE: 2, JOINED: 1}
"""Where the axis of heads lies, counted from the right."""


@dataclass(frozen=True)
class Pooling:
    """An operand whose heads become `groups` heads; as many as there are leaves them apart."""

    operand: Operand
    groups: int

    @property
    def width(self) -> int:
        return self.operand.channels.shape[1]


def check(pooling: Pooling) -> None:
    """Raise NotTraceable if a step of the way treats heads in a way that has no mean."""
    for step in pooling.operand.steps:
        node = step.node
        if node.target is _ATEN.layer_norm.default and len(node.args[1]) != 1:  # type: ignore[arg-type]
            raise NotTraceable(f"%{node.name} normalizes over several axes")
        for part in _by_head(step):
            if part.op != "get_attr":
                raise NotTraceable(f"%{node.name} takes another %{part.name} for each head")


def kept(program: Program, pooling: Pooling) -> float:
    """Signal to noise in dB of the projection's weight when every head is its group's mean."""
    projection = pooling.operand.projection
    weight = program.weights[str(projection.weight.target)]
    rows = weight.t() if projection.transposed else weight
    heads = rows[pooling.operand.channels]
    repeated = heads.shape[0] // pooling.groups
    return sqnr(heads, _mean(heads, 0, pooling.groups).repeat_interleave(repeated, 0))


def emit(editor: Editor, attention: Node, pooling: Pooling) -> Node:
    """The operand [batch, groups, place, channel], emitted before the attention."""
    value = _emit_projection(editor, pooling)
    form = _Form(editor, value, _sizes(editor, attention, pooling.operand), pooling)
    for step in pooling.operand.steps:
        if step.layout is not None:
            form.lay_out(step.layout)
        editor.module = step.node.meta.get("module", "")
        form.value = _on_block(editor, step, form.value, pooling)
    editor.module = attention.meta.get("module", "")
    form.lay_out(BY_HEAD)
    return form.value


class _Form:
    """A value on its way, and the layout in which it is."""

    def __init__(
        self, editor: Editor, value: Node, sizes: tuple[Any, Any], pooling: Pooling
    ) -> None:
        self.editor, self.value, self.sizes, self.pooling = editor, value, sizes, pooling
        self.layout = JOINED if value_of(value).dim() == 3 else ""

    def lay_out(self, wanted: str) -> None:
        if self.layout == wanted:
            return
        if self.layout == BY_HEAD:
            self._transpose()
        heads = [self.pooling.groups, self.pooling.width]
        split = [heads[0] * heads[1]] if wanted == JOINED else heads
        if self.layout != BY_PLACE or wanted == JOINED:
            self.value = self.editor.emit(_ATEN.reshape.default, self.value, [*self.sizes, *split])
        self.layout = JOINED if wanted == JOINED else BY_PLACE
        if wanted == BY_HEAD:
            self._transpose()

    def _transpose(self) -> None:
        self.value = self.editor.emit(_ATEN.transpose.int, self.value, 1, 2)
        self.layout = BY_PLACE if self.layout == BY_HEAD else BY_HEAD


def _sizes(editor: Editor, attention: Node, operand: Operand) -> tuple[Any, Any]:
    """The sizes batch and place as numbers or nodes; -1 for places that no node counts."""
    batch, _, places, _ = shape(operand.value)
    count, found = _size(attention, batch), _size(attention, places)
    if count is None:
        source = next(
            (node, axis)
            for node in [*editor.program.inputs, attention.args[0]]
            for axis, size in enumerate(getattr(node.meta["val"], "shape", ()))  # type: ignore[union-attr]
            if same_size(size, batch)
        )
        count = editor.emit(_ATEN.sym_size.int, *source)
    return count, -1 if found is None else found


def _size(before: Node, wanted: Any) -> Any:
    """A size as a number, or the node that counts it already; None if there is none."""
    if isinstance(wanted, int):
        return wanted
    for node in before.graph.nodes:
        if node is before:
            break
        value = node.meta.get("val")
        if node.op == "call_function" and is_size(value) and same_size(value, wanted):
            return node
    return None


def _emit_projection(editor: Editor, pooling: Pooling) -> Node:
    projection = pooling.operand.projection
    editor.module = projection.node.meta.get("module", "")
    axis = 1 if projection.transposed else 0
    weight = _pooled_weight(editor, projection.weight, axis, pooling)
    bias = projection.bias and _pooled_weight(editor, projection.bias, 0, pooling)
    if not projection.transposed:
        given = (projection.input, weight) if bias is None else (projection.input, weight, bias)
        return editor.emit(_ATEN.linear.default, *given)
    if bias is None:
        return editor.emit(projection.node.target, projection.input, weight)
    return editor.emit(_ATEN.addmm.default, bias, projection.input, weight)


def _pooled_weight(editor: Editor, old: Node, axis: int, pooling: Pooling) -> Node:
    compute = functools.partial(_of_heads, pooling.operand.channels, axis, pooling.groups)
    size = pooling.groups * pooling.width
    return _new_weight(editor, old, axis, size, compute, pooling.operand.name)


def _new_weight(
    editor: Editor,
    old: Node,
    axis: int,
    size: int,
    compute: Callable[[Tensor], Tensor],
    part: str,
) -> Node:
    """A weight computed of an old one, of another size on one axis: stem.part.tail by name."""
    name = str(old.target)
    entry = editor.program.weights.entry(name)
    form = list(entry.shape)
    form[axis] = size
    stem, _, tail = name.rpartition(".")
    label = ".".join(filter(None, (stem, part, tail)))
    return editor.weight(
        label, Derived((entry,), compute, torch.Size(form), entry.dtype, "heads averaged")
    )


def _of_heads(channels: Tensor, axis: int, groups: int, weight: Tensor) -> Tensor:
    """The channels of all heads [.., heads x channel, ..], the mean of each group's heads."""
    taken = weight.index_select(axis, channels.flatten()).unflatten(axis, tuple(channels.shape))
    return _mean(taken, axis, groups).flatten(axis, axis + 1)


def _mean(weight: Tensor, axis: int, groups: int) -> Tensor:
    """The mean over each run of heads on `axis`, which then holds `groups` of them."""
    heads = weight.shape[axis]
    if heads == groups:
        return weight
    grouped = weight.unflatten(axis, (groups, heads // groups))
    return grouped.mean(axis + 1, dtype=torch.float64).to(weight.dtype)


def _joined_mean(groups: int, heads: int, weight: Tensor) -> Tensor:
    """For a weight [heads x channel] of a step that sees all heads at once."""
    return _mean(weight.unflatten(-1, (heads, -1)), weight.dim() - 1, groups).flatten(-2)


def _on_block(editor: Editor, step: Step, value: Node, pooling: Pooling) -> Node:
    """The step on its channels of each head; the others pass by."""
    if step.block is None:
        return _emit_step(editor, step, value, pooling)
    start, end = step.block
    ends = [(0, start), (start, end), (end, pooling.width)]
    parts = [editor.emit(_ATEN.slice.Tensor, value, 3, a, b) if a < b else None for a, b in ends]
    parts[1] = _emit_step(editor, step, parts[1], pooling)  # type: ignore[arg-type]
    return editor.emit(_ATEN.cat.default, [part for part in parts if part is not None], 3)


def _emit_step(editor: Editor, step: Step, value: Node, pooling: Pooling) -> Node:
    node = step.node
    changed: dict[Node, Node] = {data_of(node): value}
    for part in _by_head(step):
        changed[part] = _pooled_part(editor, part, step, pooling)
    args = list(map_arg(node.args, lambda read: changed.get(read, read)))
    if node.target is _ATEN.layer_norm.default and step.layout == JOINED:
        args[1] = [pooling.groups * pooling.width]
    kwargs = map_arg(node.kwargs, lambda read: changed.get(read, read))
    return editor.emit(node.target, *args, **kwargs)


def _pooled_part(editor: Editor, part: Node, step: Step, pooling: Pooling) -> Node:
    heads, groups = pooling.operand.heads, pooling.groups
    axis = _head_axis(part, step)
    assert axis is not None
    if step.layout == JOINED:
        compute = functools.partial(_joined_mean, groups, heads)
        size = groups * pooling.width
    else:
        compute = functools.partial(_mean, axis=axis, groups=groups)
        size = groups
    return _new_weight(editor, part, axis, size, compute, pooling.operand.name)


def _by_head(step: Step) -> list[Node]:
    """The tensors besides the value itself that the step takes and that tell heads apart."""
    data = data_of(step.node)
    read = [node for node in step.node.all_input_nodes if node is not data]
    return [part for part in read if _head_axis(part, step) is not None]


def _head_axis(part: Node, step: Step) -> int | None:
    """The axis on which a broadcast tensor tells heads apart, if it does."""
    value = part.meta.get("val")
    if step.layout is None or not isinstance(value, Tensor):
        return None
    axis = value.dim() - _FROM_RIGHT[step.layout]
    return axis if axis >= 0 and not same_size(value.shape[axis], 1) else None
