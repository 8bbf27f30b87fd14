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
from torch.fx.experimental.symbolic_shapes import statically_known_true

_LIBRARY = torch.library.Library("planish", "DEF")


REFERENCES: dict[str, Callable[..., Tensor]] = {}
"""The reference of every semantic operation, by its name without namespace."""


def _define(schema: str, reference: Callable[..., Tensor]) -> None:
    name = schema.split("(", 1)[0]
    REFERENCES[name] = reference
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


def _visible(
    q_len: int, k_len: int, causal: bool, window: int, device: torch.device
) -> Tensor | None:
    """The [q_len, k_len] boolean mask of a causal and/or windowed attention; True is visible."""
    if not causal and not window:
        return None
    last = torch.arange(q_len, device=device)[:, None] + (k_len - q_len)
    key = torch.arange(k_len, device=device)[None, :]
    if not causal:
        return key > last - window
    return (key <= last) & (key > last - window) if window else key <= last


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
    uniform_if_blind: bool = False,
) -> Tensor:
    """Scaled dot-product attention with everything that today's models add to it.

    softmax(softcap(q k^T * scale) + mask) v, per head (Vaswani et al. 2017, eq. 1).
    q: [batch, heads, queries, head]; k: [batch, kv_heads, keys, head]; v: [batch, kv_heads, keys,
    value_head]; heads is a multiple of kv_heads (grouped queries). The last query sits at the last
    key: query i sees key j iff j <= i + keys - queries when `causal`, and only
    j > i + keys - queries - window when `window` > 0. mask: broadcastable to [batch, heads,
    queries, keys]; boolean (True is visible) or additive (rounded to q's dtype). sinks: [heads]
    logits that join the softmax and take no value. softcap > 0: s = softcap * tanh(s / softcap).
    A blind query (one that sees no key: padding) gives zeros; with `uniform_if_blind` it gives
    the mean of all values, as in models that hide a key by the lowest finite number instead of
    minus infinity. Returns [batch, heads, queries, value_head].
    """
    heads = q.shape[1]
    seen = _visible(q.shape[2], k.shape[2], causal, window, q.device)
    if sinks is not None or softcap:
        groups = heads // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
        scores = q @ k.transpose(-1, -2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        joined = _join_masks(mask, seen, scores.dtype, uniform_if_blind)
        return _masked_softmax(scores, joined, sinks) @ v
    grouped = k.shape[1] != heads
    if mask is None and causal and not window and statically_known_true(q.shape[2] == k.shape[2]):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
    joined = _join_masks(mask, seen, q.dtype, uniform_if_blind)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, joined, scale=scale, enable_gqa=grouped
    )


def _join_masks(
    mask: Tensor | None, seen: Tensor | None, dtype: torch.dtype, uniform: bool
) -> Tensor | None:
    """One mask of both. uniform: hidden keys get one finite number, so blind rows are even."""
    low = max(LOWEST, torch.finfo(dtype).min) if uniform else -math.inf
    if mask is None or mask.dtype == torch.bool:
        visible = seen if mask is None else mask if seen is None else mask & seen
        if visible is None or not uniform:
            return visible
        return torch.zeros((), dtype=dtype, device=visible.device).masked_fill(~visible, low)
    mask = mask.to(dtype)
    mask = mask.clamp_min(low) if uniform else mask
    return mask if seen is None else mask.masked_fill(~seen, low)


LOWEST = -1e38
"""Absorbs every score it is added to, in float32, bfloat16 and float64 alike."""


def _masked_softmax(scores: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
    """Softmax over keys in at least float32, rounded to the dtype of the scores."""
    blind = None
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        blind = ~mask.any(-1, keepdim=True)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, -1, dtype=wide).to(scores.dtype)
    weights = weights[..., :-1] if sinks is not None else weights
    return weights if blind is None else weights.masked_fill(blind, 0.0)


_define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? sinks=None, *, "
    "float scale, bool causal=False, int window=0, float softcap=0.0, "
    "bool uniform_if_blind=False) -> Tensor",
    _attention,
)
