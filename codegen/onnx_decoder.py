"""A program with a KV cache as an ONNX decoder: names, lengths, and what the manifest tells.

shared   every attention is a GroupQueryAttention and the lengths come from `attention_mask`
         [batch, total], which the exporter adds: past and present may be one buffer of `context`
         places, written in place, or grow from call to call
growing  past and present grow by concatenation; the length of the past is its tensors' own
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as oir
import sympy
from torch import fx

from ..ir.edit import Editor
from ..ir.program import Node, Program
from .onnx_builder import INT32, INT64, Builder, Value
from .onnx_group_query import Cached, find_cached, lower_group_query, why_not
from .onnx_positions import Lengths, RotaryTables
from .onnx_sizes import Size, size, size_vector

MASK = "attention_mask"
UNTOLD_CONTEXT = 8192
"""Places of the rotary tables where the program does not say how long a text may be."""


@dataclass(frozen=True)
class Decoder:
    """The cache of one program as its inputs and outputs.

    past: the placeholders (key, value) of each layer; the program's last results are its present.
    new, old: how many tokens a call brings, and how many the cache holds. context: the most
    tokens, None where nothing limits them. mask: the input of ones over both, if there is one.
    """

    past: tuple[tuple[Node, Node], ...]
    new: Size
    old: Size
    context: int | None
    mask: str | None = None
    shared: bool = False

    @property
    def inputs(self) -> dict[Node, str]:
        """The names of the past's inputs."""
        return {
            node: f"past_key_values.{layer}.{kind}"
            for layer, pair in enumerate(self.past)
            for kind, node in zip(("key", "value"), pair, strict=True)
        }

    @property
    def outputs(self) -> list[str]:
        """The names of the present's outputs, in the order of the results."""
        return [name.replace("past_key_values", "present") for name in self.inputs.values()]


def find_decoder(program: Program) -> Decoder | None:
    """The cache of a program: one past_key_i and past_value_i for each layer, and nothing else."""
    cache: Any = program.metadata.get("cache")
    if not isinstance(cache, dict) or cache.get("form") != "growing":
        return None
    named = {node.name: node for node in program.inputs}
    count = sum(name.startswith("past_key_") for name in named)
    wanted = [f"past_{kind}_{layer}" for layer in range(count) for kind in ("key", "value")]
    if sorted(wanted) != sorted(name for name in named if name.startswith("past_")) or not wanted:
        return None
    nodes = [named[name] for name in wanted]
    present = program.results[-len(wanted) :]
    if not all(isinstance(node, fx.Node) and node.meta["val"].dim() == 4 for node in present):
        return None
    old = size(nodes[0].meta["val"].shape[2])
    new = size(program.inputs[0].meta["val"].shape[-1])
    pairs = tuple(zip(nodes[::2], nodes[1::2], strict=True))
    return Decoder(pairs, new, old, cache.get("context"), cache.get("mask"))


def share_buffers(program: Program, decoder: Decoder, notes: list[str]) -> Decoder:
    """Lower every attention to a GroupQueryAttention; all of them, or none and a note why."""
    editor = Editor(program)
    reason = _unnamable(program, decoder)
    found = [find_cached(key, value, program.output) for key, value in decoder.past]
    for attention in found:
        reason = reason or (attention if isinstance(attention, str) else why_not(attention))
    if reason:
        notes.append(f"the cache grows by concatenation: {reason}")
        return decoder
    context = decoder.context or UNTOLD_CONTEXT
    tables = RotaryTables(program, Lengths(decoder.new, decoder.old), context)
    for attention in found:
        assert not isinstance(attention, str)
        name = attention.attention.name
        why = lower_group_query(attention, tables, editor)
        if why:
            notes.append(f"%{name} is turned by nodes of its own: {why}")
    known = context if tables.used else decoder.context
    return Decoder(decoder.past, decoder.new, decoder.old, known, MASK, shared=True)


def plain_caches(program: Program, decoder: Decoder) -> list[Cached]:
    """The attentions that only append to their caches."""
    found = [find_cached(key, value, program.output) for key, value in decoder.past]
    return [attention for attention in found if not isinstance(attention, str)]


def _unnamable(program: Program, decoder: Decoder) -> str:
    if any(node.name == MASK for node in program.inputs):
        return f"the program was captured with an {MASK} of its own"
    if not all(isinstance(length, sympy.Symbol) for length in (decoder.new, decoder.old)):
        return "the lengths of text and past are not free"
    present = program.results[-2 * len(decoder.past) :]
    if any(size(node.meta["val"].shape[2]) != decoder.new + decoder.old for node in present):
        return "not every layer keeps the whole text"
    return ""


def bind_lengths(b: Builder, decoder: Decoder) -> Value:
    """The input `attention_mask`; from now on it tells all lengths of the past."""
    kind, shape = oir.TensorType(INT64), oir.Shape(["batch", "total"])
    mask = Value(name=b.unique(MASK), type=kind, shape=shape)
    b.base = b.module = ""
    total = b.op("Shape", mask, dtype=INT64, start=1, end=2)
    rows = b.op("ReduceSum", mask, b.ints([1]), keepdims=0)
    last = b.cast(b.op("Sub", rows, b.ints([1])), INT32)
    b.memo["lengths"] = (last, b.cast(total, INT32))
    b.memo["size", decoder.new + decoder.old] = total

    def past() -> Value:
        return b.op("Sub", total, size_vector(b, decoder.new))

    b.memo["symbol", decoder.old] = (past, None)
    return mask


def manifest_section(program: Program, decoder: Decoder) -> dict[str, Any]:
    """What a program that runs the exported decoder must know."""
    values = [(key.meta["val"], value.meta["val"]) for key, value in decoder.past]
    logits = program.results[0].meta["val"]
    rows = size(logits.shape[1]) if logits.dim() == 3 else decoder.new
    counted = rows if isinstance(rows, int) else int(rows.subs(decoder.new, 1 << 30))
    return {
        "cache": "shared" if decoder.shared else "growing",
        "layers": len(decoder.past),
        "shapes": [[int(k.shape[1]), int(k.shape[3]), int(v.shape[3])] for k, v in values],
        "dtype": str(values[0][0].dtype).removeprefix("torch."),
        "mask": decoder.mask,
        "context": decoder.context,
        "vocabulary": int(logits.shape[-1]),
        "logits": "all" if counted == 1 << 30 else counted,
    }
