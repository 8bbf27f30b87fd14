"""Kernels that probe the repaired interpreter; run by test_interpreter.py in a process of its own.

Each check returns None, or what is wrong. Printed as JSON: what the checks say of the repaired
interpreter, of one where a single replacement is taken back, and of the plain one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from planish.kernels import interpreter
from planish.kernels.interpreter import OutOfBounds
from planish.kernels.interpreter_arithmetic import Arithmetic
from planish.kernels.interpreter_pointers import Pointers
from torch import Tensor

CHECKS: dict[str, Callable[[], str | None]] = {}
ALL_BF16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
ALL_BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
FP8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def check(function: Callable[[], str | None]) -> Callable[[], str | None]:
    CHECKS[function.__name__] = function
    return function


def differ(have: Tensor, want: Tensor) -> str | None:
    """Compared bit by bit, NaN by being NaN."""
    assert have.dtype == want.dtype and have.shape == want.shape
    same = (have.double() == want.double()) | (have.double().isnan() & want.double().isnan())
    return None if same.all() else f"{int((~same).sum())} of {same.numel()} differ"


def floats(count: int) -> Tensor:
    """Random float32 of every exponent, and special ones."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 448, 464, 465, 500, 6e4])
    near = torch.randn(count, generator=generator) * 4
    return torch.cat([bits.view(torch.float32), special, near, near * 1e-3])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@triton.jit
def cast_kernel(X, Y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n, other=0.0)
    tl.store(Y + at, x.to(Y.dtype.element_ty), mask=at < n)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.zeros(x.shape, dtype=dtype)
    cast_kernel[(triton.cdiv(x.numel(), 4096),)](x, out, x.numel(), BLOCK=4096)
    return out


@check
def every_bf16_to_float32() -> str | None:
    return differ(cast(ALL_BF16, torch.float32), ALL_BF16.float())


@check
def every_bf16_to_float16() -> str | None:
    return differ(cast(ALL_BF16, torch.float16), ALL_BF16.half())


@check
def float32_to_bf16() -> str | None:
    x = torch.cat([floats(20000), (ALL_BF16.float() + ALL_BF16.roll(1).float()) / 2])
    return differ(cast(x, torch.bfloat16), x.bfloat16())


@check
def integers_to_bf16_and_back() -> str | None:
    x = torch.arange(-300, 300, dtype=torch.int32)
    back = cast(cast(x, torch.bfloat16), torch.int32)
    return differ(cast(x, torch.bfloat16), x.bfloat16()) or differ(back, x.bfloat16().int())


@check
def to_fp8() -> str | None:
    """To nearest even, saturated."""
    for dtype, largest in FP8.items():
        for x in (floats(20000), ALL_BF16, floats(5000).half()):
            want = torch.where(x.isnan(), x, x.clamp(-largest, largest)).float().to(dtype)
            if wrong := differ(cast(x, dtype), want):
                return f"{x.dtype} to {dtype}: {wrong}"
    return None


@check
def every_fp8() -> str | None:
    for dtype in FP8:
        x = ALL_BYTES.view(dtype)
        for wide in (torch.float32, torch.float16, torch.bfloat16):
            if wrong := differ(cast(x, wide), x.to(wide)):
                return f"{dtype} to {wide}: {wrong}"
    return None


@triton.jit
def arithmetic_kernel(A, B, OUT, AT, SCALE, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < n
    a = tl.load(A + at, mask=inside, other=1.0)
    b = tl.load(B + at, mask=inside, other=1.0)
    tl.store(OUT + at, a + b, mask=inside)
    tl.store(OUT + n + at, a - b, mask=inside)
    tl.store(OUT + 2 * n + at, a * b, mask=inside)
    tl.store(OUT + 3 * n + at, a / b, mask=inside)
    tl.store(OUT + 4 * n + at, tl.maximum(a, b), mask=inside)
    tl.store(OUT + 5 * n + at, -a, mask=inside)
    tl.store(OUT + 6 * n + at, tl.where(a > b, tl.abs(a), b), mask=inside)
    tl.store(OUT + 7 * n + at, (a > b).to(tl.bfloat16), mask=inside)
    tl.store(OUT + 8 * n + at, tl.clamp(a, -0.5, 0.5), mask=inside)
    tl.store(OUT + 9 * n + at, tl.fma(a, b, a), mask=inside)
    tl.store(AT + at, a * SCALE, mask=inside)


@check
def bf16_arithmetic() -> str | None:
    a, b = normal(200), normal(200, seed=1)
    out, scaled = torch.zeros(10, 200, dtype=torch.bfloat16), torch.zeros(200)
    arithmetic_kernel[(1,)](a, b, out, scaled, 0.3, 200, BLOCK=256)
    fused = (a.double() * b.double() + a.double()).bfloat16()
    chosen = torch.where(a > b, a.abs(), b)
    clipped = a.clamp(-0.5, 0.5)
    first = [a + b, a - b, a * b, a / b, torch.maximum(a, b), -a, chosen, (a > b).bfloat16()]
    return differ(out, torch.stack([*first, clipped, fused]))


@check
def a_float_argument_is_a_float32() -> str | None:
    a, b = normal(200), normal(200, seed=1)
    out, scaled = torch.zeros(10, 200, dtype=torch.bfloat16), torch.zeros(200)
    arithmetic_kernel[(1,)](a, b, out, scaled, 0.3, 200, BLOCK=256)
    return differ(scaled, a.float() * torch.tensor(0.3))


@triton.jit
def integer_kernel(OUT, n):
    tl.store(OUT, n.to(tl.int64) + 1)


@check
def an_argument_of_1_is_a_constant() -> str | None:
    """As Triton compiles it: such a kernel works for 2 rows and not for 1."""
    out = torch.zeros(1, dtype=torch.int64)
    integer_kernel[(1,)](out, 2)
    wrong = differ(out, torch.tensor([3]))
    try:
        integer_kernel[(1,)](out, 1)
    except Exception as error:
        return wrong or (None if "'int' object has no attribute 'to'" in str(error) else str(error))
    return "was taken for a tensor"


@triton.jit
def fma_kernel(X, OUT):
    at = tl.arange(0, 1)
    x = tl.load(X + at)
    tl.store(OUT + at, tl.fma(x, tl.load(X + 1 + at), tl.load(X + 2 + at)))


@check
def a_fused_sum_is_rounded_once() -> str | None:
    """1.0625 * 0.9453125 is a tie of bfloat16; the third number decides it."""
    x = torch.tensor([1.0625, 1.0078125, 2.0**-40]).bfloat16()
    product = x[0].double() * x[1].double()
    assert product.bfloat16().double() != product  # it is not a bfloat16 itself
    out = torch.zeros(1, dtype=torch.bfloat16)
    fma_kernel[(1,)](x, out)
    exact = product + x[2].double()
    below, above = out.float() - 2.0**-7, out.float() + 2.0**-7
    nearest = min((below, out.float(), above), key=lambda v: abs(v.double().item() - exact.item()))
    return differ(out.float(), nearest)


@triton.jit
def dot_kernel(A, B, OUT, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HOW: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(A + m[:, None] * K + k[None, :])
    b = tl.load(B + k[:, None] * N + n[None, :])
    tl.store(OUT + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision=HOW))


def dot_error(a: Tensor, b: Tensor, how: str) -> float:
    """The largest error, relative to the largest product."""
    out = torch.zeros(a.shape[0], b.shape[1])
    sizes = {"M": a.shape[0], "N": b.shape[1], "K": a.shape[1]}
    dot_kernel[(1,)](a, b, out, **sizes, HOW=how)
    want = a.double() @ b.double()
    return float((out - want).abs().max() / want.abs().max())


@check
def products_of_bf16_and_fp8() -> str | None:
    """Of values that float32 multiplies exactly, only its 32 sums round."""
    tiny = normal(16, 32, dtype=torch.float32) * 0.01  # subnormal in e4m3
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        a, b = tiny.to(dtype), normal(32, 64, seed=1, dtype=torch.float32).to(dtype)
        error = dot_error(a, b, "ieee")
        if error > 32 * 2.0**-24:
            return f"{dtype}: {error:.1e}"
    return None


@check
def products_of_float32_as_asked() -> str | None:
    a, b = normal(16, 32, dtype=torch.float32), normal(32, 64, seed=1, dtype=torch.float32)
    exact, rounded = dot_error(a, b, "ieee"), dot_error(a, b, "tf32")
    low, high = 32 * 2.0**-24, 2 * 2.0**-10 * 32**0.5
    return None if exact < low < rounded < high else f"ieee {exact:.1e}, tf32 {rounded:.1e}"


@triton.jit
def reduce_kernel(X, OUT, INDEX, SUMS, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(X + at)
    tl.store(OUT, tl.sum(x))
    tl.store(OUT + 1, tl.max(x).to(tl.bfloat16))
    value, index = tl.max(x, axis=0, return_indices=True)
    tl.store(OUT + 2, value.to(tl.bfloat16))
    tl.store(INDEX, index)
    tl.store(SUMS + at, tl.cumsum(x, axis=0).to(tl.bfloat16))
    tl.store(SUMS + N + at, tl.cumprod(x, axis=0).to(tl.bfloat16))


def reduced(x: Tensor) -> tuple[Tensor, int, Tensor]:
    out, index = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32)
    sums = torch.zeros(2, x.numel(), dtype=torch.bfloat16)
    reduce_kernel[(1,)](x, out, index, sums, N=x.numel())
    return out, int(index), sums


@check
def reductions_of_bf16() -> str | None:
    x = normal(64) * 0.5 + 1
    out, index, sums = reduced(x)
    want = torch.stack([x.float().sum(), x.float().max(), x.float().max()]).bfloat16()
    running = torch.stack([x.float().cumsum(0), x.float().cumprod(0)]).bfloat16()
    step = (sums.float() - running.float()).abs() <= running.float().abs() * 2.0**-7
    wrong = differ(out, want) or (None if step.all() else "running sums")
    return wrong or (None if index == int(x.argmax()) else f"index {index}")


@check
def nan_is_passed_over() -> str | None:
    x = normal(64)
    x[5] = torch.nan
    out, index, _ = reduced(x)
    best = x.nan_to_num(-9.0)
    wrong = differ(out[1:], best.max().repeat(2))
    return wrong or (None if index == int(best.argmax()) else f"index {index}")


@check
def nothing_but_nan() -> str | None:
    out, index, _ = reduced(torch.full((64,), torch.nan).bfloat16())
    return None if out.isnan().all() and index == 0 else f"{out}, {index}"


@triton.jit
def add_kernel(X, SUM, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n, other=0.0)
    tl.atomic_add(SUM + at * 0, x, mask=at < n)


@check
def atomic_sums_of_bf16() -> str | None:
    x, total = torch.ones(50).bfloat16(), torch.zeros(1, dtype=torch.bfloat16)
    add_kernel[(1,)](x, total, 50, BLOCK=64)
    return differ(total, torch.tensor([50.0]).bfloat16())


@triton.jit
def erf_kernel(X, Y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Y + at, tl.erf(tl.load(X + at)))


@check
def erf() -> str | None:
    x, y = normal(256, dtype=torch.float32), torch.zeros(256)
    erf_kernel[(1,)](x, y, BLOCK=256)
    return differ(y, x.double().erf().float())


@triton.jit
def copy_kernel(X, Y, first, n, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n, other=0)
    tl.store(Y + tl.arange(0, BLOCK), x)


@triton.jit
def write_kernel(Y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Y + at, at.to(tl.float32), mask=at < n)


@triton.jit
def atomic_kernel(Y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(Y + at, 1.0, mask=at < n)


@triton.jit
def swap_kernel(Y, place):
    tl.atomic_cas(Y + place, 0, 1)


@triton.jit
def chosen_kernel(X, OTHER, Y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    pointers = tl.where(at[None, :] < n, X + at[None, :], X)
    tl.store(Y + at[:, None] * 0 + at[None, :], tl.load(pointers))


@triton.jit
def reshaped_kernel(X, Y, BLOCK: tl.constexpr):
    pointers = tl.reshape(X + tl.arange(0, 2 * BLOCK), (2, BLOCK))
    pointers = tl.trans(pointers)
    at = tl.arange(0, BLOCK)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(Y + at, tl.load(pointers))


@triton.jit
def grid_kernel(X, Y, BLOCK: tl.constexpr):
    row = (X + tl.arange(0, BLOCK) * 2)[None, :]
    pointers = tl.broadcast_to(row, (2, BLOCK)) + tl.arange(0, 2)[:, None]
    at = tl.arange(0, BLOCK)[None, :] * 2 + tl.arange(0, 2)[:, None]
    tl.store(Y + at, tl.load(pointers))


@triton.jit
def words_kernel(X, Y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    words = X.to(tl.pointer_type(tl.int32))
    tl.store(Y + at, tl.load(words + at).to(tl.float32))


def refused(launch: Callable[[], object], text: str = "") -> str | None:
    try:
        launch()
    except OutOfBounds as error:
        return None if text in str(error) else f"said {error}"
    return "was not caught"


@check
def a_read_past_the_end() -> str | None:
    x, y = torch.zeros(20), torch.zeros(64)
    copy_kernel[(1,)](x, y, 0, 20, BLOCK=64)  # the mask holds it back
    text = "a load through X [20] float32 leaves it: 44 of 64 active addresses lie outside"
    return refused(lambda: copy_kernel[(1,)](x, y, 0, 64, BLOCK=64), text)


@check
def the_line_and_the_element_are_named() -> str | None:
    x, y = torch.zeros(20), torch.zeros(64)
    launch = lambda: copy_kernel[(1,)](x, y, 0, 21, BLOCK=64)  # noqa: E731
    line = copy_kernel.fn.__code__.co_firstlineno + 3
    wrong = refused(launch, f"interpreted.py:{line}, program (0, 0, 0)")
    return wrong or refused(launch, "the first at element 20")


@check
def a_read_before_the_start() -> str | None:
    x, y = torch.zeros(20), torch.zeros(16)
    return refused(lambda: copy_kernel[(1,)](x[4:], y, -1, 15, BLOCK=16), "at element -1")


@check
def a_read_past_a_view_into_its_neighbour() -> str | None:
    both, y = torch.zeros(40), torch.zeros(64)
    return refused(lambda: copy_kernel[(1,)](both[:20], y, 0, 21, BLOCK=64))


@check
def a_read_from_one_argument_into_another() -> str | None:
    both = torch.zeros(84)
    return refused(lambda: copy_kernel[(1,)](both[:20], both[20:], 0, 30, BLOCK=64), "through X")


@check
def rows_with_gaps_are_taken() -> str | None:
    """Half of a fused matrix: its last row ends before the storage does."""
    both, y = torch.arange(40.0).reshape(2, 20), torch.zeros(32)
    left = both[:, :10]
    copy_kernel[(1,)](left, y, 0, 30, BLOCK=32)
    wrong = differ(y[20:30], left[1])
    return wrong or refused(lambda: copy_kernel[(1,)](left, y, 0, 31, BLOCK=32), "elements 0 to 29")


@check
def a_write_past_the_end() -> str | None:
    y = torch.zeros(40)[:20]
    write_kernel[(1,)](y, 20, BLOCK=64)
    return refused(lambda: write_kernel[(1,)](y, 21, BLOCK=64), "a store through Y")


@check
def an_atomic_past_the_end() -> str | None:
    y = torch.zeros(40)[:20]
    atomic_kernel[(1,)](y, 20, BLOCK=64)
    wrong = differ(y, torch.ones(20))
    return wrong or refused(lambda: atomic_kernel[(1,)](y, 21, BLOCK=64), "an atomic operation")


@check
def a_swap_past_the_end() -> str | None:
    y = torch.zeros(8, dtype=torch.int32)[:4]
    swap_kernel[(1,)](y, 3)
    return refused(lambda: swap_kernel[(1,)](y, 4), "an atomic operation through Y")


@check
def pointers_keep_their_tensor() -> str | None:
    """Without it the neighbour, an argument too, would take the read in."""
    both = torch.zeros(60)
    x, other, y = both[:20], both[20:52], torch.zeros(32)
    chosen_kernel[(1,)](x, other, y, 20, BLOCK=32)
    launches = [
        lambda: chosen_kernel[(1,)](x, other, y, 21, BLOCK=32),
        lambda: reshaped_kernel[(1,)](x, other, BLOCK=16),
        lambda: grid_kernel[(1,)](x, other, BLOCK=16),
        lambda: words_kernel[(1,)](x, other, BLOCK=32),
    ]
    said = [refused(launch, "through X [20]") for launch in launches]
    return next((text for text in said if text), None)


def told() -> dict[str, str | None]:
    """What every check says; an error is what a check says, too."""
    found: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        try:
            found[name] = function()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return found


def taken_back(module: object) -> dict[str, list[str]]:
    """For each replacement of the repair, the checks that fail when only it is missing."""
    names = [
        (owner, name)
        for part in (Arithmetic(module, True), Pointers(module, True))
        for owner, name, _ in part.replacements()
    ]
    plain = {key: getattr(*key) for key in names}
    missed: dict[str, list[str]] = {}
    for owner, name in dict.fromkeys(names):
        with interpreter.repair(tf32=True):
            repaired = getattr(owner, name)
            setattr(owner, name, plain[owner, name])
            missed[f"{owner.__name__}.{name}"] = [key for key, text in told().items() if text]
            setattr(owner, name, repaired)
    return missed


def loose() -> str | None:
    """Without strict the storage of a view is open, and no more."""
    both, y = torch.zeros(40), torch.zeros(64)
    with interpreter.repair(strict=False):
        copy_kernel[(1,)](both[:20], y, 0, 40, BLOCK=64)
        return refused(lambda: copy_kernel[(1,)](both[:20], y, 0, 41, BLOCK=64))


def main() -> None:
    torch.set_num_threads(1)
    module = interpreter._interpreter()
    before = dict(vars(module.InterpreterBuilder))
    result = {"repaired": {}, "loose": loose(), "taken back": taken_back(module)}
    with interpreter.repair(tf32=True):
        result["repaired"] = told()
    result["undone"] = before == dict(vars(module.InterpreterBuilder))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
