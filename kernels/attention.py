"""Flash attention on a GPU: the operation, its launches and its tiles (Dao 2023, FlashAttention-2).

What it computes: attention_twin.py; how: attention_forward.py, attention_tiles.py; with which
tiles: attention_shapes.py; what it refuses: attention_limits.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from .attention_cases import CASES, FORMS
from .attention_forward import attention_kernel
from .attention_limits import cost, why_not
from .attention_shapes import CONFIGS, fitted, packed_heads, pieces, shipped
from .attention_tiles import attention_list_kernel
from .attention_twin import flash_attention, result_like
from .launch import Config, Launch, Plan
from .operator import define
from .triton_spec import TritonSpec


def plan(
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
    config: Config | None = None,
    arch: str = "sm_80",
) -> Plan:
    """The launch of `flash_attention`, and before it that which lists the tiles of a block map."""
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    longest = longest if query_starts is not None and longest else queries
    pack = packed_heads(heads // kv_heads, longest, blocks)
    sequences = batch if query_starts is None else query_starts.shape[0] - 1
    chosen = config or shipped(longest * pack, heads // pack * sequences, q.shape[-1], arch)
    limit = (block_queries, block_keys) if blocks is not None else None
    chosen = fitted(chosen, q, k, v, tf32, arch, limit, slopes is not None)
    tiles = triton.cdiv(longest * pack, chosen.constants["BM"])
    out, lse = result_like(q, v), q.new_empty(batch, heads, queries, dtype=torch.float32)
    # A query that sees its own key is not blind, so that most calls need no exception.
    certain = mask is None and queries <= keys and query_starts is None
    geometry = {"CAUSAL": causal, "WINDOWED": window > 0}
    lengths: dict[str, Any] = {"queries": queries, "keys": keys, "window": window}
    starts = {"QUERY_STARTS": query_starts, "KEY_STARTS": key_starts}
    lists, listed = _listing(
        blocks, (tiles, heads, sequences), {**lengths, **starts}, geometry, chosen,
        block_queries, block_keys,
    )  # fmt: skip
    launch = Launch(
        attention_kernel,
        (tiles, heads // pack, sequences),
        {"Q": q, "K": k, "V": v, "OUT": out, "LSE": lse, "SINKS": sinks, "SLOPES": slopes}
        | {**lengths, **starts, "scale": float(scale), "cap": float(softcap), "lse_row": queries}
        | {**_strides(q, k, v, out), **_scales(k, k_scale, v_scale), **lists}
        | _masks(mask, (batch, heads, queries, keys)),
        {
            **{**pieces(q, v, chosen.constants["BM"], arch), **geometry},
            "GROUP": heads // kv_heads,
            "PACK": pack,
            "CAPPED": softcap > 0,
            "UNIFORM": uniform_if_blind and sinks is None and not certain,
            "BOOLEAN": mask is not None and mask.dtype == torch.bool,
            "MASK_ROWS": mask is not None and mask.dim() > 1 and mask.shape[-2] != 1,
            "MASK_DENSE": mask is not None and mask.shape[-1] > 1 and mask.stride(-1) == 1,
            "KEY_SCALES": k_scale is not None and k_scale.shape[-1:].numel() > 1,
            "VALUE_SCALES": v_scale is not None and v_scale.shape[-1:].numel() > 1,
            "ALIGN": _aligned(q, k, v, out),
            "MASK_ALIGN": 1 if mask is None else _aligned(mask),
            "PRECISION": "tf32" if tf32 else "ieee",
        },
    ).with_config(chosen)
    return Plan((out, lse), (*listed, launch))


def _strides(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        for place, axis in enumerate(("batch", "head", "row")):
            found[f"{name}_{axis}"] = tensor.stride(place)
    return found


def _aligned(*tensors: Tensor) -> int:
    """Bytes, up to 16, that divide the address of every row.

    Stated to the compiler, which would know of multiples of 16 elements only.
    """
    found = 16
    for tensor in tensors:
        size = tensor.element_size()
        found = math.gcd(found, *(size * stride for stride in tensor.stride()[:-1]))
        found = found if tensor.is_meta else math.gcd(found, tensor.data_ptr())
    return found


def _broadcast_strides(tensor: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Zero along axes that the tensor does not have or has once."""
    if tensor is None:
        return (0,) * len(shape)
    tensor = tensor[(None,) * (len(shape) - tensor.dim())]
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return tuple(0 if size == 1 else stride for stride, size in pairs)


def _masks(mask: Tensor | None, shape: tuple[int, ...]) -> dict[str, Any]:
    names = ("mask_batch", "mask_head", "mask_row", "mask_col")
    strides = dict(zip(names, _broadcast_strides(mask, shape), strict=True))
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    return {"MASK": mask, **strides}


def _scales(k: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> dict[str, Any]:
    found: dict[str, Any] = {"K_SCALE": k_scale, "V_SCALE": v_scale}
    for name, tensor in (("k_scale", k_scale), ("v_scale", v_scale)):
        names = (f"{name}_{axis}" for axis in ("batch", "head", "row"))
        found |= zip(names, _broadcast_strides(tensor, tuple(k.shape[:3])), strict=True)
    return found


def _listing(
    blocks: Tensor | None,
    grid: tuple[int, int, int],
    args: Mapping[str, Any],
    geometry: Mapping[str, bool],
    config: Config,
    block_queries: int,
    block_keys: int,
) -> tuple[dict[str, Any], tuple[Launch, ...]]:
    """The lists that a block map becomes, as arguments, and the launch that makes them.

    grid: (query tiles, heads, sequences); what the map has once is listed once, except that
    packed sequences differ in their lengths.
    """
    absent = {"LISTS": None, "COUNTS": None, "list_batch": 0, "list_head": 0, "capacity": 0}
    if blocks is None:
        return absent, ()
    strides = _broadcast_strides(blocks, (0, 0, 0, 0))
    tiles, heads, sequences = grid
    own_batch = strides[0] != 0 or args["QUERY_STARTS"] is not None
    batch, heads = sequences if own_batch else 1, heads if strides[1] else 1
    tile, width = config.constants["BM"], config.constants["BN"]
    capacity = max(1, triton.cdiv(args["keys"], width))
    lists = blocks.new_empty(batch, heads, tiles, capacity, dtype=torch.int32)
    counts = blocks.new_empty(batch, heads, tiles, 2, dtype=torch.int32)
    names = ("block_batch", "block_head", "block_row", "block_col")
    flags = blocks.view(torch.uint8) if blocks.dtype == torch.bool else blocks
    launch = Launch(
        attention_list_kernel,
        (tiles, heads, batch),
        {"BLOCKS": flags, "LISTS": lists, "COUNTS": counts}
        | {"capacity": capacity, "columns": blocks.shape[-1]}
        | {**args, **dict(zip(names, strides, strict=True))},
        {**geometry, "BM": tile, "BN": width, "BLOCK_M": block_queries, "BLOCK_N": block_keys}
        | {"CHUNK": min(1024, max(32, triton.next_power_of_2(blocks.shape[-1])))},
        num_warps=1,
    )
    found = {"LISTS": lists, "COUNTS": counts, "capacity": capacity}
    found["list_batch"] = heads * tiles if own_batch else 0
    found["list_head"] = tiles if strides[1] else 0
    return found, (launch,)


SPEC = TritonSpec(
    name="attention",
    schema="planish::flash_attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, "
    "Tensor? sinks=None, Tensor? slopes=None, Tensor? k_scale=None, Tensor? v_scale=None, "
    "Tensor? query_starts=None, Tensor? key_starts=None, Tensor? blocks=None, *, float scale, "
    "bool causal=False, int window=0, float softcap=0.0, bool uniform_if_blind=False, "
    "int longest=0, int block_queries=0, int block_keys=0, bool tf32=False) -> (Tensor, Tensor)",
    serves="attention of whole sequences, without stored scores",
    twin=flash_attention,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=CASES,
    forms=FORMS,
)

define(SPEC)
