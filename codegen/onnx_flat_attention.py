"""Attention on heads that stay beside one another, with the cache joined inside the node.

ONNX's Attention and RotaryEmbedding take [batch, length, heads * head] as well as heads apart, and
Attention takes the past of keys and values and gives their present, so that the axes need not be
moved and the causal order needs no mask: query i of a call sees the key j if j <= i + past, in
the specification as in onnxruntime 1.31.1 (tried at all its forms).
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from ..ir.edit import Editor, same_size, shape
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from .onnx_builder import BOOL, CONTRIB, Value
from .onnx_call import Call, Table
from .onnx_fused import FLAT_ATTENTION, FLAT_ROTARY
from .onnx_group_query import Cached
from .onnx_heads import merged, moves_back, read_merged
from .onnx_masks import attention_mask, whole_mask
from .onnx_norm import rotary_table
from .onnx_sizes import sizes

_ATTENTION = torch.ops.planish.attention.default
_ROTARY = torch.ops.planish.rotary.default
_KEPT = ("mask", "scale", "causal", "window", "softcap", "uniform_if_blind")


def lower_flat_attention(
    program: Program, editor: Editor, cached: list[Cached], *, softcap: bool
) -> None:
    """Rewrite every attention that keeps a cache or whose heads come beside one another.

    softcap: whether the runtime is known to cap the scores before it adds the mask to them.
    """
    by_node = {found.attention: found for found in cached}
    for node in list(program.graph.nodes):
        if node.target is not _ATTENTION:
            continue
        found, arguments = by_node.get(node), bound_arguments(node)
        if arguments["sinks"] is not None or (arguments["softcap"] and not softcap):
            continue
        k = found.new_key if found else arguments["k"]
        v = found.new_value if found else arguments["v"]
        parts = [arguments["q"], k, v]
        flat = all(_comes_beside(part) for part in parts)
        known = all(isinstance(shape(part)[1], int) for part in parts)
        if known and (flat or found is not None):
            _lower(editor, node, parts, flat, found)


def _comes_beside(node: Node) -> bool:
    if node.target is _ROTARY:
        angles = shape(bound_arguments(node)["cos"])
        for_all = len(angles) < 3 or same_size(angles[-3], 1)
        return for_all and moves_back(bound_arguments(node)["x"])
    return moves_back(node)


def _lower(editor: Editor, node: Node, parts: list[Node], flat: bool, found: Cached | None) -> None:
    arguments = bound_arguments(node)
    heads, kv_heads = shape(parts[0])[1], shape(parts[1])[1]
    more: dict[str, Any] = {name: arguments[name] for name in _KEPT[1:]}
    past = (found.past_key, found.past_value) if found else (None, None)
    with editor.at(node):
        given = [_beside(editor, part) for part in parts] if flat else parts
        made = editor.emit(
            FLAT_ATTENTION, *given, arguments["mask"], *past, heads=heads, kv_heads=kv_heads, **more
        )
        result = editor.emit(operator.getitem, made, 0)
        kept = [editor.emit(operator.getitem, made, n) for n in (1, 2)] if found else []
        if flat:
            read_merged(editor, node, result, heads)
        else:
            editor.replace(node, result)
    if found:
        editor.replace(found.keys, kept[0])
        editor.replace(found.values, kept[1])


def _beside(editor: Editor, node: Node) -> Node:
    if node.target is not _ROTARY:
        return merged(editor, node)
    arguments = bound_arguments(node)
    tables = (arguments["cos"], arguments["sin"])
    x = merged(editor, arguments["x"])
    return editor.emit(FLAT_ROTARY, x, *tables, shape(node)[1], arguments["interleaved"])


def _flat_attention(call: Call) -> list[Any]:
    queries, keys = call.shape_of("q")[-2], sizes(call.node.meta["val"][1].shape)[2]
    cached = call["past_key"] is not None
    # The flag means "up to the place of the query": with the past in the node, or with none.
    flag = call["causal"] and not call["window"] and (cached or queries == keys)
    if flag and not call["uniform_if_blind"]:
        mask = whole_mask(call, "mask", queries, keys)
    else:
        flag, mask = False, attention_mask(call, queries, keys)
    if _multi_head_says_it(call, mask):
        return _multi_head(call, mask, flag)
    inputs = [call.value("q"), call.value("k"), call.value("v"), mask]
    inputs += [call.optional("past_key"), call.optional("past_value")]
    more: dict[str, Any] = {"scale": float(call["scale"]), "is_causal": int(flag)}
    if call.rank("q") == 3:
        more |= {"q_num_heads": call["heads"], "kv_num_heads": call["kv_heads"]}
    if call["softcap"]:
        more["softcap"] = float(call["softcap"])
    return call.b.ops("Attention", inputs, [None] * (3 if cached else 1), **more)


def _multi_head_says_it(call: Call, mask: Value | None) -> bool:
    """As many key heads as heads, no cache, and no query that a boolean mask could blind."""
    options = call.b.options
    plain = call["past_key"] is None and not call["softcap"] and call.rank("q") == 3
    wanted = options.contrib and options.attention == "mha" and call["heads"] == call["kv_heads"]
    return bool(wanted and plain and (mask is None or mask.dtype != BOOL))


def _multi_head(call: Call, mask: Value | None, causal: bool) -> list[Any]:
    inputs = [call.value("q"), call.value("k"), call.value("v"), None, None, mask]
    more: dict[str, Any] = {"num_heads": call["heads"], "scale": float(call["scale"])}
    more["unidirectional"] = int(causal)
    return call.b.ops("MultiHeadAttention", inputs, [None], CONTRIB, **more)


def _flat_rotary(call: Call) -> Value:
    batch, length, _ = call.shape_of("x")
    tables = [rotary_table(call, name, batch, length) for name in ("cos", "sin")]
    more = {"interleaved": int(call["interleaved"]), "num_heads": call["heads"]}
    turned = 2 * int(call.shape_of("cos")[-1])
    if turned * call["heads"] != call.shape_of("x")[2]:
        more["rotary_embedding_dim"] = turned
    return call.op("RotaryEmbedding", call.value("x"), *tables, **more)


TABLE: Table = {
    "planish_onnx.flat_attention": _flat_attention,
    "planish_onnx.flat_rotary": _flat_rotary,
}
