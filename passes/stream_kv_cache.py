"""Keep the first tokens and the latest ones: a KV cache of fixed size for a text without end.

StreamingLLM (Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks"): the
first `sinks` tokens draw attention that has to go somewhere, so they stay; of the others the
last `window` stay. Places are counted within the cache, not in the text.

Before: `%keys = cat([%past_key, rotary(%k, cos, sin)], 2)`, kept whole.
After: `%kept = cat([%past_key, %k], 2)`, unrotated; `%keys = rotary(%kept, cos, sin)` at the places
0 to past + length on every call; of %kept and of the values the first `sinks` and the last `window`
tokens are returned. Biases by distance and learned places of new tokens count within the cache
too, because there the length of the cache is the place of the next token.
The tokens of one call all see each other, as in the paper's prefill, and the cache is cut after
it: feed a long text in pieces, which must fit into the model's context beside the cache. Equal to
the whole cache while sinks + window tokens hold the past. Lossy after that; the loss on the
examples is in the history.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch

from ..ir.edit import Editor
from ..ir.errors import WrongOption
from ..ir.history import Measured
from ..ir.program import Node, Program
from .cache_places import Places, reads_input
from .cached_attention import (
    CachedAttention,
    CacheRefused,
    cached_attentions,
    describe_cache,
    exchange_cache,
    refusal,
)
from .contract import Context, Pass, contract
from .measure_cache import example_text, measured_loss, run_in_pieces, text_length

_ATEN = torch.ops.aten
_END = 9223372036854775807
_FIX = "leave stream_kv_cache out of the recipe for this model"
_SAME = 1e-10


@dataclass(frozen=True)
class StreamKvCache(Pass):
    """Keep `sinks` first and `window` last tokens, places counted within the cache."""

    contract = contract("lossy", requires=["cached"], changes_interface=True)
    sinks: int = 4
    window: int = 1020

    def __post_init__(self) -> None:
        for option, least in (("sinks", 0), ("window", 1)):
            value = getattr(self, option)
            if value < least:
                raise WrongOption(
                    f"option stream_kv_cache.{option} cannot be {value}",
                    expected=f"at least {least}",
                    found=str(value),
                    fix="see planish passes",
                )

    def run(self, program: Program, context: Context) -> None:
        layers = cached_attentions(program, _FIX)
        editor = Editor(program)
        places = Places(program, editor, layers)
        self._check_context(program, layers[0])
        for layer in layers:
            self._check(layer)
            places.fault(layer, _FIX)
        if not context.journal.offers():
            return
        before = program.copy()
        bounds = _Bounds(editor, layers[0], self.sinks, self.window)
        present: list[tuple[Node, Node]] = []
        for layer in layers:
            keys = _turn_on_reading(editor, places, layer)
            present.append((bounds.cut(keys), bounds.cut(layer.joined[1])))
            context.journal.noted(self.pass_name(), layer.node)
        past = tuple(layer.past for layer in layers)
        exchange_cache(program, 2 * len(layers), past, tuple(present))
        editor.sweep()
        policy = {"name": "stream", "sinks": self.sinks, "window": self.window}
        describe_cache(program, policy=policy, rewind=False, context=None)
        context.journal.measured += self._measured(before, program)

    def _check(self, layer: CachedAttention) -> None:
        arguments = layer.arguments
        if 0 < arguments["window"] <= self.sinks + self.window:
            why = f"sees {arguments['window']} tokens back, which hides the first ones of"
            told = f"a cache of {self.sinks} + {self.window}"
            raise refusal(layer.node, f"{why} {told}", _FIX)
        if arguments["mask"] is not None and reads_input(arguments["mask"]):
            raise refusal(layer.node, "reads a mask of the whole text, which is cut", _FIX)

    def _check_context(self, program: Program, layer: CachedAttention) -> None:
        described = program.metadata.get("cache")
        context = described.get("context") if isinstance(described, dict) else None
        if context is not None and self.sinks + self.window >= context:
            why = f"would hold {self.sinks} + {self.window} tokens before a new one"
            raise refusal(layer.past[0], f"{why}, and the model knows {context} places", _FIX)

    def _measured(self, before: Program, after: Program) -> list[Measured]:
        """Equality while the past fits, and the loss over the whole examples."""
        inputs = example_text(before)
        length = min(text_length(inputs), self.sinks + self.window + 1)
        if length < 2:
            return []
        cuts = [length // 2, *range(length // 2 + 1, length + 1)]
        exact, found = (run_in_pieces(p, inputs, cuts, float64=True) for p in (before, after))
        gap = float((found - exact).norm() / exact.norm())
        if not gap <= _SAME:
            raise CacheRefused(
                "the streaming cache does not compute what the whole cache does while all fits",
                expected="equal float64 runs on the example inputs",
                found=f"a relative difference of {gap:.2g}",
                fix=_FIX,
            )
        name = "difference of float64 runs while the text fits"
        return [
            Measured(name, 0.0, gap, _SAME, f"{length} tokens"),
            *measured_loss(before, after, f", {self.sinks} + {self.window} kept"),
        ]


def _turn_on_reading(editor: Editor, places: Places, layer: CachedAttention) -> Node:
    """Keep the keys unrotated, and rotate them all when they are read; what is kept."""
    plain = places.unrotated(layer)
    if plain is None:
        return layer.joined[0]
    rotary, joined = layer.new[0], layer.joined[0]
    _, cos, sin, *rest = rotary.args
    cos, sin = places.everywhere(cos), places.everywhere(sin)
    with editor.at(joined):
        kept = editor.emit(_ATEN.cat.default, [layer.past[0], plain], 2)
        turned = editor.emit(rotary.target, kept, cos, sin, *rest, **rotary.kwargs)
    layer.node.replace_input_with(joined, turned)
    return kept


class _Bounds:
    """Where the kept tokens begin and end, as sizes in the graph."""

    def __init__(self, editor: Editor, layer: CachedAttention, sinks: int, window: int) -> None:
        self.editor = editor
        with editor.at(layer.node):
            total = editor.emit(_ATEN.sym_size.int, layer.joined[1], 2)
            self.first = editor.emit(torch.sym_min, total, sinks)
            late = editor.emit(operator.sub, total, window)
            self.last = editor.emit(torch.sym_max, late, self.first)

    def cut(self, kept: Node) -> Node:
        """The first and the last tokens of keys or values, as an output."""
        last = max(kept, self.last)
        with self.editor.at(last.next, kept.meta.get("module", "")):
            head = self.editor.emit(_ATEN.slice.Tensor, kept, 2, 0, self.first)
            tail = self.editor.emit(_ATEN.slice.Tensor, kept, 2, self.last, _END)
            return self.editor.emit(_ATEN.cat.default, [head, tail], 2)
