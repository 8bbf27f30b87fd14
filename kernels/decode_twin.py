"""Attention over contiguous or paged caches in plain torch: what the split-K kernels compute."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.cache_ops import _unpack


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    table: Tensor | None = None,
    k_scale: Tensor | None = None,
    k_zero: Tensor | None = None,
    v_scale: Tensor | None = None,
    v_zero: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    tail_k: Tensor | None = None,
    tail_v: Tensor | None = None,
    coded: Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    first: int = 0,
    softcap: float = 0.0,
    k_bits: int = 8,
    v_bits: int = 8,
) -> Tensor:
    """Causal attention of the last few tokens of each sequence over its cache, theirs included.

    q: [batch, heads, queries, head]. k, v: [batch, kv_heads, tokens, head] or, with `table`,
    [pages, kv_heads, page, head]; strides are free, so a cache kept as [pages, page, kv_heads,
    head] is given transposed. lengths: int32 [batch], tokens of a sequence, from 0 to the
    capacity; what the cache holds beyond is not read. table: int32 [batch, most pages] (Kwon et al.
    2023, PagedAttention). The last query sits at token lengths - 1: query i sees token j iff
    j <= p = lengths - queries + i and, when window > 0, j > p - window or j < first (Xiao et al.
    2023, StreamingLLM). A query that sees nothing gives zeros.

    k_scale, v_scale: [batch or pages, kv_heads, tokens / a, head / b]: a tokens and b channels
    share a scale ([.., tokens, 1] per token; [.., groups, head] per channel in groups of tokens, as
    KIVI, Liu et al. 2024, has its keys). k_zero, v_zero: of the same form; the value of code 0.
    Codes are int8 or fp8 or, of k_bits or v_bits, uint8 packed lowest bits first along the head.
    tail_k, tail_v: [batch, kv_heads, some, head], the tokens that are not coded yet; coded: int32
    [batch], how many tokens of a sequence come before them in k and v (lengths counts both).
    sinks: [heads] logits that join the softmax and take no value. slopes: [heads], ALiBi: slope *
    (j - p) is added after softcap. Returns [batch, heads, queries, value_head] in q's dtype.
    """
    keys = dense(k, k_scale, k_zero, k_bits, table, q.dtype)
    values = dense(v, v_scale, v_zero, v_bits, table, q.dtype)
    if tail_k is not None and tail_v is not None and coded is not None:
        keys, values = (follow(*x, coded) for x in ((keys, tail_k), (values, tail_v)))
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, queries, _ = q.shape
    group = heads // keys.shape[1]
    token = torch.arange(keys.shape[2], device=q.device)
    ends = lengths.to(torch.int64)[:, None, None, None]
    position = ends - queries + torch.arange(queries, device=q.device)[:, None]
    seen = token <= position
    if window:
        seen = seen & ((token > position - window) | (token < first))
    # What lies beyond a sequence's end may be anything, NaN included.
    values = values.masked_fill(~(token[:, None] < ends), 0)
    keys, values = (x.repeat_interleave(group, 1).to(wide) for x in (keys, values))
    scores = q.to(wide) @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores + slopes.to(wide)[:, None, None] * (token - position)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.to(wide).reshape(1, -1, 1, 1).expand(batch, -1, queries, 1)
        scores = torch.cat((scores, column), -1)
    weights = torch.softmax(scores, -1)[..., : keys.shape[2]]
    return (weights.masked_fill(~seen.any(-1, keepdim=True), 0) @ values).to(q.dtype)


def dense(
    cache: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bits: int,
    table: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """A cache in a plain form: [batch, kv_heads, tokens, head] in `dtype`."""
    if cache.dtype == torch.uint8 and bits < 8:
        cache = _unpack(cache, bits, cache.shape[-1] * 8 // bits)
    if scale is not None:
        wide = torch.promote_types(dtype, torch.float32)
        cache = cache.to(wide) * spread(scale, cache).to(wide)
        cache = cache if zero is None else cache + spread(zero, cache).to(wide)
    cache = cache.to(dtype)
    if table is None:
        return cache
    paged = cache[table.to(torch.int64).clamp(0, cache.shape[0] - 1)]
    return paged.permute(0, 2, 1, 3, 4).flatten(2, 3)


def follow(cache: Tensor, tail: Tensor, coded: Tensor) -> Tensor:
    """The first `coded` tokens of each sequence's cache and then its tail, as one cache."""
    most = cache.shape[2]
    token = torch.arange(most + tail.shape[2], device=cache.device)
    begin = coded.to(torch.int64)[:, None]
    place = torch.where(token < begin, token, most + (token - begin).clamp_max(tail.shape[2] - 1))
    joined = torch.cat((cache, tail.to(cache.dtype)), 2)
    return joined.take_along_dim(place[:, None, :, None], 2)


def spread(scale: Tensor, cache: Tensor) -> Tensor:
    """A scale for every element of a cache."""
    for axis in (2, 3):
        times = cache.shape[axis] // max(scale.shape[axis], 1)
        scale = scale.repeat_interleave(times, axis) if times > 1 else scale
    return scale
