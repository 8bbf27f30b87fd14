"""Small Triton kernels for tests of the PTX simulator, and how they are compiled."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from planish.kernels.aot import compile_launch
from planish.kernels.launch import Launch
from planish.kernels.ptx_execute import Execution, execute
from torch import Tensor


@triton.jit
def product_kernel(
    A, B, C, rows, columns, inner, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    at_row = tl.program_id(0) * BM + tl.arange(0, BM)
    at_column = tl.program_id(1) * BN + tl.arange(0, BN)
    sums = tl.zeros([BM, BN], tl.int32 if A.dtype.element_ty == tl.int8 else tl.float32)
    for start in tl.range(0, inner, BK):
        at = start + tl.arange(0, BK)
        a_mask = (at_row[:, None] < rows) & (at[None, :] < inner)
        b_mask = (at[:, None] < inner) & (at_column[None, :] < columns)
        a = tl.load(A + at_row[:, None] * inner + at[None, :], mask=a_mask, other=0.0)
        b = tl.load(B + at[:, None] * columns + at_column[None, :], mask=b_mask, other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    mask = (at_row[:, None] < rows) & (at_column[None, :] < columns)
    place = C + at_row[:, None] * columns + at_column[None, :]
    tl.store(place, sums.to(C.dtype.element_ty), mask=mask)


@triton.jit
def described_product_kernel(
    A, B, C, rows, columns, inner, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    a_of = tl.make_tensor_descriptor(A, [rows, inner], [inner, 1], [BM, BK])
    b_of = tl.make_tensor_descriptor(B, [inner, columns], [columns, 1], [BK, BN])
    c_of = tl.make_tensor_descriptor(C, [rows, columns], [columns, 1], [BM, BN])
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    sums = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, inner, BK):
        sums = tl.dot(a_of.load([row, start]), b_of.load([start, column]), sums)
    c_of.store([row, column], sums.to(C.dtype.element_ty))


@triton.jit
def order_kernel(X, SORTED, SUMS, PICKED, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at)
    tl.store(SORTED + at, tl.sort(x))
    tl.store(SUMS + at, tl.cumsum(x, 0))
    tl.store(PICKED + at, tl.gather(x, (at * 7 + 3) % BLOCK, 0))


@triton.jit
def count_kernel(X, SUM, MOST, LEAST, BINS, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at)
    tl.atomic_add(SUM + at % 3, x)
    tl.atomic_max(MOST, tl.max(x, 0))
    tl.atomic_min(LEAST, tl.min(x, 0))
    bins = tl.histogram((x.to(tl.int32) & 15), COUNT)
    tl.atomic_add(BINS + tl.arange(0, COUNT), bins)


@triton.jit
def add_halves_kernel(X, SUM, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(SUM + tl.arange(0, BLOCK), tl.load(X + at), sem="relaxed")


@triton.jit
def turn_kernel(TURN, OUT, LAST: tl.constexpr):
    """Programs take turns in the order that LAST - number gives, 0 for the order of launch."""
    me = tl.abs(LAST - tl.program_id(0))
    while tl.atomic_add(TURN, 0) != me:
        pass
    tl.store(OUT + tl.program_id(0), tl.load(OUT) + me)
    tl.atomic_add(TURN, 1)


@triton.jit
def cast_kernel(X, OUT, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(X + at).to(OUT.dtype.element_ty))


@triton.jit
def functions_kernel(X, OUT, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at)
    tl.store(OUT + at, tl.sin(x) + tl.exp(x) * tl.sqrt(tl.abs(x)) + tl.erf(x) + tl.log2(x * x + 1))
    tl.store(OUT + BLOCK + at, tl.cos(x) + tl.rsqrt(x * x + 1) + tl.floor(x) / (tl.sigmoid(x) + 1))


def compiled(launch: Launch, arch: str) -> Any:
    return compile_launch(launch, arch)


def simulate(launch: Launch, arch: str, ptx: str | None = None, **options: Any) -> Execution:
    """Compile a launch and execute its PTX, or another in its place, on its arguments."""
    code = compiled(launch, arch)
    values = [launch.args[name] for name in code.parameters]
    return execute(
        ptx or code.ptx, launch.grid, values, threads=code.threads, shared=code.shared, **options
    )


def product(
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    tiles: tuple[int, int, int],
    warps: int = 4,
    stages: int = 3,
    precision: str = "tf32",
    described: bool = False,
) -> tuple[Launch, Tensor]:
    """The launch of a product [rows, inner] [inner, columns], and the product in float64."""
    rows, columns, inner = sizes
    generator = torch.Generator().manual_seed(1)

    def matrix(*shape: int) -> Tensor:
        if dtype == torch.int8:
            return torch.randint(-99, 99, shape, generator=generator, dtype=dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    a, b = matrix(rows, inner), matrix(inner, columns)
    out = torch.int32 if dtype == torch.int8 else dtype if dtype.itemsize == 2 else torch.float32
    c = torch.full((rows, columns), 77, dtype=out)
    args = {"A": a, "B": b, "C": c, "rows": rows, "columns": columns, "inner": inner}
    constants: dict[str, Any] = dict(zip(("BM", "BN", "BK"), tiles, strict=True))
    if not described:
        constants["PRECISION"] = precision
    grid = (-(-rows // tiles[0]), -(-columns // tiles[1]))
    kernel = described_product_kernel if described else product_kernel
    return Launch(kernel, grid, args, constants, warps, stages), a.double() @ b.double()
