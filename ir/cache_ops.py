"""Operations of compressed KV caches: number codes, attention mass, the choice of heavy hitters.

Defined as in `ops`: schema, shape rule and reference in one function. A cache is a tensor
[batch, kv_heads, tokens, ...]; what the past calls stored is never computed anew.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .ops import _define, _join_masks, _masked_softmax, _visible

CODE_BITS = (2, 4, 8)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., width] below 2^bits, several to a byte, lowest bits first."""
    per = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per))
    packed = codes[..., 0::per]
    for place in range(1, per):
        packed = packed | (codes[..., place::per] << (place * bits))
    return packed


def _unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `_pack`: uint8 [..., width]."""
    per, mask = 8 // bits, (1 << bits) - 1
    codes = [(packed >> (place * bits)) & mask for place in range(per)]
    return torch.stack(codes, -1).flatten(-2)[..., :width]


def _quantize_cache(x: Tensor, scale: Tensor, zero: Tensor | None = None, bits: int = 8) -> Tensor:
    """Codes of x on the grid `zero + scale * code`, rounded to nearest (ties to even).

    x: [..., width]; scale, zero: broadcast against x, in its dtype; a scale of 0 (a constant
    group) gives code 0. Without zero: int8 [..., width], symmetric, -127 to 127 (bits is 8).
    With zero, the value of code 0 (KIVI, Liu et al. 2024, eq. 1): uint8 [..., ceil(width * bits /
    8)], codes from 0 to 2^bits - 1 packed lowest bits first; bits: 2, 4 or 8.
    """
    step = torch.where(scale == 0, torch.ones_like(scale), scale)
    if zero is None:
        return torch.round(x / step).clamp(-127, 127).to(torch.int8)
    codes = torch.round((x - zero) / step).clamp(0, (1 << bits) - 1).to(torch.uint8)
    return codes if bits == 8 else _pack(codes, bits)


_define(
    "quantize_cache(Tensor x, Tensor scale, Tensor? zero=None, int bits=8) -> Tensor",
    _quantize_cache,
)


def _dequantize_cache(
    codes: Tensor, scale: Tensor, zero: Tensor | None = None, bits: int = 8, *, width: int
) -> Tensor:
    """`zero + scale * code` of the codes that quantize_cache made; [..., width], scale's dtype."""
    if zero is None:
        return codes.to(scale.dtype) * scale
    loose = codes if bits == 8 else _unpack(codes, bits, width)
    return loose.to(scale.dtype) * scale + zero


_define(
    "dequantize_cache(Tensor codes, Tensor scale, Tensor? zero=None, int bits=8, *, int width) "
    "-> Tensor",
    _dequantize_cache,
)


def _attention_mass(
    q: Tensor,
    k: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """The weight that each key receives from all queries of a causal attention.

    q: [batch, heads, queries, head]; k: [batch, kv_heads, keys, head]; scale, softcap, sinks as in
    `attention`. The weights of that attention are summed over the queries and over the query heads
    that share a key head. Returns [batch, kv_heads, keys] in at least float32.
    """
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    k = k.repeat_interleave(heads // kv_heads, 1) if heads != kv_heads else k
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # A single query stands at the last key and sees them all.
    alone = statically_known_true(queries == 1)
    seen = None if alone else _visible(queries, keys, True, 0, q.device)
    joined = _join_masks(None, seen, scores.dtype, False)
    weights = _masked_softmax(scores, joined, sinks)
    return weights.sum(2).reshape(batch, kv_heads, heads // kv_heads, keys).sum(2)


_define(
    "attention_mass(Tensor q, Tensor k, Tensor? sinks=None, *, float scale, "
    "float softcap=0.0) -> Tensor",
    _attention_mass,
)


def _heavy_hitters(mass: Tensor, recent: int, heavy: int) -> Tensor:
    """Which tokens a cache keeps: the last `recent`, and of the others the `heavy` of most mass.

    mass: [batch, kv_heads, tokens]. Returns places int64 [batch, kv_heads, min(tokens, recent +
    heavy)] in rising order; of equal masses the earlier token is kept. (H2O, Zhang et al. 2023.)
    """
    tokens = mass.shape[2]
    older = torch.sym_max(tokens - recent, 0)
    chosen = torch.sym_min(older, heavy)
    order = torch.sort(mass[:, :, :older], dim=-1, descending=True, stable=True).indices
    hitters = torch.sort(order[:, :, :chosen], dim=-1).values
    last = torch.arange(older, tokens, device=mass.device)
    return torch.cat((hitters, last.expand(mass.shape[0], mass.shape[1], -1)), -1)


_define("heavy_hitters(Tensor mass, int recent, int heavy) -> Tensor", _heavy_hitters)
