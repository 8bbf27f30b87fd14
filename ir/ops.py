"""planish's semantic operations: schema, shape rule and reference, each in one place.

Every operation is a `torch.library` operator of the namespace `planish`. Its reference is
registered as a composite implementation, so the same function serves four ends: eager
execution, the shape rule (it runs on fake tensors), the decomposition for a target that knows
nothing of the operation, and the float64 meaning that rewrites are checked against.

Operations that ATen already has with the same meaning (`layer_norm`, `gelu`, `silu`, `linear`)
are not repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("planish", "DEF")


def _define(schema: str, reference: Callable[..., Tensor]) -> None:
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeImplicitAutograd")


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """Root mean square normalization over the last axis (Zhang & Sennrich 2019, eq. 4).

    `x / sqrt(mean(x^2) + eps) * (offset + weight)`; the statistics are taken in float32 for
    half-precision inputs. `offset` is 1 for models that store `weight - 1`.
    x: [..., channels]; weight: [channels] or absent. Returns the shape and dtype of x.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if offset:
        return (normed * (weight.to(normed.dtype) + offset)).to(x.dtype)
    return weight * normed.to(x.dtype)


_define("rms_norm(Tensor x, Tensor? weight, float eps, float offset=0.0) -> Tensor", _rms_norm)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding of the leading `rotary` channels (Su et al. 2021, eq. 34).

    x: [..., length, channels]; cos, sin: [..., length, rotary / 2], broadcast against x's leading
    axes, one angle per rotated pair; channels past `rotary` pass through (partial rotary). A pair
    is (i, i + rotary/2), or (2i, 2i + 1) when `interleaved`. Returns the shape and dtype of x.
    """
    half = cos.shape[-1]
    turned, passed = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((out, passed), -1) if x.shape[-1] != 2 * half else out


_define("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor", _rotary)


def _activate(x: Tensor, activation: str) -> Tensor:
    match activation:
        case "silu":
            return torch.nn.functional.silu(x)
        case "gelu":
            return torch.nn.functional.gelu(x)
        case "gelu_tanh":
            return torch.nn.functional.gelu(x, approximate="tanh")
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "relu":
            return torch.relu(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case _:
            raise ValueError(f"unknown activation {activation!r}")


def _quick_gelu(x: Tensor) -> Tensor:
    """Sigmoid approximation of GELU, x * sigmoid(1.702 x) (Hendrycks & Gimpel 2016, sec. 2)."""
    return _activate(x, "quick_gelu")


_define("quick_gelu(Tensor x) -> Tensor", _quick_gelu)


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Gate of a gated MLP: activation(gate) * up (Shazeer 2020, eq. 6).

    gate, up: the same shape. activation: silu, gelu, gelu_tanh, quick_gelu, relu or sigmoid.
    """
    return _activate(gate, activation) * up


_define("gated(Tensor gate, Tensor up, str activation) -> Tensor", _gated)


def _visible(q_len: int, k_len: int, causal: bool, window: int, device: torch.device) -> Tensor:
    """The [q_len, k_len] boolean mask of a causal and/or windowed attention; True is visible."""
    last = torch.arange(q_len, device=device)[:, None] + (k_len - q_len)
    key = torch.arange(k_len, device=device)[None, :]
    seen = key <= last if causal else torch.ones_like(key <= last)
    return seen & (key > last - window) if window else seen


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention with everything that today's models add to it.

    softmax(softcap(q k^T * scale) + mask) v, per head (Vaswani et al. 2017, eq. 1).
    q: [batch, heads, queries, head]; k: [batch, kv_heads, keys, head]; v: [batch, kv_heads, keys,
    value_head]; heads is a multiple of kv_heads (grouped queries). The last query sits at the last
    key: query i sees key j iff j <= i + keys - queries when `causal`, and only the last `window`
    of those when `window` > 0. mask: broadcastable to [batch, heads, queries, keys]; boolean (True
    is visible) or additive. sinks: [heads] logits that join the softmax and take no value.
    softcap > 0: s = softcap * tanh(s / softcap). Fully masked rows give zeros for boolean masks.
    Returns [batch, heads, queries, value_head].
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k = k.repeat_interleave(groups, 1)
        v = v.repeat_interleave(groups, 1)
    plain = sinks is None and not softcap
    if plain and not causal and not window:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    seen = None
    if causal or window:
        seen = _visible(q.shape[2], k.shape[2], causal, window, q.device)
    if plain:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, _join_masks(mask, seen, q.dtype), scale=scale
        )
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    joined = _join_masks(mask, seen, q.dtype)
    if joined is not None:
        additive = torch.zeros((), dtype=q.dtype).masked_fill(~joined, -math.inf)
        scores = scores + (additive if joined.dtype == torch.bool else joined)
    return _softmax_with_sinks(scores, sinks) @ v


def _join_masks(mask: Tensor | None, seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or seen is None:
        return seen if mask is None else mask
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.to(dtype).masked_fill(~seen, -math.inf)


def _softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return torch.softmax(scores, -1)
    column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]


_define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? sinks=None, *, "
    "float scale, bool causal=False, int window=0, float softcap=0.0) -> Tensor",
    _attention,
)
