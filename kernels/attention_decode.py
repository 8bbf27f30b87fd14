"""Causal attention of a text's last tokens over a cache that is not copied, on the CPU.

Keys lie in tiles of 16 and values in rows, both with room to grow; grouped queries are not
expanded. See attention_blocks.h.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..ir.ops import _attention as reference
from . import plan_cpu
from .plan_cpu import KEY_BLOCK, CallRecord, Kind, StepRecord, record
from .spec import Cost, KernelSpec

LANES = 16


def key_tiles(keys: Tensor, capacity: int) -> Tensor:
    """[kv_heads, length, head] to [kv_heads, capacity / 16, head, 16], zeros past the length."""
    padded = torch.nn.functional.pad(keys, (0, 0, 0, capacity - keys.shape[1]))
    tiles = padded.view(keys.shape[0], -1, LANES, keys.shape[2])
    return tiles.transpose(2, 3).contiguous()


def keys_of(tiles: Tensor, length: int) -> Tensor:
    """The inverse of `key_tiles`: [kv_heads, length, head]."""
    heads, _, width, _ = tiles.shape
    return tiles.transpose(2, 3).reshape(heads, -1, width)[:, :length]


def value_rows(values: Tensor, capacity: int) -> Tensor:
    """[kv_heads, length, value_head] to [kv_heads, capacity, width], filled up with zeros."""
    missing = -values.shape[2] % LANES
    room = (0, missing, 0, capacity - values.shape[1])
    return torch.nn.functional.pad(values, room).contiguous()


def attention_decode_twin(
    q: Tensor,
    tiles: Tensor,
    rows: Tensor,
    length: int,
    value_head: int,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    mask: Tensor | None = None,
) -> Tensor:
    """The kernel in plain torch: q [queries, heads, head] to [queries, heads, value_head].

    The queries are the last ones of a text of `length` tokens. mask [queries, queries] is added
    to the scores of the queries among themselves, in place of their causal order.
    """
    keys, values = keys_of(tiles, length), rows[:, :length, :value_head]
    queries = q.transpose(0, 1)[None]
    own: Tensor | None = None
    if mask is not None:
        own = torch.nn.functional.pad(mask, (length - q.shape[0], 0)).to(q.dtype)
    found = reference(
        queries,
        keys[None],
        values[None],
        own,
        sinks,
        scale=scale,
        causal=True,
        window=window,
        softcap=softcap,
    )
    return found[0].transpose(0, 1)


def attention_decode(
    q: Tensor,
    tiles: Tensor,
    rows: Tensor,
    length: int,
    value_head: int,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    mask: Tensor | None = None,
) -> Tensor:
    """`attention_decode_twin` in C, float32; a plan has it as one of its steps."""
    queries, heads, head = q.shape
    q = q.contiguous()
    out = torch.empty(queries, heads, value_head)
    strides = [heads * head, head, heads * value_head, value_head]
    sizes = [heads, tiles.shape[0], head, value_head, 0, window]
    given = [q.data_ptr(), None if sinks is None else sinks.data_ptr()]
    step = record(Kind.ATTENTION, given, out.data_ptr(), [*strides, *sizes], [scale, softcap])
    caches = (ctypes.c_void_p * 2)(tiles.data_ptr(), rows.data_ptr())
    seen = None if mask is None else mask.contiguous()
    call = CallRecord(0, queries, length - queries, rows.shape[1], queries)
    call.caches = ctypes.addressof(caches)
    call.mask = None if seen is None else seen.data_ptr()
    plan_cpu.run_steps((StepRecord * 1)(step), 1, call, torch.get_num_threads())
    return out


def why_not(q: torch.dtype, mask: object, causal: bool, head: int, value_head: int) -> str | None:
    """Why an attention cannot run on such a cache; None if it can."""
    if q != torch.float32:
        return f"it computes in {q}, and the kernel in float32"
    if mask is not None:
        return "it has an explicit mask"
    if not causal:
        return "it is not causal"
    return plan_cpu.why_not()


def cost(heads: int, kv_heads: int, queries: int, keys: int, head: int) -> Cost:
    """Keys and values once for each block of queries; two products."""
    nbytes = 4 * head * (2 * kv_heads * keys + 2 * heads * queries)
    return Cost(nbytes, 4 * heads * queries * keys * head)


SPEC = KernelSpec(
    name="attention_decode",
    device="cpu",
    serves="causal attention of new tokens over a cache: grouped queries, window, cap, sinks",
    why_not=why_not,
    cost=cost,
    twin=attention_decode_twin,
)

__all__ = [
    "KEY_BLOCK",
    "SPEC",
    "attention_decode",
    "attention_decode_twin",
    "key_tiles",
    "keys_of",
    "value_rows",
]
