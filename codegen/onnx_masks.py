"""Masks of attention in ONNX: given, causal, windowed, and their joint form, each built once."""

from __future__ import annotations

import math

import torch

from ..ir.ops import LOWEST
from .onnx_builder import BOOL, INT64, Value
from .onnx_call import Call
from .onnx_shape_ops import expand
from .onnx_sizes import Size, size_scalar, sizes


def attention_mask(call: Call, queries: Size, keys: Size) -> Value | None:
    """The mask argument and what causal order and window hide, as one mask; None: all is seen."""
    causal, window = bool(call["causal"]), int(call["window"])
    mask = whole_mask(call, "mask", queries, keys)
    seen = _seen(call, queries, keys, causal, window) if causal or window else None
    return _joined(call, mask, seen)


def whole_mask(call: Call, name: str, queries: Size, keys: Size) -> Value | None:
    """The mask with its last two axes whole, which onnxruntime asks for."""
    node = call[name]
    if node is None:
        return None
    have = sizes(node.meta["val"].shape)
    wanted = [*have[:-2], queries, keys]
    kind = BOOL if node.meta["val"].dtype.itemsize == 1 else call.dtype
    value = call.value(name, kind)
    if len(have) >= 2 and have == wanted:
        return value
    key_ = ("mask", value, tuple(wanted))
    return call.b.once(key_, lambda: expand(call.b, value, have, wanted))


def _seen(call: Call, queries: Size, keys: Size, causal: bool, window: int) -> Value:
    """bool [queries, keys]: the last query sits at the last key."""
    b = call.b

    def make() -> Value:
        zero, one = b.constant(0, INT64), b.constant(1, INT64)
        key = b.op("Range", zero, size_scalar(b, keys), one, dtype=INT64)
        last = b.op("Range", zero, size_scalar(b, queries), one, dtype=INT64)
        last = b.op("Unsqueeze", last, b.ints([1]))
        if queries != keys:
            ends = [size_scalar(b, length) for length in (keys, queries)]
            last = b.op("Add", last, b.op("Sub", *ends))
        seen: Value | None = None
        if causal:
            seen = b.op("LessOrEqual", key, last, dtype=BOOL)
        if window:
            oldest = b.op("Sub", last, b.constant(window, INT64))
            recent = b.op("Greater", key, oldest, dtype=BOOL)
            seen = recent if seen is None else b.op("And", seen, recent)
        assert seen is not None
        return seen

    return b.once(("visible", queries, keys, causal, window), make)


def _joined(call: Call, mask: Value | None, seen: Value | None) -> Value | None:
    """One mask of both; see `uniform_if_blind` of planish::attention."""
    b, uniform = call.b, bool(call["uniform_if_blind"])
    low = max(LOWEST, torch.finfo(call.meta.dtype).min) if uniform else -math.inf
    hidden = b.constant(low, call.dtype)

    def make() -> Value | None:
        if mask is not None and mask.dtype != BOOL:
            kept = b.op("Max", mask, hidden) if uniform else mask
            return kept if seen is None else b.op("Where", seen, kept, hidden, dtype=call.dtype)
        both = mask or seen
        if mask is not None and seen is not None:
            both = b.op("And", mask, seen)
        if both is None or not uniform:
            return both
        return b.op("Where", both, b.constant(0, call.dtype), hidden, dtype=call.dtype)

    return b.once(("joined", mask, seen, uniform), make)
