"""Attention of a few new tokens over a long cache, contiguous or paged, whole or as codes.

Keys are split among programs and the parts joined by a second launch, without atomics. How many
splits follows from shapes. Sources: Dao et al. 2023, "Flash-Decoding"; Kwon et al. 2023,
"PagedAttention"; Xiao et al. 2023, "StreamingLLM"; Liu et al. 2024, "KIVI".
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from .decode_cases import CASES, FORMS
from .decode_combine import decode_combine_kernel
from .decode_shapes import (
    CONFIGS,
    FLOATS,
    JOINED,
    MOST_ROWS,
    alignment,
    default_config,
    element,
    shared_scale,
    side_by_side,
    side_refused,
    split_count,
    visible_tokens,
    width,
)
from .decode_tile import decode_partial_kernel
from .decode_twin import decode_attention
from .launch import Config, Launch, Plan
from .operator import define
from .spec import Cost
from .triton_spec import TritonSpec


def plan(
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
    *,
    scale: float,
    window: int = 0,
    first: int = 0,
    softcap: float = 0.0,
    k_bits: int = 8,
    v_bits: int = 8,
    config: Config | None = None,
    arch: str = "sm_80",
) -> Plan:
    """Shapes as in the twin; the result is contiguous. One launch where one split is enough."""
    batch, heads, queries, head = q.shape
    kv_heads, value_head = k.shape[1], width(v, v_bits)
    group = heads // kv_heads
    rows = min(MOST_ROWS, max(16, triton.next_power_of_2(group * queries)))
    blocks = triton.cdiv(group * queries, rows)
    chosen = config or default_config(head, value_head, element(q, k, v), arch)
    tiles = triton.cdiv(visible_tokens(k, table, queries, window, first), chosen.constants["BN"])
    splits = split_count(batch * kv_heads * blocks, tiles, arch)
    out = torch.empty((batch, heads, queries, value_head), dtype=q.dtype, device=q.device)
    lse = part = None
    if splits > 1:
        shape = (batch, heads, queries, splits)
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        part = torch.empty((*shape, value_head), dtype=torch.float32, device=q.device)
    args: dict[str, Any] = {
        "Q": q,
        "K": k,
        "V": v,
        "LENGTHS": lengths,
        "TABLE": table,
        "K_SCALE": k_scale,
        "K_ZERO": k_zero,
        "V_SCALE": v_scale,
        "V_ZERO": v_zero,
        "SINKS": sinks,
        "SLOPES": slopes,
        "OUT": out if part is None else part,
        "LSE": lse,
        "scale": float(scale),
        "softcap": float(softcap),
        "window": window,
        "first": first if window else 0,
        "queries": queries,
        "group": group,
        "kv_heads": kv_heads,
        "splits": splits,
        "table_row": 0 if table is None else table.stride(0),
        **_strides("q", q, ("batch", "head", "query")),
        **_strides("k", k, ("block", "head", "token")),
        **_strides("v", v, ("block", "head", "token")),
        **_strides("ks", k_scale, ("block", "head", "token", "channel")),
        **_strides("vs", v_scale, ("block", "head", "token", "channel")),
    }
    constants = {
        **_side("K", k, k_scale, k_bits, head, table is not None),
        **_side("V", v, v_scale, v_bits, value_head, table is not None),
        "HEAD": head,
        "VALUE_HEAD": value_head,
        "Q_ALIGN": alignment(q),
        "O_ALIGN": alignment(out if part is None else part),
        "PAGE": 0 if table is None else k.shape[2],
        "WINDOWED": window > 0,
        "CAPPED": softcap > 0,
        "BM": rows,
        "BD": triton.next_power_of_2(max(head, 16)),
        "BDV": triton.next_power_of_2(max(value_head, 16)),
    }
    grid = (splits, kv_heads * blocks, batch)
    launches = [Launch(decode_partial_kernel, grid, args, constants).with_config(chosen)]
    if part is not None and lse is not None:
        launches.append(_combine(part, lse, sinks, out, queries))
    return Plan((out,), tuple(launches))


def _side(
    name: str, cache: Tensor, scale: Tensor | None, bits: int, head: int, paged: bool
) -> dict[str, int]:
    """Constants of the keys or of the values."""
    tokens, span = shared_scale(cache, scale, head, paged)
    return {
        f"{name}_BITS": bits if cache.dtype == torch.uint8 else 8,
        f"{name}_TOKENS": tokens,
        f"{name}_SPAN": span,
        f"{name}_ALIGN": alignment(cache),
    }


def _combine(part: Tensor, lse: Tensor, sinks: Tensor | None, out: Tensor, queries: int) -> Launch:
    *rows, splits, head = part.shape
    args = {
        "PART": part,
        "LSE": lse,
        "SINKS": sinks,
        "OUT": out,
        "queries": queries,
        "heads": rows[1],
        "splits": splits,
    }
    tile = {"VALUE_HEAD": head, "BS": JOINED, "BDV": triton.next_power_of_2(max(head, 16))}
    return Launch(decode_combine_kernel, (math.prod(rows),), args, tile, num_stages=1)


def _strides(prefix: str, tensor: Tensor | None, names: tuple[str, ...]) -> dict[str, int]:
    """Strides by parameter name; 0 along axes of size one, which a scale may spread over."""
    if tensor is None:
        return {f"{prefix}_{name}": 0 for name in names}
    sizes = tensor.shape[: len(names)]
    found = zip(names, tensor.stride(), sizes, strict=False)
    return {f"{prefix}_{name}": stride if size > 1 else 0 for name, stride, size in found}


def why_not(
    arch: str,
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
    *,
    scale: float,
    window: int = 0,
    first: int = 0,
    softcap: float = 0.0,
    k_bits: int = 8,
    v_bits: int = 8,
) -> str | None:
    if q.dtype not in FLOATS:
        return f"its queries are {q.dtype}"
    if q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} heads are no multiple of {k.shape[1]} key heads"
    if q.shape[2] > 16:
        return f"it has {q.shape[2]} new tokens, and a prompt has a kernel of its own"
    if lengths.dtype != torch.int32 or (table is not None and table.dtype != torch.int32):
        return "its lengths and page table are not int32"
    if not side_by_side(q, k, v, lengths, table, sinks, slopes):
        return "its channels do not lie side by side"
    sides = (
        ("keys", k, k_scale, k_zero, k_bits, q.shape[3]),
        ("values", v, v_scale, v_zero, v_bits, width(v, v_bits) if v_bits in (2, 4, 8) else 0),
    )
    return next(
        (said for side in sides if (said := side_refused(arch, *side, table is not None))), None
    )


def cost(
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
    *,
    scale: float,
    window: int = 0,
    first: int = 0,
    softcap: float = 0.0,
    k_bits: int = 8,
    v_bits: int = 8,
) -> Cost:
    """Caches of which every sequence has the most tokens, each read once; both products."""
    batch, heads, queries, head = q.shape
    tokens = visible_tokens(k, table, queries, window, first)
    value_head = width(v, v_bits)
    nbytes = (q.numel() + batch * heads * queries * value_head) * q.element_size()
    for cache, *scales in ((k, k_scale, k_zero), (v, v_scale, v_zero)):
        row = cache.shape[3] * cache.element_size()
        for each in scales:
            if each is not None:
                row += each.shape[3] * each.element_size() * each.shape[2] / cache.shape[2]
        nbytes += int(batch * cache.shape[1] * tokens * row)
    return Cost(nbytes, 2 * batch * heads * queries * tokens * (head + value_head))


SPEC = TritonSpec(
    name="decode_attention",
    schema="planish::decode_attention(Tensor q, Tensor k, Tensor v, Tensor lengths, "
    "Tensor? table=None, Tensor? k_scale=None, Tensor? k_zero=None, Tensor? v_scale=None, "
    "Tensor? v_zero=None, Tensor? sinks=None, Tensor? slopes=None, *, float scale, int window=0, "
    "int first=0, float softcap=0.0, int k_bits=8, int v_bits=8) -> Tensor",
    serves="attention of new tokens over a cache",
    twin=decode_attention,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=CASES,
    forms=FORMS,
)

define(SPEC)
