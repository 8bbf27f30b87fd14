"""KIVI's form of a KV cache: keys per channel, values per token, the latest in full precision.

Source: Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache". With
groups of G and a residual of R (a multiple of G):
- a group is coded as `zero + scale * code`, zero its least value, scale its range / (2^bits - 1);
- keys: G tokens of one channel are a group. Keys wait in full precision until R of them are
  there; then those R are coded at once (of a long prompt the largest multiple of R);
- values: G channels of one token are a group (the whole head where it is smaller). The last R
  tokens are in full precision; whoever leaves them is coded.
A call attends to the codes it was given and, in full precision, to the waiting tokens and its own;
what is complete is then coded for the calls after it. So a prompt sees no rounding, as in the
paper, and codes are never coded again.

past and present, for each attention: ((codes, scale, zero, recent), (codes, scale, zero, recent)):
keys' codes uint8 [batch, kv_heads, groups, G, packed], scale and zero [batch, kv_heads, groups, 1,
head], recent [batch, kv_heads, 0 to R - 1, head]; values' codes uint8 [batch, kv_heads, tokens,
groups, packed], scale and zero [batch, kv_heads, tokens, groups, 1], recent [batch, kv_heads, 0 to
R, head]. packed: bytes of the last axis of codes, lowest bits first.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.edit import Editor, shape, value_of
from ..ir.errors import UnsupportedGroupSize
from ..ir.program import Node
from .cached_attention import CachedAttention, LayerEmitter, add_input, free_size, shape_input

_ATEN = torch.ops.aten
_PLANISH = torch.ops.planish
_END = 9223372036854775807

Side = tuple[Node, Node, Node, Node]
"""(codes, scale, zero, recent) of the keys or of the values."""


@dataclass(frozen=True)
class KiviForm:
    """bits: of a code; group_size: G; residual: R."""

    bits: int
    group_size: int
    residual: int

    def value_group(self, head: int) -> int:
        return min(self.group_size, head)

    def check(self, layers: Sequence[CachedAttention]) -> None:
        """Raise UnsupportedGroupSize where groups do not divide the channels of a value."""
        for layer in layers:
            head = int(shape(layer.past[1])[3])
            if head % self.value_group(head):
                divisors = [str(g) for g in range(2, head + 1) if head % g == 0]
                raise UnsupportedGroupSize(
                    f"groups of {self.group_size} do not divide the {head} channels of "
                    f"%{layer.past[1].name}",
                    where=layer.node.meta.get("module", ""),
                    expected=f"a divisor of {head}",
                    found=str(self.group_size),
                    fix=f"use group_size={' or '.join(divisors[-3:])}, or quantize_kv_cache.bits=8",
                )


def build_kivi(
    make: LayerEmitter, layers: Sequence[CachedAttention], form: KiviForm
) -> tuple[Any, Any]:
    """Rewrite all attentions; what comes in and what goes out, each ((key side), (value side))."""
    editor = make.editor
    sizes = _Sizes(
        *(free_size(editor, n) for n in (3, 2 * form.residual + 2)),
        *(free_size(editor, n) for n in (3 * form.group_size, 2 * form.residual + 2)),
    )
    pasts = [
        (_key_inputs(editor, layer, form, sizes), _value_inputs(editor, layer, form, sizes))
        for layer in layers
    ]
    _replace_length(editor, layers, pasts[0][1])
    presents = [
        _build(editor, make, layer, past, form) for layer, past in zip(layers, pasts, strict=True)
    ]
    return tuple(pasts), tuple(presents)


@dataclass(frozen=True)
class _Sizes:
    """Free sizes of the inputs, the same in all layers."""

    key_groups: Any
    waiting_keys: Any
    value_tokens: Any
    recent_values: Any


def _key_inputs(editor: Editor, layer: CachedAttention, form: KiviForm, sizes: _Sizes) -> Side:
    batch, heads, _, head = shape(layer.past[0])
    lead = [batch, heads, sizes.key_groups]
    codes = [*lead, form.group_size, -(-head * form.bits // 8)]
    recent = [batch, heads, sizes.waiting_keys, head]
    return _inputs(editor, layer, 0, codes, [*lead, 1, head], recent)


def _value_inputs(editor: Editor, layer: CachedAttention, form: KiviForm, sizes: _Sizes) -> Side:
    batch, heads, _, head = shape(layer.past[1])
    group = form.value_group(head)
    lead = [batch, heads, sizes.value_tokens, head // group]
    recent = [batch, heads, sizes.recent_values, head]
    return _inputs(editor, layer, 1, [*lead, -(-group * form.bits // 8)], [*lead, 1], recent)


def _inputs(
    editor: Editor,
    layer: CachedAttention,
    side: int,
    codes: Sequence[Any],
    scale: Sequence[Any],
    recent: Sequence[Any],
) -> Side:
    old, kind = layer.past[side], ("key", "value")[side]
    dtype = value_of(old).dtype
    wide = torch.promote_types(dtype, torch.float32)
    shape_input(editor, old, codes, torch.uint8)
    first = add_input(editor, f"past_{kind}_scale_{layer.place}", scale, wide, old)
    zero = add_input(editor, f"past_{kind}_zero_{layer.place}", scale, wide, first)
    last = add_input(editor, f"past_{kind}_recent_{layer.place}", recent, dtype, zero)
    return old, first, zero, last


def _replace_length(editor: Editor, layers: Sequence[CachedAttention], values: Side) -> None:
    """Tokens in the cache, which nobody's axis 2 says any more: coded and recent values."""
    old = {u for layer in layers for p in layer.past for u in p.users} - {
        node for layer in layers for node in layer.joined
    }
    if not old:
        return
    first = next(n for n in editor.graph.nodes if n.op == "call_function")
    with editor.at(first, ""):
        coded = editor.emit(_ATEN.sym_size.int, values[0], 2)
        recent = editor.emit(_ATEN.sym_size.int, values[3], 2)
        length = editor.emit(operator.add, coded, recent)
    for node in old:
        if node.args[1] == 2:
            node.replace_all_uses_with(length)


def _build(
    editor: Editor,
    make: LayerEmitter,
    layer: CachedAttention,
    past: tuple[Side, Side],
    form: KiviForm,
) -> tuple[Side, Side]:
    with editor.at(layer.joined[0]):
        keys, waiting = _attended(make, past[0], layer.new[0], form, 2)
    with editor.at(layer.joined[1]):
        values, recent = _attended(make, past[1], layer.new[1], form, 3)
        # The two lengths are equal for every cache that this program returned; told to the shape
        # rules as a slice that takes everything, it makes no claim about the inputs.
        length = make.emit(_ATEN.sym_size.int, keys, 2)
        values = make.emit(_ATEN.slice.Tensor, values, 2, 0, length)
        whole = make.emit(_ATEN.sym_size.int, waiting, 2)
        runs = make.emit(operator.floordiv, whole, form.residual)
        cut = make.emit(operator.mul, runs, form.residual)
        present_keys = _code(make, past[0], waiting, cut, form, 2, form.group_size)
        count = make.emit(_ATEN.sym_size.int, recent, 2)
        cut = make.emit(torch.sym_max, make.emit(operator.sub, count, form.residual), 0)
        group = form.value_group(int(shape(recent)[3]))
        present_values = _code(make, past[1], recent, cut, form, 3, group)
    layer.node.replace_input_with(layer.joined[0], keys)
    layer.node.replace_input_with(layer.joined[1], values)
    return present_keys, present_values


def _attended(
    make: LayerEmitter, past: Side, new: Node, form: KiviForm, axis: int
) -> tuple[Node, Node]:
    """Everything that is attended to, and the part of it that is not coded."""
    codes, scale, zero, waiting = past
    dtype = value_of(new).dtype
    recent = make.emit(_ATEN.cat.default, [waiting, new], 2)
    head = int(shape(new)[3])
    width = head if axis == 2 else form.value_group(head)
    numbers = (codes, scale, zero, form.bits)
    old = make.emit(_PLANISH.dequantize_cache.default, *numbers, width=width)
    if value_of(old).dtype != dtype:
        old = make.emit(_ATEN._to_copy.default, old, dtype=dtype)
    old = make.emit(_ATEN.flatten.using_ints, old, axis, axis + 1)
    return make.emit(_ATEN.cat.default, [old, recent], 2), recent


def _code(
    make: LayerEmitter, past: Side, recent: Node, cut: Node, form: KiviForm, axis: int, group: int
) -> Side:
    """Code the first `cut` of the recent tokens, in groups along `axis`."""
    done = make.emit(_ATEN.slice.Tensor, recent, 2, 0, cut)
    rest = make.emit(_ATEN.slice.Tensor, recent, 2, cut, _END)
    value: Tensor = value_of(recent)
    if value.dtype not in (torch.float32, torch.float64):
        done = make.emit(_ATEN._to_copy.default, done, dtype=torch.float32)
    grouped = make.emit(_ATEN.unflatten.int, done, axis, [-1, group])
    along = 3 if axis == 2 else 4
    zero = make.emit(_ATEN.amin.default, grouped, [along], True)
    high = make.emit(_ATEN.amax.default, grouped, [along], True)
    span = make.emit(_ATEN.sub.Tensor, high, zero)
    scale = make.emit(_ATEN.div.Tensor, span, float((1 << form.bits) - 1))
    codes = make.emit(_PLANISH.quantize_cache.default, grouped, scale, zero, form.bits)
    made = [
        make.emit(_ATEN.cat.default, [old, new], 2)
        for old, new in zip(past[:3], (codes, scale, zero), strict=True)
    ]
    return made[0], made[1], made[2], rest
