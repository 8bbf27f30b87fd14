"""Attention of a few new tokens over a long cache, contiguous or paged, whole or as codes.

Keys are split among programs and the parts joined by a second launch, without atomics. How many
splits follows from shapes. Sources: Dao et al. 2023, "Flash-Decoding"; Kwon et al. 2023,
"PagedAttention"; Xiao et al. 2023, "StreamingLLM"; Liu et al. 2024, "KIVI".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    config: Config | None = None,
    arch: str = "sm_80",
) -> Plan:
    """Shapes as in the twin; the result is contiguous. One launch where one split is enough."""
    batch, heads, queries, head = q.shape
    kv_heads, value_head = k.shape[1], width(v, v_bits)
    group = heads // kv_heads
    rows = min(MOST_ROWS, max(16, triton.next_power_of_2(group * queries)))
    blocks = kv_heads * triton.cdiv(group * queries, rows)
    chosen = config or default_config(head, value_head, element(q, k, v), arch)
    old = Part(k, v, table, k_scale, k_zero, v_scale, v_zero, k_bits, v_bits)
    sides = [old] if tail_k is None or tail_v is None else [old, Part(tail_k, tail_v)]
    splits: list[int] = []
    for side in sides:
        most = visible_tokens(side.k, side.table, queries, window, first)
        tiles = triton.cdiv(most, chosen.constants["BN"])
        splits.append(split_count(batch * blocks, tiles, arch))
    out = torch.empty((batch, heads, queries, value_head), dtype=q.dtype, device=q.device)
    lse = part = None
    if sum(splits) > 1:
        shape = (batch, heads, queries, sum(splits))
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        part = torch.empty((*shape, value_head), dtype=torch.float32, device=q.device)
    args: dict[str, Any] = {
        "Q": q,
        "LENGTHS": lengths,
        "CODED": coded,
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
        "parts": sum(splits),
        **_strides("q", q, ("batch", "head", "query")),
    }
    constants = {
        "HEAD": head,
        "VALUE_HEAD": value_head,
        "Q_ALIGN": alignment(q),
        "O_ALIGN": alignment(out if part is None else part),
        "WINDOWED": window > 0,
        "CAPPED": softcap > 0,
        "BM": rows,
        "BD": triton.next_power_of_2(max(head, 16)),
        "BDV": triton.next_power_of_2(max(value_head, 16)),
    }
    launches: list[Launch] = []
    for place, side in enumerate(sides):
        own = side.args() | {"splits": splits[place], "before": sum(splits[:place])}
        own_constants = side.constants(head, value_head) | {"TAIL": place == 1}
        grid = (splits[place], blocks, batch)
        launch = Launch(decode_partial_kernel, grid, args | own, constants | own_constants)
        launches.append(launch.with_config(chosen))
    if part is not None and lse is not None:
        launches.append(_combine(part, lse, sinks, out, queries))
    return Plan((out,), tuple(launches))


@dataclass(frozen=True)
class Part:
    """Keys and values that lie together: a whole cache, its codes, or the tokens after them."""

    k: Tensor
    v: Tensor
    table: Tensor | None = None
    k_scale: Tensor | None = None
    k_zero: Tensor | None = None
    v_scale: Tensor | None = None
    v_zero: Tensor | None = None
    k_bits: int = 8
    v_bits: int = 8

    def args(self) -> dict[str, Any]:
        return {
            "K": self.k,
            "V": self.v,
            "TABLE": self.table,
            "K_SCALE": self.k_scale,
            "K_ZERO": self.k_zero,
            "V_SCALE": self.v_scale,
            "V_ZERO": self.v_zero,
            "table_row": 0 if self.table is None else self.table.stride(0),
            **_strides("k", self.k, ("block", "head", "token")),
            **_strides("v", self.v, ("block", "head", "token")),
            **_strides("ks", self.k_scale, ("block", "head", "token", "channel")),
            **_strides("vs", self.v_scale, ("block", "head", "token", "channel")),
        }

    def constants(self, head: int, value_head: int) -> dict[str, int]:
        paged = self.table is not None
        return {
            **_side("K", self.k, self.k_scale, self.k_bits, head, paged),
            **_side("V", self.v, self.v_scale, self.v_bits, value_head, paged),
            "PAGE": self.k.shape[2] if paged else 0,
        }


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
) -> str | None:
    if q.dtype not in FLOATS:
        return f"its queries are {q.dtype}"
    if q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} heads are no multiple of {k.shape[1]} key heads"
    if q.shape[2] > 16:
        return f"it has {q.shape[2]} new tokens, and a prompt has a kernel of its own"
    if lengths.dtype != torch.int32 or (table is not None and table.dtype != torch.int32):
        return "its lengths and page table are not int32"
    tail = (tail_k, tail_v, coded)
    if any(t is None for t in tail) != all(t is None for t in tail):
        return "of its tail and of where that begins not all are given"
    if tail_k is not None and tail_v is not None and coded is not None:
        if {tail_k.dtype, tail_v.dtype} - set(FLOATS) or coded.dtype != torch.int32:
            return f"its tail is {tail_k.dtype}, {tail_v.dtype}, {coded.dtype}"
        if tail_k.shape[3] != q.shape[3] or tail_v.shape[3] != width(v, v_bits):
            return "its tail has other channels"
    if not side_by_side(q, k, v, lengths, table, sinks, slopes, *tail):
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
    for each in (tail_k, tail_v):
        nbytes += 0 if each is None else each.numel() * each.element_size()
    tokens += 0 if tail_k is None else tail_k.shape[2]
    return Cost(nbytes, 2 * batch * heads * queries * tokens * (head + value_head))


SPEC = TritonSpec(
    name="decode_attention",
    schema="planish::decode_attention(Tensor q, Tensor k, Tensor v, Tensor lengths, "
    "Tensor? table=None, Tensor? k_scale=None, Tensor? k_zero=None, Tensor? v_scale=None, "
    "Tensor? v_zero=None, Tensor? sinks=None, Tensor? slopes=None, Tensor? tail_k=None, "
    "Tensor? tail_v=None, Tensor? coded=None, *, float scale, int window=0, "
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
