"""Normalizations in ONNX."""

from __future__ import annotations

import numpy as np
import torch

from .onnx_builder import Value
from .onnx_call import Call, Table
from .onnx_shape_ops import expand, reshape
from .onnx_sizes import Size
from .onnx_weights import is_weight, shifted_weight


def _ones(call: Call, length: int) -> Value:
    return call.b.constant(np.ones(length), call.dtype)


def _layer_norm(call: Call) -> Value:
    shape = [int(length) for length in call["normalized_shape"]]
    scale = call.optional("weight")
    if scale is None:
        scale = call.b.constant(np.ones(shape), call.dtype)
    x, eps = call.value("input"), float(call["eps"])
    bias = call.optional("bias")
    return call.op("LayerNormalization", x, scale, bias, axis=-len(shape), epsilon=eps)


def _rms_norm(call: Call) -> Value:
    """planish::rms_norm: over the last axis, the weight shifted by `offset`."""
    x, weight, offset = call["x"], call["weight"], call["offset"]
    if weight is None:
        channels = call.shape[-1]
        if not isinstance(channels, int):
            raise call.refuse("rms_norm over a free axis")
        scale = _ones(call, channels)
    elif not offset:
        scale = call.value("weight", call.dtype)
    elif is_weight(weight):
        scale = call.b.cast(shifted_weight(call.b, weight, offset), call.dtype)
    else:
        scale = call.op("Add", call.value("weight", call.dtype), call.number(offset))
    return call.op("RMSNormalization", call.of(x), scale, axis=-1, epsilon=float(call["eps"]))


def _aten_rms_norm(call: Call) -> Value:
    shape = [int(length) for length in call["normalized_shape"]]
    eps = call.get("eps", torch.finfo(call.meta.dtype).eps)
    scale = call.optional("weight")
    if scale is None:
        scale = call.b.constant(np.ones(shape), call.dtype)
    return call.op("RMSNormalization", call.value("input"), scale, axis=-len(shape), epsilon=eps)


def _group_norm(call: Call) -> Value:
    channels = int(call.shape[1])
    weight, bias = call.optional("weight"), call.optional("bias")
    weight = _ones(call, channels) if weight is None else weight
    bias = call.b.constant(np.zeros(channels), call.dtype) if bias is None else bias
    more = {"num_groups": call["num_groups"], "epsilon": float(call["eps"])}
    return call.op("GroupNormalization", call.value("input"), weight, bias, **more)


def _batch_norm(call: Call) -> Value:
    channels = int(call.shape[1])
    weight, bias = call.optional("weight"), call.optional("bias")
    weight = _ones(call, channels) if weight is None else weight
    bias = call.b.constant(np.zeros(channels), call.dtype) if bias is None else bias
    inputs = [call.value("input"), weight, bias]
    inputs += [call.value("running_mean"), call.value("running_var")]
    return call.op("BatchNormalization", *inputs, epsilon=float(call["eps"]))


def _rotary(call: Call) -> Value | None:
    """planish::rotary by ONNX's own op; None for layouts that it does not know.

    x must be [batch, heads, length, channels], the angles alike for all heads.
    """
    x, cos = call.shape_of("x"), call.shape_of("cos")
    for_all_heads = all(length == 1 for length in cos[-3:-2])
    if len(x) != 4 or len(cos) < 2 or not for_all_heads or not isinstance(cos[-1], int):
        return None
    tables = [rotary_table(call, name, x[0], x[2]) for name in ("cos", "sin")]
    more = {"interleaved": int(call["interleaved"])}
    if 2 * cos[-1] != x[-1]:
        more["rotary_embedding_dim"] = 2 * cos[-1]
    return call.op("RotaryEmbedding", call.value("x"), *tables, **more)


def rotary_table(call: Call, name: str, rows: Size, length: Size) -> Value:
    """The angles as [batch, length, half], which the op wants whole."""
    have = call.shape_of(name)
    value = call.value(name, call.dtype)
    wanted = [rows, length, have[-1]]
    batch = have[0] if len(have) == 4 else 1

    def make() -> Value:
        flat = reshape(call.b, value, have, [batch, have[-2], have[-1]])
        return expand(call.b, flat, [batch, have[-2], have[-1]], wanted)

    return call.b.once(("rotary", value, tuple(wanted)), make)


TABLE: Table = {
    "aten.layer_norm": _layer_norm,
    "aten.native_layer_norm": lambda call: [_layer_norm(call), None, None],
    "aten.rms_norm": _aten_rms_norm,
    "aten.group_norm": _group_norm,
    "aten.batch_norm": _batch_norm,
    "planish.rms_norm": _rms_norm,
    "planish.rotary": _rotary,
}
