"""Slices that cut a value into all its parts as one split.

Before: `%gate = slice(%gu, -1, 0, 80)`, `%up = slice(%gu, -1, 80, 160)`.
After: `%parts = split(%gu, [80, 80], -1)`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ..ir.edit import Editor
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program

_SLICE = torch.ops.aten.slice.Tensor
_SPLIT = torch.ops.aten.split_with_sizes.default


def join_slices(program: Program, editor: Editor) -> None:
    """Let one node cut what several cut before, where it is read by slices that fill it."""
    for source in list(program.graph.nodes):
        slices = [user for user in source.users if user.target is _SLICE]
        if len(slices) < 2 or not isinstance(source.meta.get("val"), Tensor):
            continue
        axes = {bound_arguments(node)["dim"] % source.meta["val"].dim() for node in slices}
        if len(axes) == 1:
            _join(editor, source, slices, axes.pop())


def _join(editor: Editor, source: Node, slices: list[Node], axis: int) -> None:
    length = source.meta["val"].shape[axis]
    spans = {node: _span(node, axis, length) for node in slices}
    ordered = sorted(set(spans.values()) - {None})  # type: ignore[type-var]
    ends = [0, *(end for _, end in ordered)]
    starts = [*(start for start, _ in ordered), length]
    if None in spans.values() or len(ordered) < 2 or starts != ends:
        return
    with editor.at(min(slices), source.meta.get("module", "")):
        parts = editor.emit(_SPLIT, source, [end - start for start, end in ordered], axis)
        for place, span in enumerate(ordered):
            for node in (node for node, found in spans.items() if found == span):
                part = editor.emit(operator.getitem, parts, place)
                part.meta["module"] = node.meta.get("module", "")
                editor.replace(node, part)


def _span(node: Node, axis: int, length: Any) -> tuple[int, int] | None:
    """(start, end) of a slice whose ends are known; None otherwise."""
    arguments = bound_arguments(node)
    width, start = node.meta["val"].shape[axis], arguments["start"] or 0
    known = all(isinstance(size, int) and size >= 0 for size in (length, width, start))
    return (start, start + width) if known and arguments["step"] == 1 else None
