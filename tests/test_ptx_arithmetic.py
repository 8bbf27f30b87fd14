"""Scalar instructions of the PTX simulator against torch, numpy and Python's integers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.kernels.ptx_numbers import E4M3, E5M2, fused, to_bf16, to_odd
from ptx_snippets import each
from torch import Tensor

MIXED = torch.Generator().manual_seed(5)


def floats(dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    """32 values: ordinary ones, then zeros, infinities, NaN, the extremes, subnormals."""
    info = torch.finfo(dtype)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, info.max, info.min, info.tiny, 1.0, -1.0]
    ordinary = torch.randn(32 - len(special), generator=MIXED, dtype=torch.float64) * scale
    return torch.cat([ordinary, torch.tensor(special, dtype=torch.float64)]).to(dtype)


def ints(dtype: torch.dtype, low: int | None = None, high: int | None = None) -> Tensor:
    info = torch.iinfo(dtype)
    low, high = info.min if low is None else low, info.max if high is None else high
    some = torch.randint(low, high, (28,), generator=MIXED, dtype=torch.int64)
    return torch.cat([some, torch.tensor([low, high, max(low, 0), max(low, 1)])]).to(dtype)


def same(a: Tensor, b: Tensor) -> None:
    """Equal bits, but any NaN for any other."""
    if a.dtype.is_floating_point:
        nan = torch.isnan(a.float())
        assert torch.equal(nan, torch.isnan(b.float()))
        a, b = a.nan_to_num(0.0), b.nan_to_num(0.0)
        assert torch.equal(torch.signbit(a), torch.signbit(b))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("add.s32", lambda x, y: x + y),
        ("sub.s32", lambda x, y: x - y),
        ("mul.lo.s32", lambda x, y: x * y),
        ("min.s32", torch.minimum),
        ("max.s32", torch.maximum),
        ("and.b32", torch.bitwise_and),
        ("or.b32", torch.bitwise_or),
        ("xor.b32", torch.bitwise_xor),
        ("div.s32", lambda x, y: torch.div(x.long(), y.long(), rounding_mode="trunc").int()),
        ("rem.s32", torch.fmod),
    ],
)
def test_integer_arithmetic(opcode: str, function) -> None:
    x, y = ints(torch.int32), ints(torch.int32)
    y = torch.where(y == 0, 7, y)
    same(each(f"{opcode} $0, $1, $2;", [x, y], torch.int32), function(x, y))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_high_and_wide_products(kind: str) -> None:
    bits, signed = int(kind[1:]), kind[0] == "s"
    dtype = torch.int32 if bits == 32 else torch.int64
    x, y = ints(dtype), ints(dtype)
    mask = (1 << bits) - 1

    def number(value: int) -> int:
        return value if signed else value & mask

    full = [number(a) * number(b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    high = each(f"mul.hi.{kind} $0, $1, $2;", [x, y], dtype)
    assert [value & mask for value in high.tolist()] == [value >> bits & mask for value in full]
    if bits == 32:
        z = ints(torch.int64)
        wide = each(f"mad.wide.{kind} $0, $1, $2, $3;", [x, y, z], torch.int64)
        expected = [(a + b) & ((1 << 64) - 1) for a, b in zip(full, z.tolist(), strict=True)]
        assert [value & ((1 << 64) - 1) for value in wide.tolist()] == expected


@pytest.mark.parametrize("kind", ["b32", "b64", "u32", "s32", "s64"])
@pytest.mark.parametrize("left", [True, False])
def test_shifts_clamp_their_amount(kind: str, left: bool) -> None:
    bits = int(kind[1:])
    dtype = torch.int32 if bits == 32 else torch.int64
    x = ints(dtype)
    n = torch.tensor([0, 1, 5, 31, 32, 33, 63, 64, 65, 200, -1] + [3] * 21, dtype=torch.int32)
    opcode = ("shl.b" + kind[1:]) if left else f"shr.{kind}"
    out = each(f"{opcode} $0, $1, $2;", [x, n], dtype)
    mask = (1 << bits) - 1
    for value, amount, got in zip(x.tolist(), n.tolist(), out.tolist(), strict=True):
        amount = amount & 0xFFFFFFFF
        if left:
            want = value << min(amount, bits)
        elif kind[0] == "s":
            want = value >> min(amount, bits - 1)
        else:
            want = (value & mask) >> min(amount, bits)
        assert got & mask == want & mask
    fixed = each(f"{opcode} $0, $1, 40;", [x], dtype)
    moved = [v << 40 if left else (v if kind[0] == "s" else v & mask) >> 40 for v in x.tolist()]
    assert [v & mask for v in fixed.tolist()] == [v & mask for v in moved]


def field(value: int, start: int, count: int, bits: int, signed: bool) -> int:
    """bfe as the PTX manual's pseudo-code has it."""
    value &= (1 << bits) - 1
    top = bits - 1
    sign = 0
    if signed and count:
        sign = value >> min(start + count - 1, top) & 1
    result = 0
    for i in range(bits):
        bit = value >> (start + i) & 1 if i < count and start + i <= top else sign
        result |= bit << i
    return result


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind: str) -> None:
    bits = int(kind[1:])
    dtype = torch.int32 if bits == 32 else torch.int64
    x, y = ints(dtype), ints(dtype)
    start = torch.tensor([0, 5, 31, 32, 63, 255, 256 + 3, 9] * 4, dtype=torch.int32)
    lengths = [0, 1, 4, 8, 31, 32, 33, 64, 255, 7, 3, 16, 2, 1, 9, 5] * 2
    count = torch.tensor(lengths, dtype=torch.int32)
    mask = (1 << bits) - 1
    got = each(f"bfe.{kind} $0, $1, $2, $3;", [x, start, count], dtype)
    rows = zip(x.tolist(), start.tolist(), count.tolist(), strict=True)
    want = [field(v, s & 255, c & 255, bits, kind[0] == "s") for v, s, c in rows]
    assert [value & mask for value in got.tolist()] == want
    got = each(f"bfi.b{bits} $0, $1, $2, $3, $4;", [x, y, start, count], dtype)
    for a, b, s, c, value in zip(*(t.tolist() for t in (x, y, start, count, got)), strict=True):
        s, c = s & 255, c & 255
        ones = (((1 << c) - 1) << s) & mask
        assert value & mask == ((b & ~ones) | ((a << s) & ones)) & mask


def test_byte_permutation_logic_tables_and_counts() -> None:
    x, y, z = ints(torch.int32), ints(torch.int32), ints(torch.int32)
    word = 0xFFFFFFFF
    for selector in (0x3210, 0x7531, 0x0044, 0xFA81):
        got = each(f"prmt.b32 $0, $1, $2, {selector};", [x, y], torch.int32)
        moving = torch.full((32,), selector, dtype=torch.int32)
        same(each("prmt.b32 $0, $1, $2, $3;", [x, y, moving], torch.int32), got)
        for a, b, value in zip(x.tolist(), y.tolist(), got.tolist(), strict=True):
            source = (a & word).to_bytes(4, "little") + (b & word).to_bytes(4, "little")
            for i, byte in enumerate((value & word).to_bytes(4, "little")):
                pick = selector >> 4 * i & 15
                want = source[pick & 7]
                assert byte == ((255 if want & 128 else 0) if pick & 8 else want)
    tables = {
        0x80: lambda a, b, c: a & b & c,
        0xEA: lambda a, b, c: a & b | c,
        0x96: lambda a, b, c: a ^ b ^ c,
        0x0F: lambda a, b, c: ~a,
    }
    for table, function in tables.items():
        same(each(f"lop3.b32 $0, $1, $2, $3, {table};", [x, y, z], torch.int32), function(x, y, z))
    counts = [(value & word).bit_count() for value in x.tolist()]
    assert each("popc.b32 $0, $1;", [x], torch.int32).tolist() == counts
    leading = [32 - (value & word).bit_length() for value in x.tolist()]
    assert each("clz.b32 $0, $1;", [x], torch.int32).tolist() == leading
    reverse = [int(f"{value & word:032b}"[::-1], 2) for value in x.tolist()]
    assert [v & word for v in each("brev.b32 $0, $1;", [x], torch.int32).tolist()] == reverse


def test_carries_run_through_long_numbers() -> None:
    x, y, z = (ints(torch.int64) for _ in range(3))
    parts = "mov.b64 {%r10, %r11}, $1; mov.b64 {%r12, %r13}, $2; mov.b64 {%r14, %r15}, $3;"
    add = "add.cc.u32 %r20, %r10, %r12; addc.u32 %r21, %r11, %r13; mov.b64 $0, {%r20, %r21};"
    same(each(parts + add, [x, y, z], torch.int64), x + y)
    sub = "sub.cc.u32 %r20, %r10, %r12; subc.u32 %r21, %r11, %r13; mov.b64 $0, {%r20, %r21};"
    same(each(parts + sub, [x, y, z], torch.int64), x - y)
    mad = "mad.lo.cc.u32 %r20, %r10, %r12, %r14; madc.hi.u32 %r21, %r10, %r12, %r15;"
    got = each(parts + mad + "mov.b64 $0, {%r20, %r21};", [x, y, z], torch.int64)
    word, long = (1 << 32) - 1, (1 << 64) - 1
    rows = zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    assert [v & long for v in got.tolist()] == [
        ((a & word) * (b & word) + c) & long for a, b, c in rows
    ]


def test_byte_dot_product_and_funnel_shift() -> None:
    x, y, z = ints(torch.int32), ints(torch.int32), ints(torch.int32)
    a, b = x.view(torch.int8).view(-1, 4).long(), y.view(torch.int8).view(-1, 4).long()
    same(each("dp4a.s32.s32 $0, $1, $2, $3;", [x, y, z], torch.int32), ((a * b).sum(1) + z).int())
    unsigned = y.view(torch.uint8).view(-1, 4).long()
    got = each("dp4a.s32.u32 $0, $1, $2, $3;", [x, y, z], torch.int32)
    same(got, ((a * unsigned).sum(1) + z).int())
    word = 0xFFFFFFFF
    both = [(h & word) << 32 | (v & word) for v, h in zip(x.tolist(), y.tolist(), strict=True)]
    got = each("shf.l.wrap.b32 $0, $1, $2, 7;", [x, y], torch.int32)
    assert [v & word for v in got.tolist()] == [v << 7 >> 32 & word for v in both]
    got = each("shf.r.clamp.b32 $0, $1, $2, 32;", [x, y], torch.int32)
    same(got, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("add", torch.add),
        ("sub", torch.sub),
        ("mul", torch.mul),
        ("min", torch.fmin),
        ("max", torch.fmax),
        ("max.NaN", torch.maximum),
        ("neg", torch.neg),
        ("abs", torch.abs),
    ],
)
def test_float_arithmetic_is_exactly_rounded(opcode: str, dtype: torch.dtype, function) -> None:
    kind = {2: "f16", 4: "f32", 8: "f64"}[dtype.itemsize]
    kind = "bf16" if dtype == torch.bfloat16 else kind
    x, y = floats(dtype), floats(dtype).flip(0)
    rounding = ".rn" if opcode in ("add", "sub", "mul") else ""
    if opcode in ("neg", "abs"):
        same(each(f"{opcode}.{kind} $0, $1;", [x], dtype), function(x))
        return
    got = each(f"{opcode}{rounding}.{kind} $0, $1, $2;", [x, y], dtype)
    want = function(x.double(), y.double()).to(dtype) if dtype.itemsize == 2 else function(x, y)
    # of equal zeros PTX takes the positive one for max; numpy and torch take either
    zero = (x == 0) & (y == 0)
    same(torch.where(zero, 1.0, got).to(dtype), torch.where(zero, 1.0, want).to(dtype))


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_packed_halves_are_two_numbers(kind: str) -> None:
    dtype = torch.float16 if kind == "f16x2" else torch.bfloat16
    x, y, z = (torch.randn(64, generator=MIXED).to(dtype) for _ in range(3))
    words = [t.view(torch.int32) for t in (x, y, z)]
    got = each(f"fma.rn.{kind} $0, $1, $2, $3;", words, torch.int32).view(dtype)
    same(got, (x.double() * y.double() + z.double()).to(dtype))
    got = each(f"sub.{kind} $0, $1, $2;", words[:2], torch.int32).view(dtype)
    same(got, (x.double() - y.double()).to(dtype))


def test_fused_multiply_add_rounds_once() -> None:
    # 1 + 2^-12 squared plus 2^-53 (and minus): halfway, and decided only by the addend
    a = torch.full((32,), 1 + 2.0**-12)
    c = torch.tensor([2.0**-60, -(2.0**-60)] * 16)
    one, up = 1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-23
    got = each("fma.rn.f32 $0, $1, $2, $3;", [a, a, c], torch.float32)
    assert got.tolist() == [up, one] * 16
    x, y, z = (torch.randn(32, generator=MIXED) for _ in range(3))
    got = each("fma.rn.f32 $0, $1, $2, $3;", [x, y, z], torch.float32)
    same(got, (x.double() * y.double() + z.double()).float())


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_halves_into_float32(kind: str) -> None:
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    x, y = (torch.randn(32, generator=MIXED).to(dtype) for _ in range(2))
    z = torch.randn(32, generator=MIXED)
    same(each(f"add.rn.f32.{kind} $0, $1, $2;", [x, z], torch.float32), x.float() + z)
    same(each(f"sub.f32.{kind} $0, $1, $2;", [x, z], torch.float32), x.float() - z)
    got = each(f"fma.rn.f32.{kind} $0, $1, $2, $3;", [x, y, z], torch.float32)
    same(got, (x.double() * y.double() + z.double()).float())


def test_f32_pairs() -> None:
    x, y, z = (torch.randn(64, generator=MIXED) for _ in range(3))
    words = [t.view(torch.int64) for t in (x, y, z)]
    got = each("fma.rn.f32x2 $0, $1, $2, $3;", words, torch.int64).view(torch.float32)
    same(got, (x.double() * y.double() + z.double()).float())


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("ex2.approx.f32", torch.exp2),
        ("lg2.approx.f32", torch.log2),
        ("rcp.approx.f32", torch.reciprocal),
        ("sqrt.rn.f32", torch.sqrt),
        ("rsqrt.approx.f32", torch.rsqrt),
        ("sin.approx.f32", torch.sin),
        ("cos.approx.f32", torch.cos),
        ("tanh.approx.f32", torch.tanh),
    ],
)
def test_approximate_functions(opcode: str, function) -> None:
    x = floats()
    x = torch.where(x.abs() > 1e30, 2.5, x) if opcode[:3] in ("sin", "cos") else x
    got, want = each(f"{opcode} $0, $1;", [x], torch.float32), function(x.double()).float()
    torch.testing.assert_close(got, want, rtol=2.0**-22, atol=2.0**-126, equal_nan=True)


def test_flush_to_zero_loses_subnormals_only() -> None:
    x = torch.tensor([2.0**-126, 2.0**-127, -(2.0**-130), 1.5] * 8)
    got = each("mul.ftz.f32 $0, $1, 0f3F800000;", [x], torch.float32)
    same(got, torch.tensor([2.0**-126, 0.0, -0.0, 1.5] * 8))
    same(each("mul.f32 $0, $1, 0f3F800000;", [x], torch.float32), x)


@pytest.mark.parametrize(
    "word", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "num", "nan"]
)
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_comparisons_with_nan(word: str, kind: str) -> None:
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    x, y = floats(dtype), floats(dtype).roll(3)
    y[:4] = x[:4]
    got = each(f"setp.{word}.{kind} %p1, $1, $2; selp.b32 $0, 1, 0, %p1;", [x, y], torch.int32)
    nan = torch.isnan(x) | torch.isnan(y)
    base = {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}
    want = {"num": ~nan, "nan": nan}.get(word)
    if want is None:
        want = base[word[:2]] | nan if word.endswith("u") else base[word] & ~nan
    assert got.bool().tolist() == want.tolist()


def test_comparisons_of_integers_join_predicates() -> None:
    x, y = ints(torch.int32), ints(torch.int32)
    text = "setp.lt.u32 %p1, $1, $2; setp.gt.and.s32 %p2|%p3, $1, 5, %p1; selp.b32 $0, 1, 0, %p2;"
    got = each(text, [x, y], torch.int32)
    below = (x.long() & 0xFFFFFFFF) < (y.long() & 0xFFFFFFFF)
    assert got.bool().tolist() == (below & (x > 5)).tolist()
    got = each(text.replace("1, 0, %p2", "1, 0, %p3"), [x, y], torch.int32)
    assert got.bool().tolist() == (below & (x <= 5)).tolist()


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("out", [torch.int16, torch.int32, torch.int64])
def test_floats_to_integers_saturate(mode: str, out: torch.dtype) -> None:
    x = torch.cat([floats(scale=40.0)[:30], torch.tensor([2.5, -3.5])])
    got = each(f"cvt.{mode}.s{8 * out.itemsize}.f32 $0, $1;", [x], out)
    function = {"rni": torch.round, "rzi": torch.trunc, "rmi": torch.floor, "rpi": torch.ceil}[mode]
    info = torch.iinfo(out)
    for value, number in zip(function(x).tolist(), got.tolist(), strict=True):
        want = 0 if math.isnan(value) else value
        want = info.max if want >= info.max else info.min if want <= info.min else int(want)
        assert number == want


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_conversions_to_floats_round_to_nearest_even(to: torch.dtype, of: torch.dtype) -> None:
    if of == to:
        return
    x = floats(of) if of.is_floating_point else ints(of)
    name = {
        torch.float16: "f16",
        torch.bfloat16: "bf16",
        torch.float32: "f32",
        torch.float64: "f64",
    }
    source = name.get(of) or f"s{8 * of.itemsize}"
    got = each(f"cvt.rn.{name[to]}.{source} $0, $1;", [x], to)
    wide = x.numpy().astype(np.longdouble)
    nearest = [nearest_even(float_or_int, to) for float_or_int in wide]
    same(got, torch.tensor(nearest, dtype=torch.float64).to(to))


def nearest_even(value: np.longdouble, to: torch.dtype) -> float:
    """The value rounded to the precision of `to`, as a float64 that it fits in; overflow to inf."""
    if not np.isfinite(value) or value == 0:
        return float(value)
    info = torch.finfo(to)
    exponent = max(int(np.floor(np.log2(abs(value)))), int(math.log2(info.tiny)))
    step = np.ldexp(np.longdouble(info.eps), exponent)
    rounded = float(np.rint(value / step) * step)
    return math.copysign(math.inf, rounded) if abs(rounded) > info.max else rounded


def test_packing_two_floats_into_halves() -> None:
    x, y = floats(), floats().flip(0)
    got = each("cvt.rn.bf16x2.f32 $0, $1, $2;", [x, y], torch.int32).view(torch.bfloat16)
    same(got, torch.stack([y, x], 1).bfloat16().reshape(-1))
    got = each("cvt.rn.f16x2.f32 $0, $1, $2;", [x, y], torch.int32).view(torch.float16)
    same(got, torch.stack([y, x], 1).half().reshape(-1))
    ordinary = torch.randn(32, generator=MIXED)
    cut = each("cvt.rz.f16x2.f32 $0, $1, $1;", [ordinary], torch.int32).view(torch.float16)
    assert bool((cut.float().abs() <= ordinary.repeat_interleave(2).abs()).all())


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_fp8_conversions(name: str, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    wide = codes.view(dtype).float()
    form = E4M3 if name == "e4m3" else E5M2
    same(torch.from_numpy(form.widen(codes.numpy())), wide)
    # every middle of two neighbours, which must go to the even one, and points beside it
    finite = wide[torch.isfinite(wide)].unique()
    middle = (finite[1:] + finite[:-1]) / 2
    points = torch.cat([finite, middle, middle.nextafter(torch.tensor(1e9)), torch.tensor([-0.0])])
    got = torch.from_numpy(form.narrow(points.numpy())).view(dtype).float()
    same(got, points.to(dtype).float())
    limit = float(finite.max())
    beyond = form.narrow(np.float32([1e9, -1e9, np.inf, limit * 1.06, np.nan]))
    values = torch.from_numpy(beyond).view(dtype).float().tolist()
    assert values[:4] == [limit, -limit, limit, limit]
    assert math.isnan(values[4])


def test_fp8_pairs_in_registers() -> None:
    x, y = torch.randn(32, generator=MIXED) * 50, torch.randn(32, generator=MIXED)
    got = each("cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;", [x, y], torch.int16)
    want = torch.stack([y, x], 1).to(torch.float8_e4m3fn)
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8).reshape(-1))
    back = each("cvt.rn.f16x2.e4m3x2 $0, $1;", [got], torch.int32).view(torch.float16)
    same(back, want.reshape(-1).half())
    halves = want.half().reshape(-1).view(torch.int32)
    again = each("cvt.rn.satfinite.e5m2x2.f16x2 $0, $1;", [halves], torch.int16)
    five = want.half().to(torch.float8_e5m2).reshape(-1)
    assert torch.equal(again.view(torch.uint8), five.view(torch.uint8))


@settings(max_examples=200, deadline=None)
@given(*[st.floats(width=32, allow_nan=False, allow_infinity=False) for _ in range(3)])
def test_fused_add_agrees_with_exact_arithmetic(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = fused(*(np.array([v], np.float32) for v in (a, b, c)))
    with np.errstate(all="ignore"):
        single = got.astype(np.float32)[0]
    if not np.isfinite(single):
        assert abs(exact) >= Fraction(float(np.finfo(np.float32).max))
        return
    with np.errstate(all="ignore"):
        neighbours = np.nextafter(single, np.float32([np.inf, -np.inf]))
    for neighbour in neighbours:
        if np.isfinite(neighbour):
            error = abs(Fraction(float(single)) - exact)
            other = abs(Fraction(float(neighbour)) - exact)
            odd = int(single.view(np.uint32)) & 1
            assert error < other or (error == other and not odd)


@settings(max_examples=200, deadline=None)
@given(st.floats(width=64))
def test_bfloat16_of_a_double_is_rounded_once(value: float) -> None:
    with np.errstate(all="ignore"):
        bits = to_bf16(to_odd(np.array([value])))
    if math.isnan(value):
        assert bits[0] == 0x7FFF
        return
    got = (bits.astype(np.uint32) << 16).view(np.float32)[0]
    want = nearest_even(np.longdouble(value), torch.bfloat16)
    assert float(got) == want
