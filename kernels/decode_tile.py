"""Split-K attention of a few new tokens over a long cache: what the GPU runs for one split.

The group's heads times the new tokens are the rows of one tile (grouped queries packed into M), so
a cache is read once for all of them. Scores are in base 2. Dao et al. 2023, "Flash-Decoding".
"""
# pyright: reportMissingParameterType=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .activation import tanh
from .decode_combine import decode_finish


@triton.jit
def decode_share(length, oldest, window, first, split, splits, BN: tl.constexpr):
    """Which tiles a split reads: (start, stop, tiles of first tokens, tiles that are skipped).

    Tile number i of the visible ones is tile i of the cache among the first tokens, and i + skipped
    after them. oldest: the place of the first query. Plain integers, so that it is checked outside
    of a GPU too.
    """
    end = (length + BN - 1) // BN
    low = end * 0
    if window > 0:
        low = min(max(oldest - window + 1, 0) // BN, end)
    leading = min((first + BN - 1) // BN, low)
    count = leading + end - low
    share = (count + splits - 1) // splits
    start = min(split * share, count)
    return start, min(start + share, count), leading, low - leading


@triton.jit
def decode_number(raw):
    """Codes in float32; unsigned ones by its mantissa: conversions run at a quarter of the rate."""
    if raw.dtype == tl.uint8:
        wide = (raw.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    else:
        wide = raw.to(tl.float32)
    return wide


@triton.jit
def decode_codes(
    CACHE, at, live, HEAD: tl.constexpr, BITS: tl.constexpr, ALIGN: tl.constexpr, BD: tl.constexpr
):
    """A tile [tokens, channels] as it is stored, codes unpacked (lowest bits first).

    ALIGN: bytes that divide the address of every token.
    """
    PER: tl.constexpr = 8 // BITS
    byte = tl.arange(0, BD // PER)
    inside = live[:, None] & (byte < HEAD // PER)[None, :]
    start = tl.multiple_of(CACHE + at[:, None], (ALIGN, ALIGN))
    raw = tl.load(start + byte[None, :], mask=inside, other=0.0)
    if BITS == 4:
        raw = tl.join(raw & 15, raw >> 4).reshape(raw.shape[0], BD)
    elif BITS == 2:
        even = tl.join(raw & 3, (raw >> 4) & 3)
        odd = tl.join((raw >> 2) & 3, raw >> 6)
        raw = tl.join(even, odd).reshape(raw.shape[0], BD)
    return raw


@triton.jit
def decode_factor(SCALE, at, live, channel_stride, GROUPS: tl.constexpr, COUNT: tl.constexpr):
    """Scales or zeros [rows, GROUPS] in float32, of which COUNT columns exist."""
    group = tl.arange(0, GROUPS)
    inside = live[:, None] & (group < COUNT)[None, :]
    places = at[:, None] + (group * channel_stride)[None, :]
    return tl.load(SCALE + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def decode_scaled(
    raw,
    SCALE,
    ZERO,
    at,
    live,
    channel_stride,
    HEAD: tl.constexpr,
    SPAN: tl.constexpr,
    BD: tl.constexpr,
):
    """scale * raw + zero in float32; `at` has a row for each group of tokens of the tile."""
    TOKENS: tl.constexpr = raw.shape[0]
    ROWS: tl.constexpr = at.shape[0]
    GROUPS: tl.constexpr = 1 if SPAN == HEAD else BD // SPAN
    scale = decode_factor(SCALE, at, live, channel_stride, GROUPS, HEAD // SPAN)
    wide = decode_number(raw)
    SIMPLE: tl.constexpr = (ROWS == 1 or ROWS == TOKENS) and (GROUPS == 1 or GROUPS == BD)
    if not SIMPLE:
        wide = wide.reshape(ROWS, TOKENS // ROWS, GROUPS, BD // GROUPS)
        scale = scale[:, None, :, None]
    wide *= scale
    if ZERO is not None:
        zero = decode_factor(ZERO, at, live, channel_stride, GROUPS, HEAD // SPAN)
        if not SIMPLE:
            zero = zero[:, None, :, None]
        wide += zero
    return wide.reshape(TOKENS, BD)


@triton.jit
def decode_where(
    TABLE, batch, table_row, base, token, live, PAGE: tl.constexpr, WHOLE: tl.constexpr
):
    """(block of the cache, token within it); WHOLE: all tokens lie in the page of `base`."""
    if PAGE == 0:
        block = batch + tl.zeros_like(token).to(tl.int64)
        within = token.to(tl.int64)
    else:
        entry = TABLE + batch * table_row
        if WHOLE:
            page = tl.load(entry + base // PAGE)
            block = page.to(tl.int64) + tl.zeros_like(token).to(tl.int64)
        else:
            block = tl.load(entry + token // PAGE, mask=live, other=0).to(tl.int64)
        within = (token % PAGE).to(tl.int64)
    return block, within


@triton.jit
def decode_partial_kernel(
    Q,
    K,
    V,
    LENGTHS,
    CODED,
    TABLE,
    K_SCALE,
    K_ZERO,
    V_SCALE,
    V_ZERO,
    SINKS,
    SLOPES,
    OUT,
    LSE,
    scale,
    softcap,
    window,
    first,
    queries,
    group,
    kv_heads,
    splits,
    parts,
    before,
    table_row,
    q_batch,
    q_head,
    q_query,
    k_block,
    k_head,
    k_token,
    v_block,
    v_head,
    v_token,
    ks_block,
    ks_head,
    ks_token,
    ks_channel,
    vs_block,
    vs_head,
    vs_token,
    vs_channel,
    HEAD: tl.constexpr,
    VALUE_HEAD: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_TOKENS: tl.constexpr,
    K_SPAN: tl.constexpr,
    V_TOKENS: tl.constexpr,
    V_SPAN: tl.constexpr,
    Q_ALIGN: tl.constexpr,
    K_ALIGN: tl.constexpr,
    V_ALIGN: tl.constexpr,
    O_ALIGN: tl.constexpr,
    PAGE: tl.constexpr,
    TAIL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
):
    """One split of one tile of rows: its attention and the log2 of its sum of exponentials.

    Without LSE there is one split, and OUT is the result. With CODED the cache has two parts: the
    first CODED tokens of a sequence and, with TAIL, those after them; their splits are `before`
    others among the `parts`. K_TOKENS and K_SPAN: tokens and channels
    that share a scale.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    batch = tl.program_id(2).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    split = tl.program_id(0)
    ends = tl.load(LENGTHS + batch)
    length = ends
    shift = ends * 0
    if CODED is not None:
        coded = min(tl.load(CODED + batch), ends)
        if TAIL:
            shift = coded
            length = ends - coded
        else:
            length = coded
    # From here on all places are those within this part of the cache.
    oldest = ends - queries - shift
    first = max(first - shift, 0)
    row = tl.program_id(1) // kv_heads * BM + tl.arange(0, BM)
    real = row < group * queries
    head = kv_head * group + row // queries
    query = row % queries
    position = oldest + query
    channel = tl.arange(0, BD)
    at = batch * q_batch + head * q_head + query.to(tl.int64) * q_query
    inside = real[:, None] & (channel < HEAD)[None, :]
    start_of = tl.multiple_of(Q + at[:, None], (Q_ALIGN, Q_ALIGN))
    q = tl.load(start_of + channel[None, :], mask=inside, other=0.0)
    slope = tl.zeros([BM], tl.float32)
    if SLOPES is not None:
        slope = tl.load(SLOPES + head, mask=real, other=0.0).to(tl.float32) * LOG2E
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    WHOLE: tl.constexpr = PAGE % BN == 0
    # A scale that several tokens of a tile share is read once for them.
    K_ROWS: tl.constexpr = BN // min(BN, K_TOKENS)
    V_ROWS: tl.constexpr = BN // min(BN, V_TOKENS)
    POST: tl.constexpr = K_SPAN == HEAD and K_ZERO is None
    start, stop, leading, skipped = decode_share(length, oldest, window, first, split, splits, BN)
    for i in range(start, stop):
        base = tl.where(i < leading, i, i + skipped) * BN
        token = base + tl.arange(0, BN)
        live = token < length
        block, within = decode_where(TABLE, batch, table_row, base, token, live, PAGE, WHOLE)
        k_at = block * k_block + kv_head * k_head + within * k_token
        keys = decode_codes(K, k_at, live, HEAD, K_BITS, K_ALIGN, BD)
        if K_SCALE is None or POST:
            keys = decode_number(keys).to(q.dtype) if keys.dtype != q.dtype else keys
        else:
            some = base + tl.arange(0, K_ROWS) * (BN // K_ROWS)
            alive = some < length
            s_block, s_in = decode_where(TABLE, batch, table_row, base, some, alive, PAGE, WHOLE)
            s_at = s_block * ks_block + kv_head * ks_head + (s_in // K_TOKENS) * ks_token
            keys = decode_scaled(
                keys, K_SCALE, K_ZERO, s_at, alive, ks_channel, HEAD, K_SPAN, BD
            ).to(q.dtype)
        s = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        if K_SCALE is not None and POST:
            s_at = block * ks_block + kv_head * ks_head + (within // K_TOKENS) * ks_token
            s *= tl.load(K_SCALE + s_at, mask=live, other=0.0).to(tl.float32)[None, :]
        if CAPPED:
            s = tanh(s / softcap) * softcap
        s *= LOG2E
        if SLOPES is not None:
            s += slope[:, None] * (token[None, :] - position[:, None]).to(tl.float32)
        seen = token[None, :] <= position[:, None]
        if CODED is not None:
            seen = seen & live[None, :]
        if WINDOWED:
            near = token[None, :] > position[:, None] - window
            seen = seen & (near | (token < first)[None, :])
        s = tl.where(seen, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s - safe[:, None])
        old = tl.exp2(m - safe)
        total = total * old + tl.sum(p, 1)
        v_at = block * v_block + kv_head * v_head + within * v_token
        values = decode_codes(V, v_at, live, VALUE_HEAD, V_BITS, V_ALIGN, BDV)
        if V_SCALE is not None:
            some = base + tl.arange(0, V_ROWS) * (BN // V_ROWS)
            alive = some < length
            s_block, s_in = decode_where(TABLE, batch, table_row, base, some, alive, PAGE, WHOLE)
            s_at = s_block * vs_block + kv_head * vs_head + (s_in // V_TOKENS) * vs_token
            values = decode_scaled(
                values, V_SCALE, V_ZERO, s_at, alive, vs_channel, VALUE_HEAD, V_SPAN, BDV
            ).to(q.dtype)
        else:
            values = decode_number(values).to(q.dtype) if values.dtype != q.dtype else values
        acc = tl.dot(p.to(q.dtype), values, acc * old[:, None], input_precision="ieee")
        m = top
    sink = tl.full([BM], float("-inf"), tl.float32)
    if LSE is None and SINKS is not None:
        sink = tl.load(SINKS + head, mask=real, other=0.0).to(tl.float32) * LOG2E
    out = decode_finish(m, total, acc, sink)
    place = ((batch * kv_heads * group + head) * queries + query) * parts
    place += before + split
    if LSE is not None:
        tl.store(LSE + place, m + tl.log2(total), mask=real)
    column = tl.arange(0, BDV)
    start_of = tl.multiple_of(OUT + place[:, None] * VALUE_HEAD, (O_ALIGN, O_ALIGN))
    inside = real[:, None] & (column < VALUE_HEAD)[None, :]
    tl.store(start_of + column[None, :], out.to(OUT.dtype.element_ty), mask=inside)
