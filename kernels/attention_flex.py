"""Attention with a window, soft cap or sinks on a GPU: FlexAttention instead of stored scores.

What a query sees is a rule on indices (`mask_mod`), what becomes of a score another (`score_mod`);
blocks of keys that no query of a block sees are not read (Dong et al. 2024, Flex Attention). Sinks
take a share of the softmax and no value: the result is scaled by sigmoid(log-sum-exp - sink).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ..ir.ops import _attention as reference
from .spec import Cost, KernelSpec

BLOCK = 128
_Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attention_flex(
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
    """`planish::attention` by FlexAttention; its schema, and its result up to rounding.

    Compiled where a graph is compiled that calls it, or here on a GPU; on the CPU it stores the
    scores. `why_not` says what it cannot take (uniform_if_blind needs queries <= keys here).
    """
    rule = _visible(q, k, mask, causal, window)
    boolean = mask is not None and mask.dtype == torch.bool
    blocks = None if rule is None else _block_mask(q, k, rule, causal, window, boolean)
    options: dict[str, Any] = {
        "score_mod": _scored(None if boolean else mask, softcap),
        "block_mask": blocks,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    run = _flex(q)
    if sinks is None:
        return run(q, k, v, **options)
    out, aux = run(q, k, v, **options, return_aux=AuxRequest(lse=True))
    share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None])
    return (out * share[..., None]).to(out.dtype)


_compiled: list[Callable[..., Any]] = []


def _flex(q: Tensor) -> Callable[..., Any]:
    if q.device.type == "cpu" or isinstance(q, FakeTensor) or torch.compiler.is_compiling():
        return flex_attention
    if not _compiled:
        _compiled.append(torch.compile(flex_attention, dynamic=True))
    return _compiled[0]


def _scored(bias: Tensor | None, softcap: float) -> Callable[..., Tensor] | None:
    if bias is None and not softcap:
        return None

    def scored(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + _at(bias, batch, head, query, key).to(score.dtype)
        return score

    return scored


def _at(mask: Tensor, *place: Tensor) -> Tensor:
    """The mask's element; axes of size one are for all."""
    last = place[-mask.dim() :]
    return mask[
        tuple(
            torch.zeros_like(index) if size == 1 else index
            for index, size in zip(last, mask.shape, strict=True)
        )
    ]


def _visible(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, window: int) -> _Rule | None:
    seen = mask if mask is not None and mask.dtype == torch.bool else None
    if not causal and not window and seen is None:
        return None
    offset = k.shape[2] - q.shape[2]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rules: list[Tensor] = []
        if causal:
            rules.append(key <= query + offset)
        if window:
            rules.append(key > query + offset - window)
        if seen is not None:
            rules.append(_at(seen, batch, head, query, key))
        found = rules[0]
        for rule in rules[1:]:
            found = found & rule
        return found

    return visible


_Blocks = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
_kept: dict[tuple[Any, ...], _Blocks] = {}
_MOST_KEPT = 64


def _block_mask(
    q: Tensor, k: Tensor, rule: _Rule, causal: bool, window: int, boolean: bool
) -> BlockMask:
    """Which blocks of keys each block of queries reads; kept by the lengths."""
    queries, keys = q.shape[2], k.shape[2]
    key = (queries, keys, causal, window, boolean, q.device)
    found = None
    if isinstance(queries, int) and isinstance(keys, int) and not isinstance(q, FakeTensor):
        found = _kept.get(key)
    if found is None:
        found = _blocks(queries, keys, causal, window, boolean, q.device)
        lasting = isinstance(queries, int) and isinstance(keys, int)
        if lasting and type(found[0]) is Tensor and not torch.compiler.is_compiling():
            if len(_kept) == _MOST_KEPT:
                _kept.pop(next(iter(_kept)))
            _kept[key] = found
    return BlockMask.from_kv_blocks(
        *found,
        BLOCK_SIZE=BLOCK,
        mask_mod=rule,
        seq_lengths=(queries, keys),
        compute_q_blocks=False,
    )


def _blocks(
    queries: int, keys: int, causal: bool, window: int, boolean: bool, device: torch.device
) -> _Blocks:
    """Counts and indices of the blocks that a block of queries sees in part, and in full."""
    rows = torch.arange((queries + BLOCK - 1) // BLOCK, device=device)[:, None] * BLOCK
    columns = torch.arange((keys + BLOCK - 1) // BLOCK, device=device)[None, :] * BLOCK
    low = rows + (keys - queries)  # where the block's first and last queries stand
    high = low + BLOCK - 1
    whole = (columns + BLOCK <= keys) & (rows >= 0)
    some = (columns >= 0) & (rows >= 0)
    if causal:
        some, whole = some & (columns <= high), whole & (columns + BLOCK - 1 <= low)
    if window:
        some, whole = some & (columns + BLOCK - 1 > low - window), whole & (columns > high - window)
    if boolean:
        return (*_ordered(some), None, None)
    return (*_ordered(some & ~whole), *_ordered(some & whole))


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, columns] booleans as counts [1, 1, rows] and the true columns first."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[None, None], order.int()[None, None].contiguous()


def why_not(
    device: str, mask: object, window: int, softcap: float, sinks: object, uniform: bool
) -> str | None:
    """Why an attention is left to scaled_dot_product_attention; None if FlexAttention runs it."""
    if device == "cpu":
        return "it runs on the CPU"
    if not window and not softcap and sinks is None:
        return "it has no window, soft cap or sinks"
    if uniform and mask is not None:
        return "a query that its mask blinds takes the mean of all values"
    return None


def cost(batch: int, heads: int, kv_heads: int, queries: int, keys: int, head: int) -> Cost:
    """Queries, keys, values and results once; two products. keys: those within the window."""
    nbytes = 2 * batch * head * (2 * heads * queries + 2 * kv_heads * keys)
    return Cost(nbytes, 4 * batch * heads * queries * keys * head)


SPEC = KernelSpec(
    name="attention_flex",
    device="cuda",
    serves="attention with a window, soft cap or sinks on a GPU, without stored scores",
    why_not=why_not,
    cost=cost,
    twin=reference,
)
