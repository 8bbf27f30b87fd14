"""Keys and values that precede the text in every call of a decoder with a KV cache.

Before: `%k2 = cat(%past_key, %k)`, %k2 returned. After: `%p = cat(%constant, %past_key)`,
`%k2 = cat(%p, %k)`, and `%k2[P:]` returned. The cache that goes in and out holds the text alone;
positions, masks and causality follow from the lengths of what the old program reads as its past.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ir.edit import Editor, infer, shape, value_of
from ..ir.errors import PlanishError
from ..ir.program import Node, Program

_ATEN = torch.ops.aten


class CannotFold(PlanishError):
    """Virtual tokens do not fit the program."""


def past_inputs(program: Program) -> list[Node]:
    """past_key_0, past_value_0, past_key_1, ...; raises CannotFold if the cache cannot grow."""
    cache = program.metadata.get("cache")
    form = cache.get("form") if isinstance(cache, dict) else None
    found = [n for n in program.inputs if n.name.startswith(("past_key_", "past_value_"))]
    fixed = next((n for n in found if isinstance(shape(n)[2], int)), None)
    if form != "growing" or not found or fixed is not None:
        raise CannotFold(
            "the cache does not grow with the text, so nothing can precede it",
            expected="insert_kv_cache without static and without a ring",
            found=f"a {form} cache",
            fix="run insert_kv_cache with its defaults before",
        )
    return found


def precede(program: Program, constants: Sequence[Tensor], label: str) -> list[Node]:
    """Put constants [1, kv_heads, P, head] before the past of each layer, in the inputs' order.

    Returns the joined pasts. Raises CannotFold where a constant does not fit its past.
    """
    past = past_inputs(program)
    _check(past, constants)
    count = int(constants[0].shape[2])
    editor = Editor(program)
    results = program.results
    joined: list[Node] = []
    first = next(n for n in program.graph.nodes if n.op == "call_function")
    for node, constant in zip(past, constants, strict=True):
        kept = constant.to(value_of(node).dtype).contiguous()
        weight = editor.weight(f"{label}.{node.name.removeprefix('past_')}", kept)
        with editor.at(first, ""):
            batch = editor.emit(_ATEN.sym_size.int, node, 0)
            wide = editor.emit(_ATEN.expand.default, weight, [batch, -1, -1, -1])
            new = editor.emit(_ATEN.cat.default, [wide, node], 2)
        _instead(node, new, (batch,))
        joined.append(new)
    mask = _mask(program)
    if mask is not None:
        _lengthen_mask(editor, mask, count, first)
    refresh(program)
    with editor.at(program.output, ""):
        for place in range(len(results) - len(past), len(results)):
            results[place] = editor.emit(_ATEN.slice.Tensor, results[place], 2, count, sys.maxsize)
    program.output.args = (results,)
    cache = program.metadata["cache"]
    if cache.get("context") is not None:
        program.metadata["cache"] = {**cache, "context": cache["context"] - count}
    return joined


def _check(past: Sequence[Node], constants: Sequence[Tensor]) -> None:
    for node, constant in zip(past, constants, strict=True):
        sizes = shape(node)
        if list(constant.shape[:2]) != [1, sizes[1]] or constant.shape[3] != sizes[3]:
            raise CannotFold(
                f"the constants for {node.name} do not fit",
                expected=f"[1, {sizes[1]}, tokens, {sizes[3]}]",
                found=str(list(constant.shape)),
            )


def _mask(program: Program) -> Node | None:
    name = program.metadata["cache"].get("mask")
    return next((n for n in program.inputs if n.name == name), None)


def _lengthen_mask(editor: Editor, mask: Node, count: int, first: Node) -> None:
    """The virtual tokens are never padding."""
    with editor.at(first, ""):
        batch = editor.emit(_ATEN.sym_size.int, mask, 0)
        dtype = value_of(mask).dtype
        ones = editor.emit(_ATEN.full.default, [batch, count], 1, dtype=dtype)
        new = editor.emit(_ATEN.cat.default, [ones, mask], 1)
    _instead(mask, new, (batch,))


def _instead(old: Node, new: Node, kept: tuple[Node, ...]) -> None:
    """Every reader reads the new value, but for those that it is made with."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and user not in kept)


def refresh(program: Program) -> None:
    """The fake values of all computed nodes, after lengths changed."""
    mode = Editor(program).mode
    for node in program.graph.nodes:
        if node.op == "call_function":
            node.meta["val"] = infer(node, mode)
