"""The selective scan of a block of channels: what the GPU runs.

The states of a channel are a row of a tile that stays in registers; time runs in the kernel, and
nothing of the states is written but the last. Gu and Dao 2023, "Mamba", section 3.3.
"""
# pyright: reportMissingParameterType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: RUF005 (Triton knows no unpacking)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scan_softplus(x):
    """log(1 + exp(x)), of large x as x itself, without overflow."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def selective_scan_kernel(
    U,
    DELTA,
    A,
    B,
    C,
    D,
    Z,
    BIAS,
    START,
    Y,
    LAST,
    tokens,
    channels,
    shared,
    u_batch,
    u_token,
    u_channel,
    delta_batch,
    delta_token,
    delta_channel,
    a_channel,
    b_batch,
    b_token,
    b_group,
    c_batch,
    c_token,
    c_group,
    z_batch,
    z_token,
    z_channel,
    start_batch,
    start_channel,
    STATES: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    A_ALIGN: tl.constexpr,
    LAST_ALIGN: tl.constexpr,
    UNIFORM: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """BC channels of one sequence; `shared` channels read the same B and C. y is contiguous.

    Inputs of AHEAD tokens are loaded at once, so that their latencies overlap.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    state = tl.arange(0, BS)
    real = channel < channels
    inside = real[:, None] & (state < STATES)[None, :]
    wide = channel.to(tl.int64)
    # Where all channels of the block have one group, its B and C are one row.
    group = wide // shared
    inside_bc = inside
    if UNIFORM:
        group = tl.zeros([1], tl.int64) + tl.program_id(0) * BC // shared
        inside_bc = (state < STATES)[None, :]
    of_a = tl.multiple_of(A + wide[:, None] * a_channel, (A_ALIGN, A_ALIGN))
    a = tl.load(of_a + state[None, :], mask=inside, other=0.0)
    a = a.to(tl.float32) * LOG2E
    h = tl.zeros([BC, BS], tl.float32)
    if START is not None:
        at = START + batch * start_batch + wide[:, None] * start_channel + state[None, :]
        h = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    bias = tl.zeros([BC], tl.float32)
    if BIAS is not None:
        bias = tl.load(BIAS + channel, mask=real, other=0.0).to(tl.float32)
    skip = tl.zeros([BC], tl.float32)
    if D is not None:
        skip = tl.load(D + channel, mask=real, other=0.0).to(tl.float32)
    u_at = U + batch * u_batch + wide * u_channel
    delta_at = DELTA + batch * delta_batch + wide * delta_channel
    b_at = B + batch * b_batch + group[:, None] * b_group + state[None, :]
    c_at = C + batch * c_batch + group[:, None] * c_group + state[None, :]
    y_at = Y + batch * tokens * channels + channel
    z_at = y_at
    if Z is not None:
        z_at = Z + batch * z_batch + wide * z_channel
    for first in range(0, tokens, AHEAD):
        us, deltas, bs, cs, zs = (), (), (), (), ()
        for step in tl.static_range(AHEAD):
            t = tl.zeros([1], tl.int64) + first + step
            there = real & (t < tokens)
            both = inside_bc & (t < tokens)
            us = us + (tl.load(u_at + t * u_token, mask=there, other=0.0),)
            deltas = deltas + (tl.load(delta_at + t * delta_token, mask=there, other=0.0),)
            bs = bs + (tl.load(b_at + t * b_token, mask=both, other=0.0),)
            cs = cs + (tl.load(c_at + t * c_token, mask=both, other=0.0),)
            if Z is not None:
                zs = zs + (tl.load(z_at + t * z_token, mask=there, other=0.0),)
        for step in tl.static_range(AHEAD):
            t = tl.zeros([1], tl.int64) + first + step
            u = us[step].to(tl.float32)
            delta = deltas[step].to(tl.float32) + bias
            if SOFTPLUS:
                delta = scan_softplus(delta)
            # Beyond the end a step of no length leaves the state as it is.
            delta = tl.where(t < tokens, delta, 0.0)
            keep = tl.exp2(delta[:, None] * a)
            h = keep * h + (delta * u)[:, None] * bs[step].to(tl.float32)
            y = tl.sum(h * cs[step].to(tl.float32), 1) + skip * u
            if Z is not None:
                z = zs[step].to(tl.float32)
                y *= z * tl.sigmoid(z)
            out = y.to(Y.dtype.element_ty)
            tl.store(y_at + t * channels, out, mask=real & (t < tokens))
    at = LAST + (batch * channels + channel)[:, None] * STATES
    at = tl.multiple_of(at, (LAST_ALIGN, LAST_ALIGN)) + state[None, :]
    tl.store(at, h, mask=inside)
