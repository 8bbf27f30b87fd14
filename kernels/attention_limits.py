"""What flash attention refuses, and what a call of it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from .spec import Cost

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_STORED = (torch.int8, torch.float8_e4m3fn)
_WIDEST = 256
_WIDEST_GFX11 = 128
_NEAR = 2**31 // 256
"""A row's stride must let the largest tile be addressed by 32-bit offsets."""


def why_not(
    arch: str,
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
) -> str | None:
    """Why an architecture's kernel cannot take a call, or None; of several reasons the first."""
    shapes = next(_shapes(q, k, v), None)
    if shapes:
        return shapes
    packed = query_starts is not None or key_starts is not None
    reasons = (
        _types(arch, q, k, v),
        _heads(arch, q, v),
        _numbers(scale, window, softcap),
        _mask(mask, (*q.shape[:3], k.shape[2]), packed),
        _vectors(q, sinks, slopes),
        _scales(k, k_scale, v_scale),
        _packed(q, query_starts, key_starts) if packed else None,
        _blocks(q, k, query_starts, blocks, longest, block_queries, block_keys, uniform_if_blind),
    )
    return next((reason for reason in reasons if reason), None)


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> Iterator[str]:
    if not q.dim() == k.dim() == v.dim() == 4:
        yield f"its tensors have {q.dim()}, {k.dim()} and {v.dim()} axes instead of 4"
        return
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        found = f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        yield f"its queries, keys and values do not belong together: {found}"
        return
    if q.shape[-1] != k.shape[-1]:
        yield f"its queries have {q.shape[-1]} channels and its keys {k.shape[-1]}"
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        yield f"its {q.shape[1]} heads are no multiple of the {k.shape[1]} of its keys"
    for name, tensor in (("queries", q), ("keys", k), ("values", v)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            yield f"the channels of its {name} do not lie side by side"
        if max(tensor.stride(1), tensor.stride(2)) > _NEAR:
            yield f"the rows of its {name} lie too far apart"


def _types(arch: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.dtype not in _FLOATS:
        return f"its queries are {q.dtype}"
    for name, tensor in (("keys", k), ("values", v)):
        if tensor.dtype != q.dtype and tensor.dtype not in _STORED:
            return f"its {name} are {tensor.dtype} while its queries are {q.dtype}"
        small = tensor.dtype == torch.float8_e4m3fn
        if small and arch in ("sm_80", "sm_86"):
            return f"its {name} are float8_e4m3fn, which {arch} does not have"
    return None


def _heads(arch: str, q: Tensor, v: Tensor) -> str | None:
    widest = _WIDEST_GFX11 if arch.startswith("gfx11") else _WIDEST
    for name, size in (("head", q.shape[-1]), ("value head", v.shape[-1])):
        if not 1 <= size <= widest:
            return f"its {name} has {size} channels, more than the {widest} that fit {arch}"
    return None


def _numbers(scale: float, window: int, softcap: float) -> str | None:
    if not scale > 0:
        return f"its scale is {scale}"
    if window < 0:
        return f"its window is {window}"
    if softcap < 0:
        return f"its soft cap is {softcap}"
    return None


def _fits(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Whether the tensor broadcasts to the shape."""
    if tensor.dim() > len(shape):
        return False
    tail = shape[len(shape) - tensor.dim() :]
    return all(size in (1, wanted) for size, wanted in zip(tensor.shape, tail, strict=True))


def _mask(mask: Tensor | None, shape: Sequence[int], packed: bool) -> str | None:
    if mask is None:
        return None
    if packed:
        return "it has a mask over packed sequences"
    if not _fits(mask, shape):
        return f"its mask {list(mask.shape)} does not broadcast to {list(shape)}"
    if mask.dtype != torch.bool and mask.dtype not in _FLOATS:
        return f"its mask is {mask.dtype}"
    return None


def _vectors(q: Tensor, sinks: Tensor | None, slopes: Tensor | None) -> str | None:
    for name, tensor in (("sinks", sinks), ("slopes", slopes)):
        if tensor is None:
            continue
        if tensor.shape != (q.shape[1],):
            return f"its {name} have the shape {list(tensor.shape)} instead of [{q.shape[1]}]"
        if tensor.dtype not in _FLOATS or (tensor.shape[0] > 1 and tensor.stride(0) != 1):
            return f"its {name} are no contiguous vector of floats"
    return None


def _scales(k: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> str | None:
    for name, tensor in (("key", k_scale), ("value", v_scale)):
        if tensor is None:
            continue
        if not _fits(tensor, k.shape[:3]):
            return f"its {name} scales {list(tensor.shape)} do not fit {list(k.shape[:3])}"
        if tensor.dtype not in _FLOATS:
            return f"its {name} scales are {tensor.dtype}"
    return None


def _packed(q: Tensor, query_starts: Tensor | None, key_starts: Tensor | None) -> str | None:
    if query_starts is None or key_starts is None:
        return "it packs only queries or only keys"
    if query_starts.dtype != torch.int32 or key_starts.dtype != torch.int32:
        return f"its starts are {query_starts.dtype} and {key_starts.dtype}, not int32"
    if query_starts.dim() != 1 or query_starts.shape != key_starts.shape or len(query_starts) < 2:
        found = f"{list(query_starts.shape)} and {list(key_starts.shape)}"
        return f"its starts do not belong together: {found}"
    if not query_starts.is_contiguous() or not key_starts.is_contiguous():
        return "its starts are not contiguous"
    if q.shape[0] != 1:
        return f"it packs sequences in a batch of {q.shape[0]}"
    return None


def _blocks(
    q: Tensor,
    k: Tensor,
    query_starts: Tensor | None,
    blocks: Tensor | None,
    longest: int,
    block_queries: int,
    block_keys: int,
    uniform: bool,
) -> str | None:
    if blocks is None:
        return None
    if blocks.dim() != 4 or blocks.dtype not in (torch.bool, torch.int32):
        return f"its block map is {blocks.dtype} {list(blocks.shape)}"
    for size in (block_queries, block_keys):
        if size < 16 or size & (size - 1):
            return f"its blocks are {block_queries} x {block_keys}, not powers of two from 16"
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    if query_starts is not None:
        batch, queries, keys = len(query_starts) - 1, longest or queries, 0
    least = (triton.cdiv(queries, block_queries), triton.cdiv(keys, block_keys))
    if blocks.shape[2] < least[0] or blocks.shape[3] < least[1]:
        return f"its block map {list(blocks.shape)} is smaller than {list(least)}"
    if not _fits(blocks[:, :, :1, :1], (batch, q.shape[1], 1, 1)):
        return f"its block map {list(blocks.shape)} is for other heads"
    if uniform:
        return "its blind queries take the mean of values that its block map leaves out"
    return None


def cost(
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
    causal: bool = False,
    window: int = 0,
    **rest: object,
) -> Cost:
    """Every operand and result once; both products over the keys that are seen.

    Seen by the diagonal and the window alone: what a mask or a block map hides is in numbers, and
    lengths of packed sequences too, so that these are taken to be even.
    """
    batch, heads, queries, head = q.shape
    keys, value = k.shape[2], v.shape[-1]
    sequences = batch if query_starts is None else len(query_starts) - 1
    share = sequences // batch
    pairs = visible_pairs(queries // share, keys // share, causal, window) * sequences
    operands = (q, k, v, mask, sinks, slopes, k_scale, v_scale, query_starts, key_starts, blocks)
    nbytes = sum(x.numel() * x.element_size() for x in operands if x is not None)
    nbytes += batch * heads * queries * (value * q.element_size() + 4)
    return Cost(nbytes, 2 * pairs * heads * (head + value))


def visible_pairs(queries: int, keys: int, causal: bool, window: int) -> int:
    """How many of queries x keys are seen; the last query stands at the last key."""
    shift = keys - queries
    high = _up_to(queries, shift + 1, keys) if causal else queries * keys
    return high - _up_to(queries, shift - window + 1, keys) if window else high


def _up_to(queries: int, first: int, most: int) -> int:
    """The sum over i < queries of first + i, each cut to 0..most."""
    skipped = min(max(-first, 0), queries)
    start = first + skipped
    rising = min(max(most - start, 0), queries - skipped)
    full = queries - skipped - rising
    return rising * start + rising * (rising - 1) // 2 + full * most
