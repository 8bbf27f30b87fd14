"""Attention in plain torch, as `planish::flash_attention` means it; float64 gives the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ir.ops import LOWEST


def result_like(q: Tensor, v: Tensor) -> Tensor:
    """An empty result [batch, heads, queries, value head]; rows outside heads if q has them so."""
    batch, heads, queries, _ = q.shape
    if heads > 1 and queries > 1 and q.stride(1) < q.stride(2):
        return q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    return q.new_empty(batch, heads, queries, v.shape[-1])


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    query_starts: Tensor | None = None,
    key_starts: Tensor | None = None,
    blocks: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    uniform_if_blind: bool = False,
    longest: int = 0,
    block_queries: int = 0,
    block_keys: int = 0,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """`planish::attention` and the natural log-sum-exp of its scores, with more options.

    q [batch, heads, queries, head], k [batch, kv_heads, keys, head], v [batch, kv_heads, keys,
    value_head], mask, sinks [heads], scale, causal, window, softcap and uniform_if_blind are those
    of `planish::attention`. slopes: [heads], the linear bias -slope * |distance| of each head
    (Press et al. 2022, ALiBi). k and v may be int8 or float8_e4m3fn; k_scale and v_scale,
    broadcastable to [batch, kv_heads, keys], are what a stored unit is worth.
    query_starts, key_starts: [sequences + 1] int32, from 0 to queries and keys: packed sequences
    that see only themselves; batch is 1; longest: of their query lengths, 0 for unknown. blocks:
    boolean or int32, broadcastable to [batch (or sequences), heads, query blocks, key blocks] of
    block_queries x block_keys: what is zero is neither seen nor read. tf32: fp32 products with
    11-bit factors. A key that no query sees may hold anything.
    Returns the result in q's dtype, and [batch, heads, queries] in at least float32: minus infinity
    for a blind query without a sink.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys = q.shape[2], k.shape[2]
    scores = _grouped(q.to(wide), _scaled(k, k_scale, wide).transpose(-1, -2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    place, here, seen = _places(queries, keys, query_starts, key_starts, q.device)
    if slopes is not None:
        distance = (place[:, None] - here[None, :]).abs()
        scores = scores - slopes.to(wide)[:, None, None] * distance
    own = seen  # a packed sequence's own keys
    if causal:
        seen = seen & (here[None, :] <= place[:, None])
    if window:
        seen = seen & (here[None, :] > place[:, None] - window)
    if blocks is not None:
        seen = seen & _spread(blocks, query_starts, key_starts, queries, keys,
                              block_queries, block_keys)  # fmt: skip
    values = _scaled(v, None, wide)
    read = seen.expand(*q.shape[:3], keys).unflatten(1, (k.shape[1], -1)).any(3).any(2)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        added = mask.to(wide)
        scores = scores + added
        seen = seen & (added > LOWEST) if uniform_if_blind else seen
    scores = scores.masked_fill(~seen, -math.inf)
    last = scores.new_full((1,), -math.inf) if sinks is None else sinks.to(wide)
    scores = torch.cat((scores, last[:, None, None].expand(*q.shape[:3], 1)), -1)
    lse = torch.logsumexp(scores, -1)
    blind = (lse == -math.inf)[..., None]
    weights = torch.softmax(scores, -1)[..., :-1].masked_fill(blind, 0.0)
    if uniform_if_blind and sinks is None:
        even = own.to(wide) / own.sum(-1, keepdim=True).clamp_min(1)
        weights = torch.where(blind, even, weights)
    else:
        values = values.masked_fill(~read[..., None], 0.0)
    if v_scale is not None:
        weights = _grouped_scale(weights, v_scale.to(wide).expand(k.shape[:3]))
    out = result_like(q, v)
    out.copy_(_grouped(weights.to(q.dtype).to(wide), values))
    return out, lse


def _scaled(stored: Tensor, scale: Tensor | None, wide: torch.dtype) -> Tensor:
    values = stored.to(wide)
    return values if scale is None else values * scale.to(wide).expand(stored.shape[:3])[..., None]


def _grouped(rows: Tensor, shared: Tensor) -> Tensor:
    """Products of each head with its group's keys or values, which are not repeated."""
    batch, heads, queries, _ = rows.shape
    kv_heads = shared.shape[1]
    merged = rows.reshape(batch, kv_heads, heads // kv_heads * queries, rows.shape[-1])
    return (merged @ shared).reshape(batch, heads, queries, shared.shape[-1])


def _grouped_scale(weights: Tensor, scale: Tensor) -> Tensor:
    split = weights.unflatten(1, (scale.shape[1], -1))
    return (split * scale[:, :, None, None]).flatten(1, 2)


def _places(
    queries: int,
    keys: int,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each query and each key stands, and which [queries, keys] are of one sequence."""
    row = torch.arange(queries, device=device)
    column = torch.arange(keys, device=device)
    if query_starts is None or key_starts is None:
        return row + (keys - queries), column, torch.ones_like(row[:, None] | column[None, :]) > 0
    of_row = torch.bucketize(row, query_starts[1:], right=True)
    of_column = torch.bucketize(column, key_starts[1:], right=True)
    of_row, of_column = (x.clamp_max(query_starts.shape[0] - 2) for x in (of_row, of_column))
    lengths = key_starts.diff() - query_starts.diff()
    place = row - query_starts[of_row] + lengths[of_row]
    return place, column - key_starts[of_column], of_row[:, None] == of_column[None, :]


def _spread(
    blocks: Tensor,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    queries: int,
    keys: int,
    block_queries: int,
    block_keys: int,
) -> Tensor:
    """A block map as [batch or 1, heads or 1, queries, keys] booleans."""
    blocks = blocks[(None,) * (4 - blocks.dim())] != 0
    row = torch.arange(queries, device=blocks.device)
    column = torch.arange(keys, device=blocks.device)
    if query_starts is None or key_starts is None:
        return blocks[:, :, row[:, None] // block_queries, column[None, :] // block_keys]
    of_row = torch.bucketize(row, query_starts[1:], right=True)
    of_column = torch.bucketize(column, key_starts[1:], right=True)
    last = query_starts.shape[0] - 2
    row = row - query_starts[of_row.clamp_max(last)]
    column = (column - key_starts[of_column.clamp_max(last)]).clamp_max(
        blocks.shape[-1] * block_keys - 1
    )
    sequence = of_row.clamp_max(last) if blocks.shape[0] > 1 else torch.zeros_like(of_row)
    at = (row // block_queries).clamp_max(blocks.shape[-2] - 1)
    spread = blocks[sequence[:, None], :, at[:, None], column[None, :] // block_keys]
    return spread.permute(2, 0, 1)[None]
