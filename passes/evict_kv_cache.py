"""Keep the tokens that drew most attention, and the latest ones: heavy-hitter eviction.

H2O (Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
Language Models", algorithm 1): a token's score is the attention it has received, added up over all
queries that have seen it, its own and the prompt's included. After each call every key head keeps
its last `recent` tokens and, of the others, the `heavy` with the highest scores; what was evicted
does not come back. Query heads that share a key head (grouped queries, which the paper does not
treat) evict together, by the sum of their attention.

Before: `%keys = cat([%past_key, %k], 2)`, kept whole.
After: `%score = cat([%past_score, 0]) + attention_mass(%q, %keys)`, `%place =
heavy_hitters(%score, recent, heavy)`, and %keys, the values and %score are kept at those places.
Keys keep the rotary embedding of their place in the text, as in the paper. The length of the
cache no longer tells the place of the next token, so the text's length is kept as well.

The keyword `past` and the result `present` are ((key, value, score), ..., (length,)): score
[batch, kv_heads, kept] in at least float32, length int64 [1].
Lossy once a text is longer than recent + heavy; the loss on the examples is in the history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..ir.edit import Editor, shape, value_of
from ..ir.errors import WrongOption
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from .cached_attention import (
    CachedAttention,
    LayerEmitter,
    add_input,
    cached_attentions,
    describe_cache,
    exchange_cache,
    refusal,
)
from .contract import Context, Pass, contract
from .measure_cache import measured_loss

_ATEN = torch.ops.aten
_PLANISH = torch.ops.planish
_FIX = "leave evict_kv_cache out of the recipe for this model"


@dataclass(frozen=True)
class EvictKvCache(Pass):
    """Keep the last `recent` tokens and the `heavy` most attended of the others."""

    contract = contract("lossy", requires=["cached"], changes_interface=True)
    recent: int = 512
    heavy: int = 512

    def __post_init__(self) -> None:
        for option, least in (("recent", 1), ("heavy", 0)):
            value = getattr(self, option)
            if value < least:
                raise WrongOption(
                    f"option evict_kv_cache.{option} cannot be {value}",
                    expected=f"at least {least}",
                    found=str(value),
                    fix="see planish passes",
                )

    def run(self, program: Program, context: Context) -> None:
        layers = cached_attentions(program, _FIX)
        for layer in layers:
            _check(layer)
        lengths = [u for layer in layers for p in layer.past for u in _sizes(p)]
        _check_places(lengths)
        if not context.journal.offers():
            return
        before = program.copy()
        editor = Editor(program)
        counted, after = _count_text(editor, layers, lengths)
        make = LayerEmitter(editor)
        scores = [_add_score(editor, layer) for layer in layers]
        present = [
            self._evict(make, layer, score) for layer, score in zip(layers, scores, strict=True)
        ]
        for layer in layers:
            context.journal.noted(self.pass_name(), layer.node)
        past = [(*layer.past, score) for layer, score in zip(layers, scores, strict=True)]
        exchange_cache(program, 2 * len(layers), (*past, (counted,)), (*present, (after,)))
        editor.sweep()
        policy = {"name": "evict", "recent": self.recent, "heavy": self.heavy}
        describe_cache(program, policy=policy, rewind=False)
        told = f", {self.heavy} + {self.recent} kept"
        context.journal.measured += measured_loss(before, program, told)

    def _evict(self, make: LayerEmitter, layer: CachedAttention, past: Node) -> tuple[Node, ...]:
        arguments = layer.arguments
        query, (keys, values) = arguments["q"], layer.joined
        options = {name: arguments[name] for name in ("scale", "softcap")}
        with make.editor.at(layer.node.next, layer.node.meta.get("module", "")):
            mass = make.emit(
                _PLANISH.attention_mass.default, query, keys, arguments["sinks"], **options
            )
            count = make.emit(_ATEN.sym_size.int, query, 2)
            known = make.emit(_ATEN.constant_pad_nd.default, past, [0, count], 0.0)
            score = make.emit(_ATEN.add.Tensor, known, mass)
            place = make.emit(_PLANISH.heavy_hitters.default, score, self.recent, self.heavy)
            rows = make.emit(_ATEN.unsqueeze.default, place, 3)
            kept: list[Node] = []
            for whole in (keys, values):
                width = int(shape(whole)[3])
                wide = make.emit(_ATEN.expand.default, rows, [-1, -1, -1, width])
                kept.append(make.emit(_ATEN.gather.default, whole, 2, wide))
            return *kept, make.emit(_ATEN.gather.default, score, 2, place)


def _check(layer: CachedAttention) -> None:
    arguments = layer.arguments
    if arguments["mask"] is not None:
        raise refusal(layer.node, "reads a mask by place, and evicted tokens leave no place", _FIX)
    if arguments["window"]:
        why = f"sees {arguments['window']} tokens back in the text, which a cache with gaps"
        raise refusal(layer.node, f"{why} does not tell", _FIX)


def _sizes(past: Node) -> list[Node]:
    return [u for u in past.users if u.target is _ATEN.sym_size.int and u.args[1] == 2]


def _check_places(lengths: list[Node]) -> None:
    """Every reader of the length of the cache must number tokens with it, and be understood."""
    for length in lengths:
        for user in length.users:
            if not _is_shift(user, length) and not _is_rows(user, length):
                ends = [u for u in user.users if _is_rows(u, length)]
                if set(ends) != set(user.users) or not ends:
                    raise refusal(user, "reads the length of the cache, not to number tokens", _FIX)


def _is_shift(node: Node, length: Node) -> bool:
    """arange(n) + past"""
    return node.target is _ATEN.add.Tensor and node.args[1] is length


def _is_rows(node: Node, length: Node) -> bool:
    """table[past : past + n]"""
    return node.target is _ATEN.slice.Tensor and bound_arguments(node)["start"] is length


def _count_text(
    editor: Editor, layers: list[CachedAttention], lengths: list[Node]
) -> tuple[Node, Node]:
    """The text's length as an input that takes the place of the cache's, and as an output."""
    last = layers[-1].past[1]
    counted = add_input(editor, "past_key_length", [1], torch.int64, last)
    for length in lengths:
        for user in list(length.users):
            if _is_shift(user, length):
                user.replace_input_with(length, counted)
            elif _is_rows(user, length):
                _look_up(editor, user, counted)
    with editor.at(layers[0].node, ""):
        length = editor.emit(_ATEN.sym_size.int, layers[0].new[0], 2)
        after = editor.emit(_ATEN.add.Tensor, counted, length)
    return counted, after


def _look_up(editor: Editor, rows: Node, counted: Node) -> None:
    """table[past : past + n] as rows of the table at arange(n) + past."""
    arguments: dict[str, Any] = bound_arguments(rows)
    with editor.at(rows):
        length = editor.emit(_ATEN.sym_size.int, rows, arguments["dim"])
        count = editor.emit(_ATEN.arange.default, length, dtype=torch.int64)
        places = editor.emit(_ATEN.add.Tensor, count, counted)
        found = editor.emit(_ATEN.index_select.default, arguments["self"], arguments["dim"], places)
    editor.replace(rows, found)


def _add_score(editor: Editor, layer: CachedAttention) -> Node:
    sizes = shape(layer.past[0])[:3]
    wide = torch.promote_types(value_of(layer.past[0]).dtype, torch.float32)
    name = f"past_key_score_{layer.place}"
    return add_input(editor, name, sizes, wide, layer.past[1])
