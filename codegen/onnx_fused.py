"""What onnxruntime computes in one node of its own, as operations of a program.

Lowering for the ONNX target rewrites a copy of the program into these, so that the step from
program to ONNX stays one operation a node; each has its meaning in PyTorch, and a lowered program
runs on the reference interpreter like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir import ops as _ops  # registers the planish namespace

_LIBRARY = torch.library.Library("planish_onnx", "DEF")
SEMANTIC_OPS = _ops.__name__


def _skip_rms_norm(
    x: Tensor, skip: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + skip), x + skip). x, skip: [..., channels]; weight: [channels]."""
    total = x + skip
    return torch.ops.planish.rms_norm(total, weight, eps, offset), total


def _skip_layer_norm(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + skip), x + skip). x, skip: [..., channels]; weight, bias: [channels]."""
    total = x + skip
    return torch.nn.functional.layer_norm(total, weight.shape, weight, bias, eps), total


def _heads(x: Tensor, heads: int) -> Tensor:
    """[batch, length, heads * head] as [batch, heads, length, head]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """The inverse of `_heads`."""
    return x.transpose(1, 2).flatten(2)


def _group_query(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention with a cache: (values, keys and values for the next call).

    q: [batch, length, heads * head], k, v: [batch, length, kv_heads * head]; or all three beside
    one another in q. past_key, past_value: [batch, kv_heads, past, head]. cos, sin: tables
    [context, rotary / 2] by which q and k are turned, the first new token by row `past`. mask is
    added to the scores; the rest as in planish::attention. Returns [batch, length, heads * head]
    and twice [batch, kv_heads, past + length, head].
    """
    head = past_key.shape[3]
    if k is None or v is None:
        q, k, v = q.split([heads * head, kv_heads * head, kv_heads * head], -1)
    query, key, value = _heads(q, heads), _heads(k, kv_heads), _heads(v, kv_heads)
    if cos is not None and sin is not None:
        places = torch.arange(q.shape[1], device=q.device) + past_key.shape[2]
        tables = (cos[places], sin[places])
        query, key = (torch.ops.planish.rotary(x, *tables, interleaved) for x in (query, key))
    keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    more = {"scale": scale, "window": window, "softcap": softcap}
    found = torch.ops.planish.attention(query, keys, values, mask, sinks, causal=True, **more)
    return _flat(found), keys, values


def _flat_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, heads: int, interleaved: bool = False
) -> Tensor:
    """planish::rotary of every head. x: [batch, length, heads * head]."""
    return _flat(torch.ops.planish.rotary(_heads(x, heads), cos, sin, interleaved))


def _flat_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    uniform_if_blind: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """planish::attention that may keep keys and values, heads beside one another or apart.

    q: [batch, queries, heads * head] or [batch, heads, queries, head], k and v likewise with
    kv_heads. past_key, past_value: [batch, kv_heads, past, head], put before k and v. Returns the
    values in q's form, and all keys and values [batch, kv_heads, past + queries, head].
    """
    flat = q.dim() == 3
    query = _heads(q, heads) if flat else q
    keys, values = (_heads(x, kv_heads) if flat else x for x in (k, v))
    if past_key is not None and past_value is not None:
        keys, values = torch.cat([past_key, keys], 2), torch.cat([past_value, values], 2)
    more = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
    found = torch.ops.planish.attention(
        query, keys, values, mask, **more, uniform_if_blind=uniform_if_blind
    )
    found = _flat(found) if flat else found
    return (found, keys, values) if past_key is not None else (found, keys.clone(), values.clone())


def _define() -> None:
    definitions = {
        "skip_rms_norm(Tensor x, Tensor skip, Tensor weight, float eps, float offset=0.0) "
        "-> (Tensor, Tensor)": _skip_rms_norm,
        "skip_layer_norm(Tensor x, Tensor skip, Tensor weight, Tensor? bias, float eps) "
        "-> (Tensor, Tensor)": _skip_layer_norm,
        "group_query(Tensor q, Tensor? k, Tensor? v, Tensor past_key, Tensor past_value, "
        "Tensor? cos=None, Tensor? sin=None, Tensor? mask=None, Tensor? sinks=None, *, int heads, "
        "int kv_heads, float scale, int window=0, float softcap=0.0, bool interleaved=False) "
        "-> (Tensor, Tensor, Tensor)": _group_query,
        "flat_rotary(Tensor x, Tensor cos, Tensor sin, int heads, bool interleaved=False) "
        "-> Tensor": _flat_rotary,
        "flat_attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? past_key=None, "
        "Tensor? past_value=None, *, int heads, int kv_heads, float scale, bool causal=False, "
        "int window=0, float softcap=0.0, bool uniform_if_blind=False) "
        "-> (Tensor, Tensor, Tensor)": _flat_attention,
    }
    for schema, meaning in definitions.items():
        _LIBRARY.define(schema)
        _LIBRARY.impl(schema.split("(", 1)[0], meaning, "CompositeImplicitAutograd")


_define()
SKIP_RMS_NORM = torch.ops.planish_onnx.skip_rms_norm.default
SKIP_LAYER_NORM = torch.ops.planish_onnx.skip_layer_norm.default
GROUP_QUERY = torch.ops.planish_onnx.group_query.default
FLAT_ROTARY = torch.ops.planish_onnx.flat_rotary.default
FLAT_ATTENTION = torch.ops.planish_onnx.flat_attention.default
