"""Attention with a cache as onnxruntime's GroupQueryAttention, cache and rotation included.

Before: `%q, %k = rotary(...)`, `%keys = cat(%past_key, %k)`, `%y = attention(%q, %keys, %values)`.
After: `%y, %keys, %values = group_query(%qkv, ..., %past_key, %past_value, %cos, %sin)`, which
reads the projections as they are, turns them by a table of all places and appends to the cache in
place where past and present are one buffer.

What its processor kernel of onnxruntime 1.31.1 takes was found by running it: heads of a multiple
of 8 channels (16 with rotation, of a multiple of 16 channels), float32, and several new tokens
after a past only for one text at a time.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.edit import Editor, same_size, shape
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from .onnx_builder import CONTRIB, Value
from .onnx_call import Call, Table
from .onnx_fused import GROUP_QUERY
from .onnx_heads import beside, merged, read_merged
from .onnx_positions import RotaryTables
from .onnx_shape_ops import expand
from .onnx_sizes import sizes

_CAT = torch.ops.aten.cat.default
_ATTENTION = torch.ops.planish.attention.default
_ROTARY = torch.ops.planish.rotary.default


@dataclass(frozen=True)
class Cached:
    """One attention of a cached program with what it appends to its cache."""

    attention: Node
    past_key: Node
    past_value: Node
    keys: Node
    values: Node

    @property
    def new_key(self) -> Node:
        return self.keys.args[0][1]  # type: ignore[index,return-value]

    @property
    def new_value(self) -> Node:
        return self.values.args[0][1]  # type: ignore[index,return-value]


def find_cached(past_key: Node, past_value: Node, output: Node) -> Cached | str:
    """The attention over a past, or why it is none that grows by plain concatenation."""
    grown: list[Node] = []
    for past in (past_key, past_value):
        readers = [user for user in past.users if isinstance(user.meta.get("val"), Tensor)]
        if len(readers) != 1 or not _appends(readers[0], past):
            return f"%{past.name} does not only grow by the new tokens"
        grown.append(readers[0])
    attentions = {user for node in grown for user in node.users} - {output}
    if len(attentions) != 1 or next(iter(attentions)).target is not _ATTENTION:
        return f"the keys and values behind %{past_key.name} have other readers than one attention"
    attention = attentions.pop()
    if list(attention.args[1:3]) != grown or attention.args[0] in grown:
        return f"%{attention.name} does not read its keys and values as they are kept"
    return Cached(attention, past_key, past_value, *grown)


def _appends(node: Node, past: Node) -> bool:
    if node.target is not _CAT or len(node.args) != 2:
        return False
    parts: Any = node.args[0]
    return len(parts) == 2 and parts[0] is past and parts[1] is not past and node.args[1] in (2, -2)


def why_not(found: Cached) -> str:
    """Why the kernel does not compute this attention; "" if it does."""
    arguments = bound_arguments(found.attention)
    name = f"%{found.attention.name}"
    q, k, v = (arguments[key].meta["val"] for key in ("q", "k", "v"))
    mask = arguments["mask"]
    if not arguments["causal"]:
        return f"{name} is not causal"
    if q.dtype != torch.float32:
        return f"{name} computes in {q.dtype}"
    if not same_size(q.shape[3], v.shape[3]):
        return f"{name} has keys of {k.shape[3]} and values of {v.shape[3]} channels a head"
    if not all(isinstance(n, int) for n in (q.shape[1], k.shape[1], q.shape[3])):
        return f"{name} has a free number of heads or channels"
    if q.shape[3] % 8:
        return f"{name} has heads of {q.shape[3]} channels, not a multiple of 8"
    if mask is not None and (mask.meta["val"].dtype != q.dtype or arguments["uniform_if_blind"]):
        return f"{name} hides keys by a mask that is not added to the scores"
    return ""


def lower_group_query(found: Cached, tables: RotaryTables, editor: Editor) -> str:
    """Replace an attention and its cache by one operation.

    Returns why the rotation, if there is one, stays a node of its own.
    """
    arguments = bound_arguments(found.attention)
    heads, kv_heads = shape(arguments["q"])[1], shape(found.new_key)[1]
    q, k, cos, sin, interleaved, reason = arguments["q"], found.new_key, None, None, False, ""
    turned = _turned(q, k, tables)
    if isinstance(turned, str):
        reason = turned if q.target is _ROTARY else ""
    else:
        q, k = turned.q, turned.k
        cos = tables.weight(editor, "rotary.cos", turned.cos)
        sin = tables.weight(editor, "rotary.sin", turned.sin)
        interleaved = turned.interleaved
    with editor.at(found.attention):
        parts: list[Any] = [merged(editor, part) for part in (q, k, found.new_value)]
        whole = beside(parts)
        parts = parts if whole is None else [whole, None, None]
        more = {name: arguments[name] for name in ("scale", "window", "softcap")}
        more |= {"heads": heads, "kv_heads": kv_heads, "interleaved": interleaved}
        past = (found.past_key, found.past_value)
        extra = (cos, sin, arguments["mask"], arguments["sinks"])
        made = editor.emit(GROUP_QUERY, *parts, *past, *extra, **more)
        result, keys, values = (editor.emit(operator.getitem, made, n) for n in range(3))
        read_merged(editor, found.attention, result, heads)
    editor.replace(found.keys, keys)
    editor.replace(found.values, values)
    return reason


@dataclass(frozen=True)
class _Turned:
    q: Node
    k: Node
    cos: Tensor
    sin: Tensor
    interleaved: bool


def _turned(q: Node, k: Node, tables: RotaryTables) -> _Turned | str:
    """Query and key before their rotation, and its tables; or why it cannot be folded in."""
    if q.target is not _ROTARY or k.target is not _ROTARY:
        return "query and key are not both turned right before the attention"
    ours, theirs = bound_arguments(q), bound_arguments(k)
    if ours["interleaved"] != theirs["interleaved"]:
        return "query and key are turned in two layouts"
    found: list[Tensor] = []
    for name in ("cos", "sin"):
        pair = [tables.table(arguments[name]) for arguments in (ours, theirs)]
        refused = next((table for table in pair if isinstance(table, str)), None)
        if refused is not None:
            return refused
        if not torch.equal(pair[0], pair[1]):  # type: ignore[arg-type]
            return "query and key are turned by two tables"
        found.append(pair[0])  # type: ignore[arg-type]
    head, half = shape(q)[3], found[0].shape[1]
    if head % 16 or half % 8:
        return f"the kernel turns {2 * half} of {head} channels a head only in multiples of 16"
    return _Turned(ours["x"], theirs["x"], found[0], found[1], ours["interleaved"])


def _group_query(call: Call) -> list[Value]:
    lengths: tuple[Value, Value] = call.b.memo["lengths"]
    inputs = [call.optional(name) for name in ("q", "k", "v", "past_key", "past_value")]
    inputs += [*lengths, call.optional("cos"), call.optional("sin"), None]
    inputs += [_bias(call), call.optional("sinks", call.dtype)]
    more: dict[str, Any] = {"num_heads": call["heads"], "kv_num_heads": call["kv_heads"]}
    more["scale"] = float(call["scale"])
    if call["window"]:
        more["local_window_size"] = call["window"]
    if call["softcap"]:
        more["softcap"] = float(call["softcap"])
    if call["cos"] is not None:
        more |= {"do_rotary": 1, "rotary_interleaved": int(call["interleaved"])}
    return call.b.ops("GroupQueryAttention", inputs, [None] * 3, CONTRIB, **more)


def _bias(call: Call) -> Value | None:
    """The additive mask with its last two axes whole."""
    node = call["mask"]
    if node is None:
        return None
    have = sizes(node.meta["val"].shape)
    total = sizes(call.node.meta["val"][1].shape)[2]
    padded = [1] * (4 - len(have)) + have
    wanted = [*padded[:2], call.shape_of("q")[1], total]
    value = call.value("mask", call.dtype)
    key = ("bias", value, tuple(wanted))
    return call.b.once(key, lambda: expand(call.b, value, have, wanted))


TABLE: Table = {"planish_onnx.group_query": _group_query}
