"""Tiles of flash attention: what its kernels share, as functions under @triton.jit.

A tile is [queries, channels] or [keys, channels] of one head. A head whose size is no power of two
is cut into two pieces (80 = 64 + 16), each a tile of its own, so that no multiplication is doubled.
"""
# pyright: reportMissingParameterType=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportConstantRedefinition=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
HIDDEN: tl.constexpr = tl.constexpr(-1e38)
"""Absorbs every score it is added to; the number `ir.ops.LOWEST` of a uniform blind query."""


@triton.jit
def attention_piece(
    BASE, rows, stride, inside, EDGE: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
    HEAD: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """Channels FIRST to FIRST + SIZE of some rows; zeros past HEAD, and outside where EDGE.

    ALIGN: bytes that divide the address of every row.
    """
    channels = FIRST + tl.arange(0, SIZE)
    at = tl.multiple_of(BASE + rows[:, None] * stride, (ALIGN, ALIGN)) + channels[None, :]
    if FIRST + SIZE > HEAD:
        if EDGE:
            return tl.load(at, mask=inside[:, None] & (channels < HEAD)[None, :], other=0.0)
        return tl.load(at, mask=(channels < HEAD)[None, :], other=0.0)
    if EDGE:
        return tl.load(at, mask=inside[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def attention_either(one, other):
    return one | other


@triton.jit
def attention_decoded(tile, TYPE: tl.constexpr):
    """A stored tile as floats of TYPE; bytes by a mantissa: conversions run at a quarter rate."""
    if tile.dtype == TYPE:
        return tile
    if tile.dtype != tl.int8:
        values = tile.to(TYPE)
    elif tl.float16 == TYPE:
        code = tile.to(tl.uint8, bitcast=True).to(tl.int16)
        values = ((code ^ 0x80) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    else:
        code = tile.to(tl.uint8, bitcast=True).to(tl.int32)
        wide = ((code ^ 0x80) | 0x4B000000).to(tl.float32, bitcast=True)
        values = (wide - 8388736.0).to(TYPE)
    # A reduction of one element, so that this is done once for all warps: Triton would move plain
    # arithmetic behind the shared memory, where every warp does it again for itself.
    BITS: tl.constexpr = tl.int32 if tl.float32 == TYPE else tl.int16
    bits = values.to(BITS, bitcast=True).reshape(tile.shape[0], tile.shape[1], 1)
    return tl.reduce(bits, 2, attention_either).to(TYPE, bitcast=True)


@triton.jit
def attention_keep(
    BASE, tile, rows, stride, inside, FIRST: tl.constexpr, SIZE: tl.constexpr, HEAD: tl.constexpr,
    ALIGN: tl.constexpr
):  # fmt: skip
    """Store what `attention_piece` would load."""
    channels = FIRST + tl.arange(0, SIZE)
    at = tl.multiple_of(BASE + rows[:, None] * stride, (ALIGN, ALIGN)) + channels[None, :]
    mask = inside[:, None] & (channels < HEAD)[None, :]
    tl.store(at, tile.to(BASE.dtype.element_ty), mask=mask)


@triton.jit
def attention_span(first, last, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
                   BN: tl.constexpr):  # fmt: skip
    """Where the keys lie that queries at places first..last see: low, inner_low, inner_high, high.

    Tiles of BN keys from low to high are seen in part; those from inner_low to inner_high are seen
    by every query in full. All but high are multiples of BN.
    """
    high = keys
    inner_high = keys
    if CAUSAL:
        high = tl.minimum(keys, tl.maximum(last + 1, 0))
        inner_high = tl.minimum(keys, tl.maximum(first + 1, 0))
    inner_high = inner_high // BN * BN
    low = keys * 0
    inner_low = low
    if WINDOWED:
        low = tl.minimum(tl.maximum(first - window + 1, 0) // BN * BN, high)
        inner_low = (tl.maximum(last - window + 1, 0) + BN - 1) // BN * BN
        inner_low = tl.minimum(tl.maximum(inner_low, low), (high + BN - 1) // BN * BN)
    inner_high = tl.maximum(inner_high, inner_low)
    return low, inner_low, inner_high, high


@triton.jit
def attention_visible(places, here, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """[queries, keys] of what a tile at an edge sees."""
    seen = (here < keys)[None, :]
    if CAUSAL:
        seen = seen & (here[None, :] <= places[:, None])
    if WINDOWED:
        seen = seen & (here[None, :] > places[:, None] - window)
    return seen


@triton.jit
def attention_capped(scores, cap):
    """cap * tanh(scores / cap), by an exponential that may overflow to infinity."""
    e = tl.exp2(scores * (2.0 * LOG2E / cap))
    return cap - (2.0 * cap) / (1.0 + e)


@triton.jit
def attention_list_kernel(
    BLOCKS, LISTS, COUNTS, QUERY_STARTS, KEY_STARTS,
    block_batch, block_head, block_row, block_col,
    columns, queries, keys, window, capacity,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The key tiles that a block map lets a tile of queries read.

    LISTS [batch, heads, query tiles, capacity]: from the front those seen in full, from the back
    those at an edge; COUNTS [batch, heads, query tiles, 2] says how many of each.
    """
    tile = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    place = (batch * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tile
    if QUERY_STARTS is not None:
        queries = tl.load(QUERY_STARTS + batch + 1) - tl.load(QUERY_STARTS + batch)
        keys = tl.load(KEY_STARTS + batch + 1) - tl.load(KEY_STARTS + batch)
    first = tile * BM + (keys - queries)
    last = tl.minimum(tile * BM + BM, queries) - 1 + (keys - queries)
    low, inner_low, inner_high, high = attention_span(
        first, last, keys, window, CAUSAL, WINDOWED, BN
    )
    row = BLOCKS + batch * block_batch + tl.program_id(1) * block_head
    row += (tile * BM // BLOCK_M).to(tl.int64) * block_row
    inner = 0
    edge = 0
    for chunk in tl.range(low // (BLOCK_N * CHUNK) * CHUNK, tl.cdiv(high, BLOCK_N), CHUNK):
        at = chunk + tl.arange(0, CHUNK)
        read = tl.load(row + at * block_col, mask=at < columns, other=0) != 0
        for part in tl.static_range(BLOCK_N // BN):
            start = at * BLOCK_N + part * BN
            seen = read & (start >= low) & (start < high)
            full = (seen & (start >= inner_low) & (start < inner_high)).to(tl.int32)
            some = seen.to(tl.int32) - full
            front = inner + tl.cumsum(full, 0) - 1
            back = capacity - edge - tl.cumsum(some, 0)
            tl.store(LISTS + place * capacity + front, start // BN, mask=full != 0)
            tl.store(LISTS + place * capacity + back, start // BN, mask=some != 0)
            inner += tl.sum(full, 0)
            edge += tl.sum(some, 0)
    tl.store(COUNTS + place * 2, inner)
    tl.store(COUNTS + place * 2 + 1, edge)
