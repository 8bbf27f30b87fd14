"""Attention and rotary embeddings become calls of their kernels, where these take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ir.edit import Editor
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from ..kernels.catalog import triton_kernels
from .gpu_products import declined, emit_several

_PLANISH = torch.ops.planish


def lower_attentions(editor: Editor, archs: Sequence[str]) -> list[str]:
    """Every attention that flash attention takes; a sentence for each that stays."""
    spec, sentences = triton_kernels()["attention"], list[str]()
    for node in editor.graph.find_nodes(op="call_function", target=_PLANISH.attention.default):
        call = bound_arguments(node)
        reason = declined(spec, archs, call)
        if reason:
            sentences.append(f"%{node.name} keeps its scores in memory because {reason}")
            continue
        with editor.at(node):
            out, _ = emit_several(editor, spec, call, node)
        editor.replace(node, out)
    return sentences


def lower_rotaries(editor: Editor, archs: Sequence[str]) -> list[str]:
    """Rotary embeddings, those of queries and keys of one attention in one launch."""
    spec, sentences = triton_kernels()["rotary"], list[str]()
    waiting = editor.graph.find_nodes(op="call_function", target=_PLANISH.rotary.default)
    while waiting:
        first = waiting.pop(0)
        second = waiting[0] if waiting and _paired(first, waiting[0]) else None
        given = bound_arguments(first)
        call = {"q": given["x"], "k": None, **{k: given[k] for k in ("cos", "sin", "interleaved")}}
        if second is not None:
            both = {**call, "k": bound_arguments(second)["x"]}
            if declined(spec, archs, both) is None:
                call = both
                waiting.pop(0)
            else:
                second = None
        reason = declined(spec, archs, call)
        if reason:
            sentences.append(f"%{first.name} is turned in several operations because {reason}")
            continue
        last = second or first
        with editor.at(last):
            q, k = emit_several(editor, spec, call, last)
        q.meta["val"] = first.meta["val"]
        editor.replace(first, q)
        if second is not None:
            editor.replace(second, k)
    return sentences


def _paired(one: Node, other: Node) -> bool:
    """Whether two rotations use the same angles and neither needs the other."""
    a, b = bound_arguments(one), bound_arguments(other)
    same = all(a[key] is b[key] for key in ("cos", "sin")) and a["interleaved"] == b["interleaved"]
    return same and not _needs(b["x"], one) and all(user > other for user in one.users)


def _needs(node: Node, wanted: Node) -> bool:
    """Whether a value is computed from another that lies before it."""
    stack, seen = [node], set[Node]()
    while stack:
        found = stack.pop()
        if found is wanted:
            return True
        if found in seen or found < wanted:
            continue
        seen.add(found)
        stack += found.all_input_nodes
    return False
