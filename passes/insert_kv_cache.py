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

With `window="ring"`, layers that see a window of w keys keep the last w - 1; where all layers do
and there is no padding mask, the keyword `past_length` (an int) tells how long the text is. With
`static=N`, `past` holds buffers [batch, kv_heads, N, head] (a ring: of w slots), the keyword
`position` (int64[]) tells how many tokens are in them, a padding mask is [batch, N], and `present`
are the buffers with the new tokens in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir.edit import Editor, infer
from ..ir.errors import WrongOption
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from .cache_context import longest_text
from .cache_growing import PAST_LENGTH, GrowingCache
from .cache_inputs import CannotCache, Decoder, read_decoder
from .cache_static import POSITION, StaticCache
from .check_cache import check_cache, fit_to_buffer
from .contract import Context, Pass, contract

_WINDOWS = ("keep", "ring")


@dataclass(frozen=True)
class InsertKvCache(Pass):
    """Let a causal decoder keep its keys and values between calls.

    window: "keep" all keys of a windowed layer, or a "ring" of those it still sees. static: the
    tokens that preallocated buffers hold; None for a cache that grows.
    """

    window: str = "keep"
    static: int | None = None

    contract = contract(
        "bounded",
        requires=["raised", "no_dead_values"],
        ensures=["cached"],
        changes_interface=True,
    )

    def __post_init__(self) -> None:
        if self.window not in _WINDOWS:
            raise WrongOption(
                f"option insert_kv_cache.window cannot be {self.window!r}",
                expected=" or ".join(_WINDOWS),
                found=repr(self.window),
            )
        if self.static is not None and self.static < 1:
            raise WrongOption(
                f"option insert_kv_cache.static cannot be {self.static}",
                expected="a number of tokens, at least 1, or none for a cache that grows",
                found=str(self.static),
            )

    def run(self, program: Program, context: Context) -> None:
        plain = program.copy()
        _refuse_taken_names(program)
        decoder = read_decoder(program)
        if not context.journal.offers():
            return
        context_limit = self._context(program, decoder)
        editor = Editor(program)
        ring = self.window == "ring"
        if self.static is None:
            cache = GrowingCache(program, editor, decoder, ring)
        else:
            cache = StaticCache(program, editor, decoder, ring, self.static)
        layers = [_layer(node, cache.kept(node)) for node in decoder.attentions]
        present = cache.insert()
        for attention in decoder.attentions:
            context.journal.noted(self.pass_name(), attention, "; ".join(cache.notes))
        _extend_interface(program, present)
        editor.sweep()
        _refresh(program, editor, decoder)
        program.metadata["cache"] = {
            "form": "growing" if self.static is None else "static",
            "layers": layers,
            "context": context_limit,
            "mask": decoder.mask.name if decoder.mask is not None else None,
        }
        _extend_examples(program, decoder, self.static)
        check_cache(plain, program, decoder)

    def _context(self, program: Program, decoder: Decoder) -> int | None:
        """The most tokens of a text; raises CannotCache if the buffers are longer than that."""
        longest = longest_text(program, decoder)
        if self.static is None or longest is None or self.static <= longest:
            return longest if self.static is None else self.static
        raise CannotCache(
            f"buffers for {self.static} tokens are longer than any text of this model",
            expected=f"static={longest} or less",
            found=f"static={self.static}",
            fix=f"set insert_kv_cache.static to {longest}",
        )


def _refuse_taken_names(program: Program) -> None:
    for node in program.inputs:
        if node.name.startswith("past_") or node.name == POSITION:
            raise CannotCache(
                f"the program has an input {node.name} already",
                expected="a program without a cache",
                found=", ".join(source.name for source in program.inputs),
                fix="capture the model without past keys and values (use_cache=False)",
            )


def _layer(attention: Node, kept: int | None) -> dict[str, Any]:
    """What a layer keeps. window: keys it sees (0: all); kept: tokens it keeps (None: all)."""
    key, value = (node.meta["val"] for node in attention.args[1:3])  # type: ignore[union-attr]
    return {
        "kv_heads": int(key.shape[1]),
        "head": int(key.shape[3]),
        "value_head": int(value.shape[3]),
        "window": int(bound_arguments(attention)["window"]),
        "kept": kept,
        "dtype": str(key.dtype).removeprefix("torch."),
    }


def _extend_interface(program: Program, present: Sequence[tuple[Node, Node]]) -> None:
    old = program.output
    old.args = ([*old.args[0], *(node for pair in present for node in pair)],)  # type: ignore[misc]
    args, kwargs = pytree.tree_unflatten([0] * program.in_spec.num_leaves, program.in_spec)
    pairs = tuple((0, 0) for _ in present)
    more: dict[str, Any] = {"past": pairs}
    if program.inputs[-1].name in (PAST_LENGTH, POSITION):
        more[program.inputs[-1].name] = 0
    program.in_spec = pytree.tree_structure((args, {**kwargs, **more}))
    result = pytree.tree_unflatten([0] * program.out_spec.num_leaves, program.out_spec)
    program.out_spec = pytree.tree_structure((result, pairs))


def _refresh(program: Program, editor: Editor, decoder: Decoder) -> None:
    """Sizes that are still read from lengthened inputs have those inputs' sizes."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.sym_size.int and node.args[0] in decoder.places:
            node.meta["val"] = infer(node, editor.mode)


def _extend_examples(program: Program, decoder: Decoder, static: int | None) -> None:
    if not program.examples:
        return
    given = list(program.examples)
    batch = next(v.shape[0] for v in given if isinstance(v, Tensor))
    for place, node in enumerate(program.inputs[: len(given)]):
        if static is not None:
            given[place] = fit_to_buffer(node, given[place], decoder, static)
    program.examples = (*given, *empty_past(program, batch))


def empty_past(program: Program, batch: int) -> list[Any]:
    """What the inputs that the pass added are for a text not yet begun, flat and in order.

    Keys and values [batch, kv_heads, 0, head] of a cache that grows, or buffers of zeros [batch,
    kv_heads, slots, head]; a length is 0, a position int64[] 0. Other forms of a cache (codes,
    scores) likewise: zeros, with 0 for every free size but the batch.
    """
    static = (program.metadata.get("cache") or {}).get("form") == "static"
    found: list[Any] = []
    for node in program.inputs:
        value = node.meta["val"]
        if node.name == PAST_LENGTH:
            found.append(0)
        elif node.name == POSITION and static:
            found.append(torch.zeros((), dtype=torch.int64))
        elif node.name.startswith("past_"):
            lead, *rest = [size if isinstance(size, int) else None for size in value.shape]
            sizes = [batch if lead is None else lead, *(size or 0 for size in rest)]
            found.append(torch.zeros(sizes, dtype=value.dtype))
    return found


__all__ = ["CannotCache", "InsertKvCache", "empty_past"]
