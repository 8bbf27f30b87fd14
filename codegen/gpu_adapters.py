"""Adapters that are kept apart become calls of the kernel of low-rank updates."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..ir.edit import Editor, value_of
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from ..kernels.catalog import triton_kernels
from .gpu_calls import Calls, example

_ATEN = torch.ops.aten
PLANNER = "planish.kernels.adapt"


def lower_adapters(calls: Calls) -> list[str]:
    """Every `planish::adapters` that the kernel takes; a sentence for each that stays.

    The adapter of each row, and the rows sorted by it, are computed once for all products with as
    many rows.
    """
    from ..kernels.adapt import FEW  # Triton is needed from here on

    spec, sentences = triton_kernels()["lora"], list[str]()
    known: dict[Any, tuple[Node, Node]] = {}
    graph = calls.editor.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.planish.adapters.default):
        given = bound_arguments(node)
        chosen = given.pop("chosen")
        rows, order = _rows(calls.editor, node, given["x"], chosen, known)
        call: dict[str, Any] = {**given, "adapters": rows, "order": order}
        if calls.operators and example(value_of(rows)).shape[0] <= FEW:
            call["order"] = None  # an operator has one form: the one for the captured example
        reason = calls.declined(spec, call)
        if reason:
            sentences.append(f"%{node.name} applies its adapters in torch because {reason}")
        else:
            calls.replace(node, spec, call, planner=PLANNER)
    return sentences


def _rows(
    editor: Editor,
    node: Node,
    x: Node,
    chosen: Node,
    known: dict[tuple[Node, str], tuple[Node, Node]],
) -> tuple[Node, Node]:
    """int32 [rows]: the adapter of each row of x, and the rows sorted by it."""
    count = str(math.prod(value_of(x).shape[:-1]))
    if (chosen, count) in known:
        return known[chosen, count]
    with editor.at(node, module=""):
        batch = _size(editor, chosen, 0)
        joined = editor.emit(_ATEN.reshape.default, x, [batch, -1, value_of(x).shape[-1]])
        each = [batch, _size(editor, joined, 1)]
        column = editor.emit(_ATEN.unsqueeze.default, chosen, 1)
        spread = editor.emit(_ATEN.expand.default, column, each)
        rows = editor.emit(_ATEN.reshape.default, spread, [-1])
        rows = _int32(editor, rows)
        order = editor.emit(_ATEN.argsort.stable, rows, stable=True)
        known[chosen, count] = rows, _int32(editor, order)
    return known[chosen, count]


def _size(editor: Editor, node: Node, axis: int) -> Any:
    size = value_of(node).shape[axis]
    return size if isinstance(size, int) else editor.emit(_ATEN.sym_size.int, node, axis)


def _int32(editor: Editor, node: Node) -> Node:
    if value_of(node).dtype == torch.int32:
        return node
    return editor.emit(_ATEN._to_copy.default, node, dtype=torch.int32)
