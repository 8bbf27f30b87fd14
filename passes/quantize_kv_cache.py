"""Quantize the KV cache: what is kept between calls becomes integer codes.

Before: `%keys = cat([%past_key, %new], 2)` in the model's own dtype, kept and attended to.
After, bits=8: codes int8 with a scale for each token and head. The new keys are rounded once, as
they come in; `%codes = cat([%past_codes, %new_codes], 2)` is kept and its values are attended to.
So a text gives the same results in whatever pieces it comes, and old codes are never touched.
After, bits=4 or 2: KIVI (Liu et al. 2024), see `kivi_cache`.

The keyword `past` and the result `present` are then, for each attention, ((codes, scale), (codes,
scale)): int8 [batch, kv_heads, past, head] and float32 [batch, kv_heads, past, 1]; or KIVI's
((codes, scale, zero, recent), (codes, scale, zero, recent)).
Lossy; the loss on the examples is in the history.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ir.edit import Editor, shape, value_of
from ..ir.errors import WrongOption
from ..ir.program import Node, Program
from .cached_attention import (
    CachedAttention,
    LayerEmitter,
    add_input,
    cached_attentions,
    describe_cache,
    exchange_cache,
    shape_input,
)
from .contract import Context, Pass, contract
from .kivi_cache import KiviForm, build_kivi
from .measure_cache import example_text, measured_loss, text_length

_ATEN = torch.ops.aten
_PLANISH = torch.ops.planish
_FIX = "run quantize_kv_cache right after insert_kv_cache, or leave it out"


@dataclass(frozen=True)
class QuantizeKvCache(Pass):
    """Keep keys and values as integers.

    bits: 8 for int8 per token and head; 4 or 2 for KIVI. For KIVI only: group_size: tokens of a
    channel of the keys, and channels of a token of the values, that share a scale (a smaller head
    is one group); residual: how many recent tokens stay in the model's dtype, a multiple of
    group_size.
    """

    contract = contract("lossy", requires=["cached"], changes_interface=True)
    bits: int = 8
    group_size: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        for option, fits, expected in (
            ("bits", self.bits in (2, 4, 8), "2, 4 or 8"),
            ("group_size", self.group_size >= 1, "a positive number"),
            (
                "residual",
                self.residual >= 1 and self.residual % max(self.group_size, 1) == 0,
                f"a positive multiple of group_size={self.group_size}",
            ),
        ):
            if not fits:
                raise WrongOption(
                    f"option quantize_kv_cache.{option} cannot be {getattr(self, option)}",
                    expected=expected,
                    found=str(getattr(self, option)),
                    fix="see planish passes",
                )

    def run(self, program: Program, context: Context) -> None:
        layers = cached_attentions(program, _FIX)
        form = KiviForm(self.bits, self.group_size, self.residual)
        if self.bits != 8:
            form.check(layers)
        if not context.journal.offers():
            return
        before = program.copy()
        for layer in layers:
            context.journal.noted(self.pass_name(), layer.node, self._note())
        editor = Editor(program)
        make = LayerEmitter(editor)
        if self.bits == 8:
            made = [_build_int8(editor, make, layer) for layer in layers]
            past, present = tuple(m[0] for m in made), tuple(m[1] for m in made)
        else:
            past, present = build_kivi(make, layers, form)
        exchange_cache(program, 2 * len(layers), past, present)
        editor.sweep()
        make.refresh()
        describe_cache(program, **self._description())
        context.journal.measured += measured_loss(before, program, self._told(before))

    def _note(self) -> str:
        return "int8 per token and head" if self.bits == 8 else f"KIVI, {self.bits} bits"

    def _told(self, program: Program) -> str:
        if self.bits == 8:
            return ""
        if text_length(example_text(program)) <= self.residual:
            return f", none of them coded yet: the last {self.residual} never are"
        return f", the last {self.residual} of them not coded"

    def _description(self) -> dict[str, object]:
        if self.bits == 8:
            return {"codec": {"name": "int8"}}
        options = {"bits": self.bits, "group_size": self.group_size, "residual": self.residual}
        return {"codec": {"name": "kivi", **options}, "rewind": False}


Pair = tuple[tuple[Node, Node], tuple[Node, Node]]


def _build_int8(editor: Editor, make: LayerEmitter, layer: CachedAttention) -> tuple[Pair, Pair]:
    """((codes, scale), (codes, scale)) that come in, and that go out."""
    past: list[tuple[Node, Node]] = []
    present: list[tuple[Node, Node]] = []
    sides = zip(("key", "value"), layer.past, layer.new, layer.joined, strict=True)
    for kind, codes, new, joined in sides:
        sizes = shape(codes)
        value = value_of(new)
        wide = torch.promote_types(value.dtype, torch.float32)
        name = f"past_{kind}_scale_{layer.place}"
        scale = add_input(editor, name, [*sizes[:3], 1], wide, codes)
        past.append((shape_input(editor, codes, sizes, torch.int8), scale))
        with editor.at(joined):
            exact = new
            if value.dtype != wide:
                exact = make.emit(_ATEN._to_copy.default, new, dtype=wide)
            largest = make.emit(_ATEN.amax.default, make.emit(_ATEN.abs.default, exact), [-1], True)
            step = make.emit(_ATEN.div.Tensor, largest, 127.0)
            fresh = make.emit(_PLANISH.quantize_cache.default, exact, step)
            kept = make.emit(_ATEN.cat.default, [codes, fresh], 2)
            steps = make.emit(_ATEN.cat.default, [scale, step], 2)
            read = make.emit(_PLANISH.dequantize_cache.default, kept, steps, width=sizes[3])
            if value.dtype != wide:
                read = make.emit(_ATEN._to_copy.default, read, dtype=value.dtype)
        layer.node.replace_input_with(joined, read)
        present.append((kept, steps))
    return (past[0], past[1]), (present[0], present[1])
