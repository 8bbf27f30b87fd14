"""Low-rank updates of many adapters at once: what the GPU runs for a row, and for a tile of rows.

Shrink multiplies x by A, in parts of the input so that a few rows fill the machine; expand sums the
parts in a fixed order, multiplies by B and adds. Chen et al. 2023, "Punica"; Sheng et al. 2023,
"S-LoRA".
"""
# pyright: reportMissingParameterType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lora_rows_at(BASE, row, stride, ALIGN: tl.constexpr):
    """Addresses [rows, 1]; ALIGN: bytes that divide each of them."""
    return tl.multiple_of(BASE + (row.to(tl.int64) * stride)[:, None], (ALIGN, ALIGN))


@triton.jit
def lora_multiple(size, DIVISOR: tl.constexpr):
    """A size that DIVISOR divides, said so that masks against it are known to be even too."""
    return size // DIVISOR * DIVISOR


@triton.jit
def lora_row_shrink_kernel(
    X,
    A,
    ADAPTERS,
    PARTS,
    rows,
    columns,
    share,
    x_row,
    a_adapter,
    a_rank,
    RANK: tl.constexpr,
    DIVISOR: tl.constexpr,
    X_ALIGN: tl.constexpr,
    A_ALIGN: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """parts[part, row, ranks] = A[adapter of the row] x, over `share` columns."""
    row = tl.program_id(2).to(tl.int64)
    part = tl.program_id(0)
    share = lora_multiple(share, BK)
    rank = tl.program_id(1) * BR + tl.arange(0, BR)
    adapter = tl.load(ADAPTERS + row).to(tl.int64)
    sums = tl.zeros([BR, BK], tl.float32)
    if adapter >= 0:
        of_rank = lora_rows_at(A + adapter * a_adapter, rank, a_rank, A_ALIGN)
        of_x = tl.multiple_of(X + row * x_row, X_ALIGN)
        end = lora_multiple(min(part * share + share, columns), DIVISOR)
        for first in range(part * share, end, BK):
            column = first + tl.arange(0, BK)
            inside = column < end
            x = tl.load(of_x + column, mask=inside, other=0.0).to(tl.float32)
            there = (rank < RANK)[:, None] & inside[None, :]
            a = tl.load(of_rank + column[None, :], mask=there, other=0.0).to(tl.float32)
            sums += a * x[None, :]
    at = (part.to(tl.int64) * rows + row) * RANK + rank
    tl.store(PARTS + at, tl.sum(sums, 1), mask=rank < RANK)


@triton.jit
def lora_row_expand_kernel(
    PARTS,
    B,
    SCALE,
    ADAPTERS,
    Y,
    OUT,
    rows,
    columns,
    parts,
    y_row,
    b_adapter,
    b_column,
    RANK: tl.constexpr,
    B_ALIGN: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    """out[row] = y[row] + scale * B[adapter] (sum of the parts), for a block of columns."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = column < columns
    rank = tl.arange(0, BR)
    adapter = tl.load(ADAPTERS + row).to(tl.int64)
    out = tl.load(Y + row * y_row + column, mask=inside, other=0.0).to(tl.float32)
    if adapter >= 0:
        low = tl.zeros([BR], tl.float32)
        for part in range(parts):
            at = (part * rows + row) * RANK + rank
            low += tl.load(PARTS + at, mask=rank < RANK, other=0.0)
        low *= tl.load(SCALE + adapter).to(tl.float32)
        of_column = lora_rows_at(B + adapter * b_adapter, column, b_column, B_ALIGN)
        there = inside[:, None] & (rank < RANK)[None, :]
        b = tl.load(of_column + rank[None, :], mask=there, other=0.0).to(tl.float32)
        out += tl.sum(b * low[None, :], 1)
    tl.store(OUT + row * columns + column, out.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def lora_next(adapter, after):
    """The least adapter of a tile that is greater than `after`; 2^30 where there is none."""
    return tl.min(tl.where(adapter > after, adapter, 1 << 30), 0)


@triton.jit
def lora_shrink_kernel(
    X,
    A,
    ADAPTERS,
    ORDER,
    PARTS,
    rows,
    columns,
    share,
    x_row,
    a_adapter,
    a_rank,
    RANK: tl.constexpr,
    DIVISOR: tl.constexpr,
    X_ALIGN: tl.constexpr,
    A_ALIGN: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """parts[part, place, ranks] for the rows at BM places of the order, adapter after adapter."""
    part = tl.program_id(0)
    share = lora_multiple(share, BK)
    place = tl.program_id(1) * BM + tl.arange(0, BM)
    real = place < rows
    row = tl.load(ORDER + place, mask=real, other=0)
    adapter = tl.load(ADAPTERS + row, mask=real, other=-1)
    rank = tl.arange(0, BR)
    of_x = lora_rows_at(X, row, x_row, X_ALIGN)
    at = (part.to(tl.int64) * rows + place)[:, None] * RANK + rank[None, :]
    end = lora_multiple(min(part * share + share, columns), DIVISOR)
    current = lora_next(adapter, -1)
    while current < (1 << 30):
        mine = adapter == current
        of_rank = lora_rows_at(A + current.to(tl.int64) * a_adapter, rank, a_rank, A_ALIGN)
        sums = tl.zeros([BM, BR], tl.float32)
        for first in range(part * share, end, BK):
            column = first + tl.arange(0, BK)
            inside = (column < end)[None, :]
            x = tl.load(of_x + column[None, :], mask=mine[:, None] & inside, other=0.0)
            there = (rank < RANK)[:, None] & inside
            a = tl.load(of_rank + column[None, :], mask=there, other=0.0)
            sums = tl.dot(x, tl.trans(a), sums, input_precision="ieee")
        tl.store(PARTS + at, sums, mask=mine[:, None] & (rank < RANK)[None, :])
        current = lora_next(adapter, current)


@triton.jit
def lora_expand_kernel(
    PARTS,
    B,
    SCALE,
    ADAPTERS,
    ORDER,
    Y,
    OUT,
    rows,
    columns,
    parts,
    y_row,
    b_adapter,
    b_column,
    RANK: tl.constexpr,
    DIVISOR: tl.constexpr,
    Y_ALIGN: tl.constexpr,
    B_ALIGN: tl.constexpr,
    O_ALIGN: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out[row] = y[row] + scale * B low for the rows at BM places of the order."""
    place = tl.program_id(1) * BM + tl.arange(0, BM)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    real = place < rows
    row = tl.load(ORDER + place, mask=real, other=0)
    adapter = tl.load(ADAPTERS + row, mask=real, other=-1)
    rank = tl.arange(0, BR)
    low = tl.zeros([BM, BR], tl.float32)
    some = (real & (adapter >= 0))[:, None] & (rank < RANK)[None, :]
    for part in range(parts):
        at = (tl.cast(part, tl.int64) * rows + place)[:, None] * RANK + rank[None, :]
        low += tl.load(PARTS + at, mask=some, other=0.0)
    low *= tl.load(SCALE + adapter, mask=real & (adapter >= 0), other=0.0).to(tl.float32)[:, None]
    low = low.to(B.dtype.element_ty)
    sums = tl.zeros([BM, BN], tl.float32)
    current = lora_next(adapter, -1)
    while current < (1 << 30):
        of_column = lora_rows_at(B + current.to(tl.int64) * b_adapter, column, b_column, B_ALIGN)
        there = (column < columns)[:, None] & (rank < RANK)[None, :]
        b = tl.load(of_column + rank[None, :], mask=there, other=0.0)
        mine = tl.where((adapter == current)[:, None], low, tl.zeros_like(low))
        sums = tl.dot(mine, tl.trans(b), sums, input_precision="ieee")
        current = lora_next(adapter, current)
    inside = real[:, None] & (column < lora_multiple(columns, DIVISOR))[None, :]
    y = tl.load(lora_rows_at(Y, row, y_row, Y_ALIGN) + column[None, :], mask=inside, other=0.0)
    out = (sums + y.to(tl.float32)).to(OUT.dtype.element_ty)
    tl.store(lora_rows_at(OUT, row, columns, O_ALIGN) + column[None, :], out, mask=inside)
