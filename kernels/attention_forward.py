"""Flash attention forward on a GPU: the kernel (Dao 2023, FlashAttention-2, algorithm 1).

Scores exist one tile at a time. Tiles that every query of a tile sees in full go through a loop
without a test; those at the causal diagonal, a window's edge or the end of the keys through
another; those that no query sees, or that a block map leaves out, are not loaded.
"""
# pyright: reportMissingParameterType=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportConstantRedefinition=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import (
    HIDDEN,
    LN2,
    LOG2E,
    attention_capped,
    attention_decoded,
    attention_keep,
    attention_piece,
    attention_span,
    attention_visible,
)


@triton.jit
def attention_kernel(
    Q, K, V, OUT, LSE, MASK, SINKS, SLOPES, K_SCALE, V_SCALE, QUERY_STARTS, KEY_STARTS,
    LISTS, COUNTS,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, mask_batch, mask_head, mask_row, mask_col,
    k_scale_batch, k_scale_head, k_scale_row, v_scale_batch, v_scale_head, v_scale_row,
    list_batch, list_head, capacity, lse_row, queries, keys, window, scale, cap,
    HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    VALUE: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    GROUP: tl.constexpr, PACK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, UNIFORM: tl.constexpr, BOOLEAN: tl.constexpr, MASK_ROWS: tl.constexpr,
    MASK_DENSE: tl.constexpr, KEY_SCALES: tl.constexpr, VALUE_SCALES: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, MASK_ALIGN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of BM rows of one head, or of the PACK heads that share keys, interleaved."""
    # Scores are kept in units of 1/scale, and the scale multiplies inside the exponent, unless
    # something is added to them.
    NATURAL: tl.constexpr = CAPPED or UNIFORM or SLOPES is not None or (
        MASK is not None and not BOOLEAN
    )  # fmt: skip
    GUARDED: tl.constexpr = MASK is not None or UNIFORM
    tile = tl.program_id(0)
    if CAUSAL:  # the longest first
        tile = tl.num_programs(0) - 1 - tile
    head = tl.program_id(1) * PACK
    kv_head = (head // GROUP).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    q_start = batch * 0
    k_start = batch * 0
    q_at = batch
    if QUERY_STARTS is not None:
        q_at = batch * 0
        q_start += tl.load(QUERY_STARTS + batch)
        k_start += tl.load(KEY_STARTS + batch)
        queries = tl.load(QUERY_STARTS + batch + 1) - q_start.to(tl.int32)
        keys = tl.load(KEY_STARTS + batch + 1) - k_start.to(tl.int32)
        if tile * BM >= queries * PACK:
            return

    rows = tile * BM + tl.arange(0, BM)
    inside = rows < queries * PACK
    clamped = tl.minimum(rows, queries * PACK - 1)
    first = tile * BM // PACK
    query = clamped // PACK
    heads = head + clamped % PACK
    last = tl.minimum((tile * BM + BM - 1) // PACK, queries - 1)
    places = query + (keys - queries)
    low, inner_low, inner_high, high = attention_span(
        first + (keys - queries), last + (keys - queries), keys, window, CAUSAL, WINDOWED, BN
    )
    if UNIFORM:  # a blind query takes the mean of values that no other query sees
        low = keys * 0
        inner_low = low
        inner_high = low
        high = keys
    left = (inner_low - low + BN - 1) // BN
    edges = left + tl.maximum(high - inner_high + BN - 1, 0) // BN
    inner = (inner_high - inner_low) // BN
    if LISTS is not None:
        place = batch * list_batch + tl.program_id(1) * list_head + tile
        LISTS += place * capacity
        inner = tl.load(COUNTS + place * 2)
        edges = tl.load(COUNTS + place * 2 + 1)

    Q += q_at * q_batch + head.to(tl.int64) * q_head + (q_start + first) * q_row
    K += q_at * k_batch + kv_head * k_head + k_start * k_row
    V += q_at * v_batch + kv_head * v_head + k_start * v_row
    q_rows = (query - first) * q_row + (heads - head) * q_head
    q1 = attention_piece(Q, q_rows, 1, inside, False, 0, D1, HEAD, ALIGN)
    if D2 > 0:
        q2 = attention_piece(Q, q_rows, 1, inside, False, D1, D2, HEAD, ALIGN)
    columns = tl.arange(0, BN)
    mask_columns = columns if MASK_DENSE else columns * mask_col
    exponent = scale * LOG2E
    if K_SCALE is not None:
        K_SCALE += q_at * k_scale_batch + kv_head * k_scale_head + k_start * k_scale_row
        if not KEY_SCALES:
            scale *= tl.load(K_SCALE)
            exponent = scale * LOG2E
    if NATURAL:
        exponent = LOG2E
    if V_SCALE is not None:
        V_SCALE += q_at * v_scale_batch + kv_head * v_scale_head + k_start * v_scale_row
    if SLOPES is not None:
        slopes = tl.load(SLOPES + heads).to(tl.float32)
        places_number = places.to(tl.float32)
        columns_number = columns.to(tl.float32)
    if MASK is not None:
        MASK += batch * mask_batch + head.to(tl.int64) * mask_head + first.to(tl.int64) * mask_row
        mask_rows = (query - first) * mask_row + (heads - head) * mask_head

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums1 = tl.zeros([BM, V1], tl.float32)
    if V2 > 0:
        sums2 = tl.zeros([BM, V2], tl.float32)
    for EDGE in tl.static_range(2):  # first the tiles that need no test, then those at an edge
        for step in tl.range(0, edges if EDGE else inner):
            if LISTS is not None:
                start = tl.load(LISTS + (capacity - 1 - step if EDGE else step)) * BN
            elif EDGE:
                start = tl.where(step < left, low + step * BN, inner_high + (step - left) * BN)
            else:
                start = inner_low + step * BN
            here = start + columns
            there = here < keys
            k_base = K + start.to(tl.int64) * k_row
            k1 = attention_piece(k_base, columns, k_row, there, EDGE, 0, D1, HEAD, ALIGN)
            k1 = attention_decoded(k1, q1.dtype)
            scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
            if D2 > 0:
                k2 = attention_piece(k_base, columns, k_row, there, EDGE, D1, D2, HEAD, ALIGN)
                scores = tl.dot(
                    q2, tl.trans(attention_decoded(k2, q1.dtype)), scores, input_precision=PRECISION
                )
            if K_SCALE is not None and KEY_SCALES:
                scales = tl.load(K_SCALE + here * k_scale_row, mask=there, other=0.0)
                scores *= scales.to(tl.float32)[None, :]
            if NATURAL:
                scores *= scale
            if CAPPED:
                scores = attention_capped(scores, cap)
            if SLOPES is not None:
                ahead = places_number - start.to(tl.float32)
                scores -= tl.abs(ahead[:, None] - columns_number[None, :]) * slopes[:, None]
            if MASK is not None:
                mask_base = MASK + start.to(tl.int64) * mask_col
                if MASK_ROWS:
                    at = mask_base + mask_rows[:, None]
                    if MASK_DENSE:
                        at = tl.multiple_of(at, (MASK_ALIGN, MASK_ALIGN))
                    at += mask_columns[None, :]
                    added = tl.load(at, mask=there[None, :], other=0) if EDGE else tl.load(at)
                else:
                    at = mask_base + mask_columns
                    added = tl.load(at, mask=there, other=0) if EDGE else tl.load(at)
                    added = added[None, :]
                if BOOLEAN:
                    scores = tl.where(added != 0, scores, HIDDEN if UNIFORM else float("-inf"))
                else:
                    scores += added.to(tl.float32)
            if EDGE:
                seen = attention_visible(places, here, keys, window, CAUSAL, WINDOWED)
                if UNIFORM:
                    scores = tl.where(seen, tl.maximum(scores, HIDDEN), HIDDEN)
                    seen = there[None, :]
                scores = tl.where(seen, scores, float("-inf"))
            # One step of the online softmax (Dao 2023, algorithm 1).
            if NATURAL:
                higher = tl.maximum(top, tl.max(scores, 1))
            else:
                higher = tl.maximum(top, tl.max(scores, 1) * exponent)
            level = higher
            if EDGE or GUARDED:
                level = tl.where(higher == float("-inf"), 0.0, higher)
            if NATURAL:
                weights = tl.exp2((scores - level[:, None]) * LOG2E)
                fade = tl.exp2((top - level) * LOG2E)
            else:
                weights = tl.exp2(scores * exponent - level[:, None])
                fade = tl.exp2(top - level)
            top = higher
            total = total * fade + tl.sum(weights, 1)
            if V_SCALE is not None and VALUE_SCALES:
                scales = tl.load(V_SCALE + here * v_scale_row, mask=there, other=0.0)
                weights *= scales.to(tl.float32)[None, :]
            weights = weights.to(q1.dtype)
            v_base = V + start.to(tl.int64) * v_row
            v1 = attention_piece(v_base, columns, v_row, there, EDGE, 0, V1, VALUE, ALIGN)
            v1 = attention_decoded(v1, q1.dtype)
            sums1 = tl.dot(weights, v1, sums1 * fade[:, None], input_precision=PRECISION)
            if V2 > 0:
                v2 = attention_piece(v_base, columns, v_row, there, EDGE, V1, V2, VALUE, ALIGN)
                sums2 = tl.dot(
                    weights,
                    attention_decoded(v2, q1.dtype),
                    sums2 * fade[:, None],
                    input_precision=PRECISION,
                )

    unit: tl.constexpr = 1.0 if NATURAL else LOG2E
    factor = tl.full([BM], 1.0, tl.float32)
    if SINKS is not None:  # a key of no value: it joins the sum of weights alone
        sink = tl.load(SINKS + heads).to(tl.float32) * unit
        higher = tl.maximum(top, sink)
        level = tl.where(higher == float("-inf"), 0.0, higher)
        factor = tl.exp2((top - level) * (LOG2E / unit))
        total = total * factor + tl.exp2((sink - level) * (LOG2E / unit))
        top = higher
    if V_SCALE is not None and not VALUE_SCALES:
        factor *= tl.load(V_SCALE).to(tl.float32)
    lse = top * (1.0 / unit) + tl.log2(total) * LN2
    if UNIFORM:
        lse = tl.where(top <= HIDDEN, float("-inf"), lse)
    factor /= tl.where(total == 0.0, 1.0, total)
    OUT += q_at * out_batch + head.to(tl.int64) * out_head + (q_start + first) * out_row
    out_rows = (query - first) * out_row + (heads - head) * out_head
    attention_keep(OUT, sums1 * factor[:, None], out_rows, 1, inside, 0, V1, VALUE, ALIGN)
    if V2 > 0:
        attention_keep(OUT, sums2 * factor[:, None], out_rows, 1, inside, V1, V2, VALUE, ALIGN)
    LSE += (q_at * (tl.num_programs(1) * PACK) + heads) * lse_row + q_start
    tl.store(LSE + query, lse, mask=inside)
