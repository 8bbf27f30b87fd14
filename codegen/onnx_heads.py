"""Heads beside one another or apart: [batch, length, heads * head], [batch, heads, length, head].

Models write head-wise values apart; onnxruntime's attention nodes want them beside one another, as
the projections give them. Here the axes are moved back, which mostly undoes what the model did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..ir.edit import Editor, same_size, shape
from ..ir.pattern import bound_arguments
from ..ir.program import Node

_ATEN = torch.ops.aten
_RESHAPES = {_ATEN.reshape.default, _ATEN.view.default, _ATEN._unsafe_view.default}
_SLICE = _ATEN.slice.Tensor
_NORMS = {_ATEN.layer_norm.default, torch.ops.planish.rms_norm.default}


def merged(editor: Editor, node: Node) -> Node:
    """[batch, heads, length, head] as [batch, length, heads * head]."""
    batch, heads, length, head = shape(node)
    apart = _by_length(editor, node)
    if apart.target in _RESHAPES:
        source: Any = apart.args[0]
        have = shape(source)
        wanted = [batch, length, heads * head]
        if len(have) == 3 and all(map(same_size, have, wanted)):
            return source
    return editor.emit(_ATEN.reshape.default, apart, [_size(editor, apart, 0), -1, heads * head])


def moves_back(node: Node) -> bool:
    """Whether `merged` has no axes to move: the heads of the value come beside one another."""
    inner = node.args[0] if node.args else None
    return _swaps_heads(node) or _is_norm_of_heads(node, inner)


def _is_norm_of_heads(node: Node, inner: Any) -> bool:
    if node.target not in _NORMS or len(node.users) != 1 or not _swaps_heads(inner):
        return False
    is_rms = node.target is not _ATEN.layer_norm.default
    return is_rms or len(bound_arguments(node)["normalized_shape"]) == 1


def _by_length(editor: Editor, node: Node) -> Node:
    """[batch, heads, length, head] as [batch, length, heads, head]; norms of heads go along."""
    if _swaps_heads(node):
        return node.args[0]  # type: ignore[return-value]
    inner = node.args[0] if node.args else None
    if _is_norm_of_heads(node, inner):
        source: Any = inner.args[0]  # type: ignore[union-attr]
        return editor.emit(node.target, source, *node.args[1:], **node.kwargs)
    return editor.emit(_ATEN.transpose.int, node, 1, 2)


def _swaps_heads(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target is _ATEN.transpose.int:
        return sorted(axis % 4 for axis in node.args[1:]) == [1, 2]  # type: ignore[operator]
    if node.target is _ATEN.permute.default:
        return [axis % 4 for axis in node.args[1]] == [0, 2, 1, 3]  # type: ignore[union-attr]
    return False


def _size(editor: Editor, node: Node, axis: int) -> Any:
    known = shape(node)[axis]
    return known if isinstance(known, int) else editor.emit(_ATEN.sym_size.int, node, axis)


def beside(parts: Sequence[Node]) -> Node | None:
    """The value [batch, length, channels] whose channels are these parts in order, if there is."""
    first = parts[0]
    source: Any = first.args[0] if first.target is _SLICE else None
    if source is None:
        return None
    at = 0
    for part in parts:
        width = shape(part)[2]
        if not _is_slice(part, source, at, width):
            return None
        at += width
    return source if same_size(at, shape(source)[2]) else None


def _is_slice(node: Node, source: Node, start: int, width: int) -> bool:
    if node.target is not _SLICE:
        return False
    arguments = bound_arguments(node)
    begins = arguments["start"] or 0
    same = arguments["self"] is source and arguments["dim"] in (2, -1) and arguments["step"] == 1
    return same and begins == start and isinstance(width, int)


def read_merged(editor: Editor, old: Node, new: Node, heads: int) -> None:
    """Readers of `old` [batch, heads, length, head] read `new`, its heads beside one another.

    Readers that moved the axes back read `new` as it is.
    """
    for reader in [user for user in old.users if _swaps_heads(user)]:
        for view in [user for user in reader.users if user.target in _RESHAPES]:
            view.args = (new, *view.args[1:])
            if len(shape(view)) == 3 and all(map(same_size, shape(view), shape(new))):
                editor.replace(view, new)
        if reader.users:
            editor.replace(reader, _apart(editor, reader, new, heads))
    if any(not _swaps_heads(user) or user.users for user in old.users):
        with editor.at(old):
            apart = _apart(editor, old, new, heads)
            editor.replace(old, editor.emit(_ATEN.transpose.int, apart, 1, 2))


def _apart(editor: Editor, at: Node, new: Node, heads: int) -> Node:
    with editor.at(at):
        batch, length = _size(editor, new, 0), _size(editor, new, 1)
        return editor.emit(_ATEN.reshape.default, new, [batch, length, heads, -1])
