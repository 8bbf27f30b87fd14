"""Queries, keys and values as attention takes them: [batch, heads, length, channels].

Reads back from the operands of the two products: through the transpose of the keys, the reshape
that joins batch and heads, the repetition of grouped heads, and scales on the way. What is taken
off is replayed without it, for example `transpose(reshape(s * x))` as `transpose(reshape(x))`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ..ir.edit import Editor, same_size, shape
from ..ir.program import Node
from .attention_scores import times_number

aten = torch.ops.aten
Number = Callable[[Any], float | None]

JOIN_GROUPS = (aten.flatten.using_ints, (1, 2))
"""[b, kv_heads, groups, length, channels] to [b, heads, length, channels]."""

_LINEAR = (
    torch.ops.planish.rotary.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.expand.default,
)


@dataclass(frozen=True)
class Operand:
    """`replay` applied to `base`: calls (target, arguments after the first), in order.

    sizes: the sizes of the result. joined: whether batch and heads were one axis, [b * h, ...].
    """

    base: Node
    sizes: tuple[Any, ...]
    replay: tuple[tuple[Any, tuple[Any, ...]], ...] = field(default=())
    factor: float = 1.0
    joined: bool = False

    def then(self, target: Any, *args: Any, sizes: tuple[Any, ...]) -> Operand:
        return replace(self, replay=(*self.replay, (target, args)), sizes=sizes)

    def emit(self, editor: Editor) -> Node:
        node = self.base
        for target, args in self.replay:
            node = editor.emit(target, node, *args)
        return node


def operand(node: Node, number: Number) -> Operand:
    """An operand [.., length, channels], its batch and heads parted, outer scales taken off."""
    node, factor = _without_scale(node, number)
    if len(shape(node)) == 3:
        parted = _parted(node)
        if parted is not None:
            return replace(parted, factor=factor)
    return Operand(node, tuple(shape(node)), factor=factor)


def turned_operand(node: Node, number: Number) -> Operand:
    """The same for an operand given as [.., channels, length]."""
    node, factor = _without_scale(node, number)
    rank = len(shape(node))
    if node.target is aten.transpose.int and {int(d) % rank for d in node.args[1:]} == {  # type: ignore[call-overload]
        rank - 2,
        rank - 1,
    }:
        source: Any = node.args[0]
        found = operand(source, number)
        return replace(found, factor=found.factor * factor)
    sizes = (*shape(node)[:-2], shape(node)[-1], shape(node)[-2])
    if node.target is aten.permute.default:
        order: list[int] = list(node.args[1])  # type: ignore[arg-type]
        order[-1], order[-2] = order[-2], order[-1]
        source = node.args[0]
        found = Operand(source, tuple(shape(source)), factor=factor)
        return _permuted(found, order, sizes)
    turned = Operand(node, tuple(shape(node)), factor=factor)
    return turned.then(aten.transpose.int, rank - 2, rank - 1, sizes=sizes)


def _permuted(found: Operand, order: list[int], sizes: tuple[Any, ...]) -> Operand:
    moved = [axis for axis, source in enumerate(order) if axis != source]
    if not moved:
        return found
    if len(moved) == 2:
        return found.then(aten.transpose.int, *moved, sizes=sizes)
    return found.then(aten.permute.default, order, sizes=sizes)


def _without_scale(node: Node, number: Number) -> tuple[Node, float]:
    factor = 1.0
    while (scaled := times_number(node, number)) is not None:
        node, factor = scaled[0], factor * scaled[1]
    return node, factor


def unscaled(found: Operand, number: Number) -> Operand:
    """Without the scales under rotary embeddings and layout operations, which are replayed."""
    node, chain, factor = found.base, list[tuple[Any, tuple[Any, ...]]](), 1.0
    best = (found.base, 0, 1.0)
    while True:
        scaled = times_number(node, number)
        if scaled is not None:
            node, factor = scaled[0], factor * scaled[1]
            best = (node, len(chain), factor)
        elif node.target in _LINEAR and isinstance(node.args[0], fx.Node):
            chain.append((node.target, tuple(node.args[1:])))
            node = node.args[0]
        else:
            break
    base, depth, factor = best
    replay = (*reversed(chain[:depth]), *found.replay)
    return replace(found, base=base, replay=replay, factor=found.factor * factor)


def _parted(node: Node) -> Operand | None:
    """[b * h, length, channels] as [b, h, length, channels], where a reshape joined them."""
    source: Any = node.args[0] if node.target is aten.reshape.default else None
    if source is None:
        return None
    sizes = shape(source)
    if len(sizes) not in (4, 5) or not _same(sizes[-2:], shape(node)[-2:]):
        return None
    if len(sizes) == 4:
        return Operand(source, tuple(sizes), joined=True)
    if not isinstance(sizes[1], int) or not isinstance(sizes[2], int):
        return None
    heads = sizes[1] * sizes[2]
    return Operand(source, (sizes[0], heads, *sizes[3:]), (JOIN_GROUPS,), joined=True)


def ungrouped(found: Operand) -> Operand | None:
    """The operand before its heads were repeated for grouped queries; None if they were not."""
    if found.replay == (JOIN_GROUPS,):
        found = replace(found, replay=())
    elif found.replay:
        return None
    node = found.base
    if node.target is aten.repeat_interleave.self_int and node.args[2:3] == (1,):
        return _before(found, node.args[0])
    if node.target is aten.reshape.default and isinstance(node.args[0], fx.Node):
        repeated: Any = node.args[0]
    else:
        repeated = node
    if repeated.target is not aten.expand.default:
        return None
    source: Any = repeated.args[0]
    before, after = shape(source), shape(repeated)
    if len(after) == 4 and repeated is node and before[1] == 1 and _same(before[2:], after[2:]):
        return _before(found, source) if same_size(before[0], after[0]) else None
    if len(after) != 5 or len(before) != 5 or before[2] != 1 or not _same(before[:2], after[:2]):
        return None
    if not _same(before[3:], found.sizes[2:]) or not isinstance(after[1], int):
        return None
    if after[1] * after[2] != found.sizes[1]:
        return None
    if source.target is aten.unsqueeze.default and source.args[1] == 2:
        return _before(found, source.args[0])
    sizes = (*before[:2], *before[3:])
    return replace(found, base=source).then(aten.squeeze.dim, 2, sizes=sizes)


def _before(found: Operand, source: Any) -> Operand:
    return replace(found, base=source, sizes=tuple(shape(source)))


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))
