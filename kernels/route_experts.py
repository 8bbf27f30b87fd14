"""Which experts a token goes to, and the order in which a grouped product reads the tokens.

Top-k routing: Shazeer et al. 2017, eq. 3-5 (softmax of the chosen logits); Fedus et al. 2021, eq. 1
(softmax of all of them). Every expert's tokens fill whole blocks, so that a block of a product has
one expert; how much room that takes follows from shapes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .launch import Config, Launch, Plan
from .operator import define
from .route_tiles import (
    route_choose_kernel,
    route_count_kernel,
    route_offset_kernel,
    route_place_kernel,
)
from .spec import Cost
from .triton_spec import Arguments, Case, Form, TritonSpec

CONFIGS = (Config({"BP": 32}, num_warps=8, num_stages=2),)
_MOST_CHUNKS = 128
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def capacity(pairs: int, experts: int, block: int) -> int:
    """Places that any routing fits in: a multiple of the block."""
    return (pairs + min(pairs, experts) * (block - 1)) // block * block


def route_experts(
    logits: Tensor, k: int, after: bool = False, block: int = 64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids int32, weights [tokens, k]; places int32 [room], owners int32 [room / block].

    logits: [tokens, experts]. The k greatest, in falling order, of equal ones the first. weights:
    the softmax over all experts or, `after` the choice, over the chosen ones (which is also that
    over all, divided by its sum). places: pairs (token * k + slot) sorted by expert, those of an
    expert in order and followed by empty places (= tokens * k) up to a whole block. owners: the
    expert of each block, -1 where there is nothing. weights are float32 (float64 for float64).
    """
    tokens, experts = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    values, ids = torch.sort(logits.to(wide), dim=-1, descending=True, stable=True)
    ids = ids[:, :k]
    weights = torch.softmax(values[:, :k] if after else values, -1)[:, :k]
    pairs = tokens * k
    flat = ids.reshape(-1)
    room = capacity(pairs, experts, block)
    counts = (flat[:, None] == torch.arange(experts, device=flat.device)).sum(0)
    sizes = (counts + block - 1) // block * block
    ends = sizes.cumsum(0)
    order = torch.sort(flat, stable=True)
    first = (ends - sizes) - (counts.cumsum(0) - counts)
    at = first[order.values] + torch.arange(pairs, device=flat.device)
    places = torch.full((room,), pairs, dtype=torch.int64, device=flat.device)
    places = places.scatter(0, at, order.indices)
    starts = torch.arange(room // block, device=flat.device) * block
    owners = (ends <= starts[:, None]).sum(1)
    owners = torch.where(starts < sizes.sum(), owners, -1)
    small = (t.to(torch.int32) for t in (ids, places, owners))
    ids, places, owners = small
    return ids.contiguous(), weights.contiguous(), places, owners


def plan(
    logits: Tensor,
    k: int,
    after: bool = False,
    block: int = 64,
    *,
    config: Config | None = None,
    arch: str = "sm_80",
) -> Plan:
    """Four launches: the choice, counts by chunk, their sums, the places."""
    tokens, experts = logits.shape
    pairs, wide = tokens * k, triton.next_power_of_2(max(experts, 16))
    room = capacity(pairs, experts, block)
    chosen = config or CONFIGS[0]
    step = chosen.constants["BP"]

    def empty(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=logits.device)

    ids, weights = empty(tokens, k), empty(tokens, k, dtype=torch.float32)
    places, owners = empty(room), empty(room // block)
    chunk_size = triton.cdiv(triton.cdiv(pairs, _MOST_CHUNKS), step) * step
    chunks = triton.cdiv(pairs, max(chunk_size, 1))
    counts, starts = empty(chunks, experts), empty(experts)
    sizes = {"EXPERTS": experts, "BE": wide}
    per = max(1, 2048 // wide)
    choose: dict[str, Any] = {
        "LOGITS": logits,
        "IDS": ids,
        "WEIGHTS": weights,
        "tokens": tokens,
        "row_stride": logits.stride(0),
    }
    count: dict[str, Any] = {
        "IDS": ids,
        "COUNTS": counts,
        "PLACES": places,
        "pairs": pairs,
        "chunk_size": chunk_size,
        "capacity": room,
        "fill_size": triton.cdiv(room, max(chunks, 1)),
    }
    offset: dict[str, Any] = {
        "COUNTS": counts,
        "STARTS": starts,
        "OWNERS": owners,
        "chunks": chunks,
        "blocks": room // block,
    }
    place: dict[str, Any] = {name: count[name] for name in ("IDS", "PLACES", "pairs", "chunk_size")}
    place |= {"COUNTS": counts, "STARTS": starts}
    choice = {"K": k, "AFTER": after, "BT": per, "BK": triton.next_power_of_2(k)}
    programs = (triton.cdiv(tokens, per),)
    once = (min(1, chunks),)
    sorting = (
        Launch(route_count_kernel, (chunks,), count, sizes),
        Launch(route_offset_kernel, once, offset, {**sizes, "BLOCK": block}),
        Launch(route_place_kernel, (chunks,), place, sizes),
    )
    launches = (
        Launch(route_choose_kernel, programs, choose, {**sizes, **choice}),
        *(launch.with_config(chosen) for launch in sorting),
    )
    return Plan((ids, weights, places, owners), launches)


def why_not(arch: str, logits: Tensor, k: int, after: bool = False, block: int = 64) -> str | None:
    if logits.dtype not in _FLOATS:
        return f"its logits are {logits.dtype}"
    if logits.stride(-1) != 1:
        return "its logits do not lie side by side"
    experts = logits.shape[1]
    if experts > 512:
        return f"it has {experts} experts, more than 512"
    if not 0 < k <= min(experts, 16):
        return f"{k} of {experts} experts are chosen, not 1 to {min(experts, 16)}"
    if block not in (16, 32, 64, 128):
        return f"its blocks have {block} rows"
    return None


def cost(logits: Tensor, k: int, after: bool = False, block: int = 64) -> Cost:
    """Logits in; ids, weights, places and owners out. Comparisons are not counted."""
    tokens, experts = logits.shape
    room = capacity(tokens * k, experts, block)
    out = 4 * (2 * tokens * k + room + room // block)
    return Cost(logits.numel() * logits.element_size() + out, 5 * logits.numel())


def _problem(
    tokens: int,
    experts: int,
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    after: bool = False,
    block: int = 16,
    kind: str = "",
):
    def make(generator: torch.Generator) -> Arguments:
        logits = torch.randn(tokens, experts + 3, generator=generator)[:, :experts].mul(3)
        if kind == "one":
            logits = logits + torch.arange(experts) * 100.0
        elif kind == "equal":
            logits = logits.round().clamp(-1, 1)
        elif kind == "barred":
            logits = logits.masked_fill(torch.arange(experts) % 3 == 1, -torch.inf)
        return {"logits": logits.to(dtype), "k": k, "after": after, "block": block}

    return make


def _large(tokens: int, experts: int, k: int, block: int):
    def make() -> Arguments:
        logits = torch.empty(tokens, experts, dtype=torch.bfloat16, device="meta")
        return {"logits": logits, "k": k, "after": True, "block": block}

    return make


SPEC = TritonSpec(
    name="route_experts",
    schema="planish::route_experts(Tensor logits, int k, bool after=False, int block=64) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    serves="routing of tokens to experts",
    twin=route_experts,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=(
        Case("f32 before", _problem(21, 7, 2)),
        Case("f32 after", _problem(37, 20, 3, after=True)),
        Case("bf16", _problem(18, 12, 4, dtype=torch.bfloat16, after=True)),
        Case("f16, equal logits", _problem(26, 9, 4, dtype=torch.float16, kind="equal")),
        Case("all to the same", _problem(40, 5, 1, kind="one")),
        Case("barred experts", _problem(15, 6, 4, kind="barred")),
        Case("one token of many experts", _problem(1, 70, 5, block=64)),
        Case("no tokens", _problem(0, 5, 2)),
        Case("several chunks", _problem(2100, 6, 2, block=32), archs=("sm_80",)),
    ),
    forms=(
        Form("bf16 4096 x 64, 8", _large(4096, 64, 8, 128), wide=False),
        Form("bf16 32 x 256, 8", _large(32, 256, 8, 16), wide=False),
    ),
)

define(SPEC)
