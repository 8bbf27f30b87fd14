"""Attention and rotary embeddings become calls of their kernels, where these take them."""

from __future__ import annotations

import torch

from ..ir.pattern import bound_arguments
from ..ir.program import Node
from ..kernels.catalog import triton_kernels
from .gpu_calls import Calls

_PLANISH = torch.ops.planish


def lower_attentions(calls: Calls) -> list[str]:
    """Every attention that flash attention takes; a sentence for each that stays."""
    spec, sentences = triton_kernels()["attention"], list[str]()
    graph = calls.editor.graph
    for node in graph.find_nodes(op="call_function", target=_PLANISH.attention.default):
        call = bound_arguments(node)
        reason = calls.declined(spec, call)
        if reason:
            sentences.append(f"%{node.name} is not flash attention because {reason}")
        else:
            calls.replace_several([node], spec, call, planner="planish.kernels.attend")
    return sentences


def lower_rotaries(calls: Calls) -> list[str]:
    """Rotary embeddings, those of queries and keys of one attention in one launch."""
    spec, sentences = triton_kernels()["rotary"], list[str]()
    graph = calls.editor.graph
    waiting = graph.find_nodes(op="call_function", target=_PLANISH.rotary.default)
    while waiting:
        first = waiting.pop(0)
        given = bound_arguments(first)
        call = {"q": given.pop("x"), "k": None, **given}
        if waiting and _paired(first, waiting[0]):
            both = {**call, "k": bound_arguments(waiting[0])["x"]}
            if calls.declined(spec, both) is None:
                calls.replace_several([first, waiting.pop(0)], spec, both)
                continue
        reason = calls.declined(spec, call)
        if reason:
            sentences.append(f"%{first.name} is turned in several operations because {reason}")
        else:
            calls.replace_several([first], spec, call)
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
