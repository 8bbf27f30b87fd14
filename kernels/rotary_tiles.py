"""The rotary kernel: tiles of (token, head) rows, pairs half a rotation apart or neighbours."""
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotary_pair(X, COS, SIN, x_at, cos_at, sin_at, inside, half, BLOCK: tl.constexpr):
    """Channels (i, i + half), turned: two tiles [ROWS, BLOCK] in float32."""
    pair = tl.arange(0, BLOCK)[None, :]
    inside = inside & (pair < half)
    a = tl.load(X + x_at + pair, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(X + x_at + half + pair, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(COS + cos_at + pair, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(SIN + sin_at + pair, mask=inside, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def rotary_neighbours(
    X, COS, SIN, x_at, cos_at, sin_at, inside, half, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Channels (2 i, 2 i + 1), turned: a tile [ROWS, 2 BLOCK]. The reads are side by side."""
    channel = tl.arange(0, 2 * BLOCK)[None, :]
    pair = tl.arange(0, BLOCK)[None, :]
    x = tl.load(X + x_at + channel, mask=inside & (channel < 2 * half), other=0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(x, (ROWS, BLOCK, 2)))
    cos = tl.load(COS + cos_at + pair, mask=inside & (pair < half), other=0.0).to(tl.float32)
    sin = tl.load(SIN + sin_at + pair, mask=inside & (pair < half), other=0.0).to(tl.float32)
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (ROWS, 2 * BLOCK))


@triton.jit
def rotary_tile(
    X,
    OUT,
    COS,
    SIN,
    block,
    heads,
    length,
    channels,
    half,
    x_batch,
    x_head,
    x_token,
    cos_batch,
    cos_head,
    cos_token,
    sin_batch,
    sin_head,
    sin_token,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PASSED: tl.constexpr,
):
    """Some (token, head) rows of one batch, written with the heads of a token side by side."""
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < heads * length
    batch = tl.program_id(1).to(tl.int64)
    head, token = row % heads, (row // heads).to(tl.int64)
    x_at = batch * x_batch + head * x_head + token * x_token
    cos_at = batch * cos_batch + head * cos_head + token * cos_token
    sin_at = batch * sin_batch + head * sin_head + token * sin_token
    out = OUT + ((batch * length + token) * heads + head) * channels
    if INTERLEAVED:
        channel = tl.arange(0, 2 * BLOCK)[None, :]
        turned = rotary_neighbours(X, COS, SIN, x_at, cos_at, sin_at, inside, half, ROWS, BLOCK)
        kept = inside & (channel < 2 * half)
        tl.store(out + channel, turned.to(OUT.dtype.element_ty), mask=kept)
    else:
        channel = tl.arange(0, BLOCK)[None, :]
        a, b = rotary_pair(X, COS, SIN, x_at, cos_at, sin_at, inside, half, BLOCK)
        kept = inside & (channel < half)
        tl.store(out + channel, a.to(OUT.dtype.element_ty), mask=kept)
        tl.store(out + half + channel, b.to(OUT.dtype.element_ty), mask=kept)
    if PASSED > 0:
        channel = 2 * half + tl.arange(0, PASSED)[None, :]
        kept = inside & (channel < channels)
        tl.store(out + channel, tl.load(X + x_at + channel, mask=kept, other=0.0), mask=kept)


@triton.jit
def rotary_kernel(
    Q,
    K,
    Q_OUT,
    K_OUT,
    COS,
    SIN,
    q_blocks,
    q_heads,
    k_heads,
    length,
    channels,
    half,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    cos_batch,
    cos_head,
    cos_token,
    sin_batch,
    sin_head,
    sin_token,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PASSED: tl.constexpr,
):
    """The first q_blocks programs turn queries, the others keys."""
    block = tl.program_id(0)
    if block < q_blocks:
        rotary_tile(
            Q,
            Q_OUT,
            COS,
            SIN,
            block,
            q_heads,
            length,
            channels,
            half,
            q_batch,
            q_head,
            q_token,
            cos_batch,
            cos_head,
            cos_token,
            sin_batch,
            sin_head,
            sin_token,
            INTERLEAVED,
            ROWS,
            BLOCK,
            PASSED,
        )
    elif K is not None:
        rotary_tile(
            K,
            K_OUT,
            COS,
            SIN,
            block - q_blocks,
            k_heads,
            length,
            channels,
            half,
            k_batch,
            k_head,
            k_token,
            cos_batch,
            cos_head,
            cos_token,
            sin_batch,
            sin_head,
            sin_token,
            INTERLEAVED,
            ROWS,
            BLOCK,
            PASSED,
        )
