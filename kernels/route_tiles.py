"""Routing of tokens to experts: the choice, and the order in which the experts' blocks read.

A pair is (token, slot), numbered token * k + slot. Pairs are sorted by expert by counting, in
chunks whose sums are taken in order: no atomics, the same result every time.
"""
# pyright: reportMissingParameterType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def route_choose_kernel(
    LOGITS,
    IDS,
    WEIGHTS,
    tokens,
    row_stride,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    AFTER: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
):
    """The k greatest logits of BT tokens, of equal ones the first, and their weights."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    expert = tl.arange(0, BE)
    slot = tl.arange(0, BK)
    real = token < tokens
    inside = real[:, None] & (expert < EXPERTS)[None, :]
    at = LOGITS + token.to(tl.int64)[:, None] * row_stride + expert[None, :]
    x = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 1)
    total = tl.sum(tl.exp(x - top[:, None]), 1)
    free = (expert < EXPERTS)[None, :] & (x == x)
    ids = tl.zeros([BT, BK], tl.int32)
    values = tl.zeros([BT, BK], tl.float32)
    for j in range(K):
        best = tl.max(tl.where(free, x, float("-inf")), 1)
        first = tl.min(tl.where(free & (x == best[:, None]), expert[None, :], EXPERTS - 1), 1)
        free = free & (expert[None, :] != first[:, None])
        ids = tl.where(slot[None, :] == j, first[:, None], ids)
        values = tl.where(slot[None, :] == j, tl.exp(best - top)[:, None], values)
    if AFTER:
        total = tl.sum(values, 1)
    out = token[:, None] * K + slot[None, :]
    there = real[:, None] & (slot < K)[None, :]
    tl.store(IDS + out, ids, mask=there)
    tl.store(WEIGHTS + out, values / total[:, None], mask=there)


@triton.jit
def route_count_kernel(
    IDS,
    COUNTS,
    PLACES,
    pairs,
    chunk_size,
    capacity,
    fill_size,
    EXPERTS: tl.constexpr,
    BP: tl.constexpr,
    BE: tl.constexpr,
):
    """counts[chunk, expert]; and its share of the places is marked as empty (= pairs)."""
    chunk = tl.program_id(0)
    expert = tl.arange(0, BE)
    count = tl.zeros([BE], tl.int32)
    end = min(chunk * chunk_size + chunk_size, pairs)
    for first in range(chunk * chunk_size, end, BP):
        pair = first + tl.arange(0, BP)
        chosen = tl.load(IDS + pair, mask=pair < end, other=-1)
        count += tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(COUNTS + chunk * EXPERTS + expert, count, mask=expert < EXPERTS)
    last = min(chunk * fill_size + fill_size, capacity)
    for first in range(chunk * fill_size, last, BP):
        place = first + tl.arange(0, BP)
        tl.store(PLACES + place, tl.zeros([BP], tl.int32) + pairs, mask=place < last)


@triton.jit
def route_offset_kernel(
    COUNTS,
    STARTS,
    OWNERS,
    chunks,
    blocks,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BP: tl.constexpr,
    BE: tl.constexpr,
):
    """counts become sums over earlier chunks; starts of experts; the expert of every block."""
    expert = tl.arange(0, BE)
    inside = expert < EXPERTS
    running = tl.zeros([BE], tl.int32)
    for chunk in range(chunks):
        at = COUNTS + chunk * EXPERTS + expert
        count = tl.load(at, mask=inside, other=0)
        tl.store(at, running, mask=inside)
        running += count
    size = (running + BLOCK - 1) // BLOCK * BLOCK
    ends = tl.cumsum(size, 0)
    tl.store(STARTS + expert, ends - size, mask=inside)
    used = tl.sum(size, 0)
    for first in range(0, blocks, BP):
        block = first + tl.arange(0, BP)
        place = block * BLOCK
        owner = tl.sum((ends[None, :] <= place[:, None]).to(tl.int32), 1)
        tl.store(OWNERS + block, tl.where(place < used, owner, -1), mask=block < blocks)


@triton.jit
def route_place_kernel(
    IDS,
    COUNTS,
    STARTS,
    PLACES,
    pairs,
    chunk_size,
    EXPERTS: tl.constexpr,
    BP: tl.constexpr,
    BE: tl.constexpr,
):
    """places[start of the expert + pairs of it before this one] = pair, for a chunk of pairs."""
    chunk = tl.program_id(0)
    expert = tl.arange(0, BE)
    inside = expert < EXPERTS
    running = tl.load(COUNTS + chunk * EXPERTS + expert, mask=inside, other=0)
    running += tl.load(STARTS + expert, mask=inside, other=0)
    end = min(chunk * chunk_size + chunk_size, pairs)
    for first in range(chunk * chunk_size, end, BP):
        pair = first + tl.arange(0, BP)
        real = pair < end
        chosen = tl.load(IDS + pair, mask=real, other=-1)
        mine = (chosen[:, None] == expert[None, :]).to(tl.int32)
        earlier = tl.cumsum(mine, 0) - mine + running[None, :]
        tl.store(PLACES + tl.sum(earlier * mine, 1), pair, mask=real)
        running += tl.sum(mine, 0)
