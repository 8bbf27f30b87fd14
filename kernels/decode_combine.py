"""The end of split-K attention: the splits' results, weighed by their share of the sum.

Parts are normalized and come with the log2 of their sum of exponentials; minus infinity where a
split saw no key.
"""
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_finish(m, total, acc, sink):
    """The attention of all keys and the sink (a logit in base 2, or minus infinity)."""
    top = tl.maximum(m, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    old = tl.exp2(m - top)
    total = total * old + tl.exp2(sink - top)
    return acc * (old / tl.where(total > 0, total, 1.0))[:, None]


@triton.jit
def decode_combine_kernel(
    PART,
    LSE,
    SINKS,
    OUT,
    queries,
    heads,
    splits,
    VALUE_HEAD: tl.constexpr,
    BS: tl.constexpr,
    BDV: tl.constexpr,
):
    """A row: the splits' results by their share of the sum; blind rows give zeros."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BDV)
    sink = -float("inf")
    if SINKS is not None:
        sink = tl.load(SINKS + row // queries % heads).to(tl.float32) * 1.4426950408889634
    m = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BDV], tl.float32)
    for first in range(0, splits, BS):
        split = first + tl.arange(0, BS)
        there = split < splits
        lse = tl.load(LSE + row * splits + split, mask=there, other=float("-inf"))
        top = tl.maximum(m, tl.max(lse, 0))
        safe = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(lse - safe)
        old = tl.exp2(m - safe)
        part_row = row * splits + split
        at = part_row[:, None] * VALUE_HEAD + column[None, :]
        inside = there[:, None] & (column < VALUE_HEAD)[None, :]
        part = tl.load(PART + at, mask=inside, other=0.0)
        acc = acc * old[:, None] + tl.sum(part * weight[:, None], 0, keep_dims=True)
        total = total * old + tl.sum(weight, 0)
        m = top
    out = decode_finish(m, total, acc, sink + tl.zeros([1], tl.float32))
    at = row * VALUE_HEAD + column[None, :]
    inside = (column < VALUE_HEAD)[None, :]
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=inside)
