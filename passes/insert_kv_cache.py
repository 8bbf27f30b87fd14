"""Insert a KV cache: a full-sequence causal decoder becomes a program for prefill and decode.

Before: `%y = attention(%q, %k, %v, causal=True)` over the whole text, positions `arange(length)`.
After: `%k2 = cat(%past_key, %k)`, `%v2 = cat(%past_value, %v)`, `%y = attention(%q, %k2, %v2,
causal=True)`, positions `arange(length) + past`, and %k2, %v2 returned for the next call.
Equal because a causal query sees only keys at or before its own place, and those do not change
when the text grows (the operation counts places from the last key).

The new program takes one more keyword, `past`: a tuple of (key, value) for each attention, each
[batch, kv_heads, past, head] with any `past` from 0 on, and returns (result, present) where
present has the form of `past`. A padding mask becomes [batch, past + length]; position ids that
were an input stay one for each new token. What the graph shows decides what is position and what
is text; the pass then runs both programs on the example inputs and refuses if they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir.edit import Editor, infer
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from .cache_context import longest_text
from .cache_growing import PAST_LENGTH, GrowingCache
from .cache_inputs import CannotCache, Decoder, read_decoder
from .check_cache import check_cache
from .contract import Context, Pass, contract


@dataclass(frozen=True)
class InsertKvCache(Pass):
    """Let a causal decoder keep its keys and values between calls."""

    contract = contract(
        "bounded",
        requires=["raised", "no_dead_values"],
        ensures=["cached"],
        changes_interface=True,
    )

    def run(self, program: Program, context: Context) -> None:
        plain = program.copy()
        decoder = read_decoder(program)
        if not context.journal.offers():
            return
        described = _describe(program, decoder)
        editor = Editor(program)
        cache = GrowingCache(program, editor, decoder, False)
        present = cache.insert()
        for attention in decoder.attentions:
            context.journal.noted(self.pass_name(), attention)
        _extend_interface(program, present)
        editor.sweep()
        _refresh(program, editor, decoder)
        program.metadata["cache"] = described
        _extend_examples(program)
        check_cache(plain, program, decoder)


def _describe(program: Program, decoder: Decoder) -> dict[str, Any]:
    layers: list[dict[str, Any]] = []
    for attention in decoder.attentions:
        key, value = (node.meta["val"] for node in attention.args[1:3])  # type: ignore[union-attr]
        layers.append(
            {
                "kv_heads": int(key.shape[1]),
                "head": int(key.shape[3]),
                "value_head": int(value.shape[3]),
                "window": int(bound_arguments(attention)["window"]),
                "dtype": str(key.dtype).removeprefix("torch."),
            }
        )
    return {
        "form": "growing",
        "layers": layers,
        "context": longest_text(program, decoder),
        "mask": decoder.mask.name if decoder.mask is not None else None,
    }


def _extend_interface(program: Program, present: Sequence[tuple[Node, Node]]) -> None:
    old = program.output
    old.args = ([*old.args[0], *(node for pair in present for node in pair)],)  # type: ignore[misc]
    args, kwargs = pytree.tree_unflatten([0] * program.in_spec.num_leaves, program.in_spec)
    pairs = tuple((0, 0) for _ in present)
    more: dict[str, Any] = {"past": pairs}
    if program.inputs[-1].name == PAST_LENGTH:
        more[PAST_LENGTH] = 0
    program.in_spec = pytree.tree_structure((args, {**kwargs, **more}))
    result = pytree.tree_unflatten([0] * program.out_spec.num_leaves, program.out_spec)
    program.out_spec = pytree.tree_structure((result, pairs))


def _refresh(program: Program, editor: Editor, decoder: Decoder) -> None:
    """Sizes that are still read from lengthened inputs have those inputs' sizes."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.sym_size.int and node.args[0] in decoder.places:
            node.meta["val"] = infer(node, editor.mode)


def _extend_examples(program: Program) -> None:
    if program.examples:
        batch = next(v.shape[0] for v in program.examples if isinstance(v, Tensor))
        program.examples = (*program.examples, *empty_past(program, batch))


def empty_past(program: Program, batch: int) -> list[Any]:
    """What the inputs that the pass added are for a text not yet begun, flat and in order.

    Keys and values [batch, kv_heads, 0, head]; a length is 0.
    """
    found: list[Any] = []
    for node in program.inputs:
        value = node.meta["val"]
        if node.name == PAST_LENGTH:
            found.append(0)
        elif node.name.startswith("past_"):
            sizes = (batch, value.shape[1], 0, value.shape[3])
            found.append(torch.zeros(sizes, dtype=value.dtype))
    return found


__all__ = ["CannotCache", "InsertKvCache", "empty_past"]
