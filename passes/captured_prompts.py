"""Prompts that were captured with the model: computed once, now, instead of in every call.

PEFT numbers the virtual tokens for every text of a batch, and encodes the first text's alone:
`%e = expand(%numbers, [batch, P]); %s = slice(%e, 0, 0, 1); %p = mlp(embedding(%W, %s))`. A row of
something expanded is what was expanded, so that %p follows from weights alone.
"""

from __future__ import annotations

from typing import Any

import torch

from ..ir.edit import Editor, shape
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..ir.rewrite import Journal
from ..ir.weight_expressions import constant_nodes, evaluate

_ATEN = torch.ops.aten


def fold_captured(program: Program, journal: Journal, rule: str) -> int:
    """Fold what encodes captured prompts into weights `prompts`; returns how many there were."""
    editor = Editor(program)
    reached: set[Node] = set()
    for node in list(program.graph.find_nodes(op="call_function", target=_ATEN.slice.Tensor)):
        source = _unexpanded(node)
        if source is not None:
            reached.update(node.users)
            editor.replace(node, source)
    constant = constant_nodes(program)
    folded = 0
    for node in list(program.graph.nodes):
        if node not in reached or node not in constant:
            continue
        inner = [user for user in node.users if user in constant]
        reached.update(inner)
        if len(inner) < len(node.users) and journal.offers():
            value = evaluate(program, node).contiguous()
            new = editor.weight("prompts", value)
            editor.replace(node, new)
            journal.noted(rule, new, f"{shape(new)[-2]} virtual tokens")
            folded += 1
    editor.sweep()
    return folded


def _unexpanded(node: Node) -> Node | None:
    """What one row of an expanded value is, where the row was expanded along its first axis."""
    given = bound_arguments(node)
    wide: Any = given["self"]
    if wide.target is not _ATEN.expand.default or given["dim"] != 0 or given["step"] != 1:
        return None
    if (given["start"] or 0, given["end"]) != (0, 1):
        return None
    source: Any = wide.args[0]
    same = shape(source) == shape(node)
    return source if same and all(isinstance(size, int) for size in shape(source)) else None
