"""Products of experts' weights with the tokens routed to them, and the sum over a token's slots."""
# pyright: reportMissingParameterType=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped_rows_at(BASE, row, stride, ALIGN: tl.constexpr):
    """Addresses [rows, 1]; ALIGN: bytes that divide each of them."""
    return tl.multiple_of(BASE + (row.to(tl.int64) * stride)[:, None], (ALIGN, ALIGN))


@triton.jit
def grouped_gemm_kernel(
    X,
    W,
    BIAS,
    PLACES,
    OWNERS,
    OUT,
    E0,
    E0_row,
    E0_col,
    E1,
    E1_row,
    E1_col,
    E2,
    E2_row,
    E2_col,
    E3,
    E3_row,
    E3_col,
    pairs,
    inputs,
    outputs,
    share,
    x_row,
    w_expert,
    w_row,
    bias_expert,
    FINISH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_DIVISOR: tl.constexpr,
    OUT_DIVISOR: tl.constexpr,
    X_ALIGN: tl.constexpr,
    W_ALIGN: tl.constexpr,
    O_ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A block of places, which has one expert, times BN rows of that expert's weight.

    IN_DIVISOR, OUT_DIVISOR: what divides the sizes, said so that masks are known to be even too.
    """
    inputs = inputs // IN_DIVISOR * IN_DIVISOR
    outputs = outputs // OUT_DIVISOR * OUT_DIVISOR
    block = tl.program_id(1)
    owner = tl.load(OWNERS + block).to(tl.int64)
    if owner >= 0:
        pair = tl.load(PLACES + block * BM + tl.arange(0, BM))
        real = pair < pairs
        pair = tl.where(real, pair, 0)
        column = tl.program_id(0) * BN + tl.arange(0, BN)
        of_x = grouped_rows_at(X, pair // share, x_row, X_ALIGN)
        of_w = grouped_rows_at(W + owner * w_expert, column, w_row, W_ALIGN)
        sums = tl.zeros([BM, BN], tl.float32)
        for first in range(0, inputs, BK):
            k = first + tl.arange(0, BK)
            inside = (k < inputs)[None, :]
            x = tl.load(of_x + k[None, :], mask=real[:, None] & inside, other=0.0)
            there = (column < outputs)[:, None] & inside
            w = tl.load(of_w + k[None, :], mask=there, other=0.0)
            sums = tl.dot(x, tl.trans(w), sums, input_precision=PRECISION)
        if BIAS is not None:
            at = BIAS + owner * bias_expert + column
            sums += tl.load(at, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
        inside = real[:, None] & (column < outputs)[None, :]
        sums = FINISH(
            sums,
            pair,
            column,
            inside,
            E0,
            E0_row,
            E0_col,
            E1,
            E1_row,
            E1_col,
            E2,
            E2_row,
            E2_col,
            E3,
            E3_row,
            E3_col,
            ACTIVATION,
        )
        at = grouped_rows_at(OUT, pair, outputs, O_ALIGN) + column[None, :]
        tl.store(at, sums.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def combine_kernel(
    Y,
    WEIGHTS,
    ADDED,
    OUT,
    columns,
    y_row,
    added_row,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[token] = added[token] + sum over slots of weight * y[token * K + slot], in order."""
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros([BLOCK], tl.float32)
    if ADDED is not None:
        at = ADDED + token * added_row + column
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for slot in range(K):
        weight = tl.load(WEIGHTS + token * K + slot).to(tl.float32)
        at = Y + (token * K + slot) * y_row + column
        total += weight * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + token * columns + column, total.to(OUT.dtype.element_ty), mask=inside)
