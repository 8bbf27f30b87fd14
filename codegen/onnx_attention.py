"""Attention in ONNX.

ONNX's own Attention (opset 23) where it can say what is meant: grouped queries, an additive or
boolean mask, causal order. Measured on onnxruntime 1.31.1 (one thread, 9 heads of 64 over 3, 128
and 512 tokens) it takes 0.88 to 0.97 times the time of two MatMul and a Softmax, equals them bit
for bit, and a row without visible keys gives zeros as it does in PyTorch. On a sentence encoder
of 12 heads of 32, onnxruntime's MultiHeadAttention takes 0.99 to 1.1 times the time of Attention
and its fused projection and attention 0.97 to 1.07 times, so neither is used. Sinks are spelled
out, and soft caps where it is not known whether a runtime caps the scores before it masks them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .onnx_builder import BOOL, INT32, Value
from .onnx_call import Call, Table
from .onnx_masks import attention_mask, whole_mask
from .onnx_shape_ops import expand, reshape
from .onnx_sizes import Size, size_list


def _sdpa(call: Call) -> Value | None:
    """aten::scaled_dot_product_attention on [batch, heads, length, head]."""
    if call.rank("query") != 4 or call["dropout_p"]:
        return None
    scale = call["scale"]
    if scale is None:
        scale = 1 / math.sqrt(int(call.shape_of("query")[-1]))
    mask = whole_mask(call, "attn_mask", *(call.shape_of(name)[-2] for name in ("query", "key")))
    # Both ONNX and this operator count a causal mask from the first key.
    causal = int(call["is_causal"])
    inputs = [call.value(name) for name in ("query", "key", "value")]
    return call.op("Attention", *inputs, mask, scale=float(scale), is_causal=causal)


def _attention(call: Call) -> Value:
    """planish::attention on [batch, heads, length, head]."""
    queries, keys = call.shape_of("q")[-2], call.shape_of("k")[-2]
    plain = not call["softcap"] and call["sinks"] is None
    alone = call["causal"] and not call["window"] and call["mask"] is None
    if plain and alone and queries == keys:
        return _onnx_attention(call, None, causal=1)
    mask = attention_mask(call, queries, keys)
    return _onnx_attention(call, mask) if plain else _spelled_out(call, mask)


def _onnx_attention(call: Call, mask: Value | None, causal: int = 0) -> Value:
    inputs = [call.value(name) for name in ("q", "k", "v")]
    more: dict[str, Any] = {"scale": float(call["scale"]), "is_causal": causal}
    return call.op("Attention", *inputs, *([] if mask is None else [mask]), **more)


def _spelled_out(call: Call, mask: Value | None) -> Value:
    """softmax(softcap(q k^T * scale) + mask, sinks) v."""
    scores = _scores(call)
    cap = call["softcap"]
    if cap:
        scores = call.op("Tanh", call.op("Mul", scores, call.number(call["scale"] / cap)))
        scores = call.op("Mul", scores, call.number(cap))
    elif call["scale"] != 1:
        scores = call.op("Mul", scores, call.number(call["scale"]))
    hides = mask is not None and mask.dtype == BOOL
    if mask is not None and hides:
        lowest = call.number(torch.finfo(call.meta.dtype).min)
        scores = call.op("Where", mask, scores, lowest, dtype=call.dtype)
    elif mask is not None:
        scores = call.op("Add", scores, mask)
    if call["sinks"] is not None:
        return _values(call, _with_sinks(call, scores))  # a sink takes all of a blind row
    values = _values(call, call.op("Softmax", scores, axis=-1))
    return _without_blind(call, mask, values) if mask is not None and hides else values


def _without_blind(call: Call, mask: Value, values: Value) -> Value:
    """Zeros for the queries that see no key."""
    b = call.b

    def make() -> Value:
        number = b.op("Cast", mask, dtype=INT32, to=INT32)
        return b.cast(b.op("ReduceMax", number, b.ints([-1]), keepdims=1), BOOL)

    sees = b.once(("sees", mask), make)
    return b.op("Where", sees, values, b.constant(0, call.dtype), dtype=call.dtype)


def _scores(call: Call) -> Value:
    """q k^T; the queries that share a key are stacked, so that keys are not copied."""
    q, k = call.shape_of("q"), call.shape_of("k")
    keys = call.op("Transpose", call.value("k"), perm=[0, 1, 3, 2])
    stacked = _stacked(call, call.value("q"), q, k[1])
    found = call.op("MatMul", stacked, keys)
    return _unstacked(call, found, [*q[:3], k[2]], k[1])


def _values(call: Call, weights: Value) -> Value:
    q, v = call.shape_of("q"), call.shape_of("v")
    stacked = _stacked(call, weights, [*q[:3], v[2]], v[1])
    return _unstacked(call, call.op("MatMul", stacked, call.value("v")), call.shape, v[1])


def _stacked(call: Call, value: Value, shape: Sequence[Size], groups: Size) -> Value:
    """[batch, heads, length, n] as [batch, groups, heads / groups * length, n]."""
    if shape[1] == groups:
        return value
    wanted = size_list(call.b, [shape[0], groups, -1, shape[3]])
    return call.op("Reshape", value, wanted)


def _unstacked(call: Call, value: Value, shape: Sequence[Size], groups: Size) -> Value:
    return value if shape[1] == groups else reshape(call.b, value, None, shape)


def _with_sinks(call: Call, scores: Value) -> Value:
    """Softmax over the keys and one more logit for each head, which then is dropped."""
    b, heads = call.b, call.shape[1]
    q, k = call.shape_of("q"), call.shape_of("k")
    column = reshape(b, call.value("sinks", call.dtype), None, [1, heads, 1, 1])
    column = expand(b, column, [1, heads, 1, 1], [q[0], heads, q[2], 1])
    joined = call.op("Softmax", call.op("Concat", scores, column, axis=-1), axis=-1)
    last = size_list(b, [k[2]])
    return call.op("Slice", joined, b.ints([0]), last, b.ints([3]))


TABLE: Table = {
    "aten.scaled_dot_product_attention": _sdpa,
    "planish.attention": _attention,
}
